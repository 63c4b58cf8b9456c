"""The `qat` command itself: --debug, and the message and exit code of every error."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from typing import Any, Final, NoReturn

import click

from qat import __version__
from qat.errors import QatError
from qat.system.launch import launched

# GNU OpenMP threads spin while they wait, by default so long that a second process on the same cores makes
# training five to eight times slower. It reads these when torch is loaded, which commands do later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_EPILOG = (
    "Exit codes: 0 success; 1 the work ran, but its result is not good enough; 2 wrong input; "
    "3 an error of this program; 130 interrupted; 143 a training run stopped by SIGTERM, its state saved."
)

#: Exit code of a command that SIGINT ended: 128 + 2, by the convention of shells.
_INTERRUPTED = 130
#: Exit code of a command whose output pipe was closed by its reader: 128 + 13 (SIGPIPE).
_BROKEN_PIPE = 141
#: Key of ``click.Context.meta`` that is set when --debug was given.
_DEBUG = "qat.debug"
#: Commands that may be launched as several processes, which share the work.
_SHARED: Final = ("evaluate", "finetune", "pretrain", "quantize")


class Command(click.Command):
    """A command that also takes --debug after its name: `qat report --debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(["--debug"], is_flag=True, hidden=True, expose_value=False, callback=_set_debug)
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Refuse to run it in several processes if it is to be done once."""
        if (size := launched().size) > 1 and self.name not in _SHARED:
            raise QatError(
                f"`{ctx.command_path}` runs in one process, {size} were launched; several share the work of "
                f"{', '.join(_SHARED)}"
            )
        return super().invoke(ctx)


class _Group(click.Group):
    """Turns the project's errors into messages and exit codes; --debug shows the traceback."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # A file or pipe whose encoding lacks × or ≥ must not end a long run: print ? instead.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            return super().main(*args, **kwargs)
        except SystemExit as ended:
            if launched().size > 1 and isinstance(ended.code, int | None):
                _leave_together(ended.code or 0)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort) as error:
            if isinstance(error, click.ClickException) and launched().rank:
                sys.exit(error.exit_code)  # the process of rank 0 prints the message
            raise  # click prints its own errors and has exit codes for them
        except BrokenPipeError:
            # click would exit with 1, which here means a failed gate. What is still buffered is discarded:
            # flushing it into the closed pipe would raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_BROKEN_PIPE)
        except (KeyboardInterrupt, Exception) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                code, message = _INTERRUPTED, "; ".join(filter(None, ("interrupted", str(error))))
            elif isinstance(error, QatError):
                code, message = error.exit_code, str(error)
            else:
                code, message = _unforeseen(error)
            if launched().size > 1:
                _end_together(code, message, error)
        click.echo(f"error: {message}", err=True)
        sys.exit(code)


def _end_together(code: int, message: str, error: BaseException) -> NoReturn:
    """End this one of several processes after an error; of all with the same error, one prints it."""
    from qat.system.collectives import failure_report

    code, said = failure_report(code, message, error)
    if said is not None:
        click.echo(f"error: {said}", err=True)
    _leave(code)  # without Python's shutdown, in which clean-up may wait for the other processes


def _leave_together(code: int) -> None:
    """End this one of several processes without Python's shutdown, if they were connected.

    A thread of gloo may still hold a tensor of the last message. Releasing it while Python shuts down would
    abort the process, although its work is done.
    """
    from qat.system.collectives import were_connected

    if were_connected():
        _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _unforeseen(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that is not this project's."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    # torch has an error class for a full GPU only; its CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return 2, (
            "not enough memory: a smaller data.batch_size, data.eval_batch_size, data.image_size or network "
            f"needs less ({text.splitlines()[0]})"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 2, f"cannot write: {error.strerror}"
    if isinstance(error, OSError) and error.filename is not None:  # such as a file name that is too long
        return 2, f"{str(error.filename)[:200]}: {error.strerror}"
    return 3, f"internal error: {text} (see `qat --debug`)"


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


@click.group("qat", cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qat")
@click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Quantization-aware fine-tuning of binary BNext networks, exported as integer ONNX graphs."""
    if not ctx.meta.get(_DEBUG):
        warnings.simplefilter("ignore")
