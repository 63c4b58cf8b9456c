"""Starts processes that train together, as `torchrun` does, but quickly: by forking one that loaded torch."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from qat.cli.group import main
from tests.helpers.fork_server import PROCESSES
from tests.helpers.toy_runs import TOY, settings

#: Seconds without output after which a process counts as hanging.
_PATIENCE: Final = 120.0


@dataclass(frozen=True)
class Ended:
    """How one process ended, and what it said; ``result`` is that of a function."""

    code: int
    output: str
    errors: str
    result: Any = None


#: 2 epochs of 4 steps, a state after every third step.
LONG = (
    "data.batch_size=320",
    "data.augment={translate: 0.1, mixup: 0.2}",
    "schedule.epochs=2",
    "schedule.save_steps=3",
)


def by_launcher(
    launcher: Sequence[str], words: Sequence[str], out: Path, at: str | None = None
) -> tuple[int, str, str]:
    """Run `qat WORDS` by a real launcher, given as a module and its arguments.

    The launcher is forked with torch in memory, but starts new interpreters, whose output goes to files below
    ``out``. Once ``at`` is printed, the launcher is sent SIGTERM.

    Returns:
        Exit code, standard output and standard error.
    """
    output, errors = out / "output", out / "errors"
    output.touch()
    process = PROCESSES.Process(target=_launch, args=(list(launcher), list(words), output, errors))
    process.start()
    try:
        ends = time.monotonic() + _PATIENCE
        while process.is_alive() and at is not None and time.monotonic() < ends:
            if at in output.read_text("utf-8"):
                process.terminate()
                break
            time.sleep(0.02)
        process.join(_PATIENCE)
        assert process.exitcode is not None, "the launcher hangs"
    finally:
        process.kill()
    return process.exitcode, output.read_text("utf-8"), errors.read_text("utf-8")


def _launch(launcher: list[str], words: list[str], output: Path, errors: Path) -> None:
    for path, number in ((output, 1), (errors, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = [*launcher, "-m", "qat", *words]
    importlib.import_module(launcher[0]).main()


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def together(
    arguments: Sequence[str], prepare: Callable[[int], None] | None = None, size: int = 2
) -> list[Ended]:
    """Run `qat ARGUMENTS` in processes that share the work. Each first calls ``prepare`` with its rank."""
    return _run(_command, (list(arguments), prepare), size)


def call(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
    """Call ``function(*arguments)`` in connected processes, and return each one's result.

    The function must be defined at the top of a module.
    """
    ended = _run(_function, (function, arguments), size)
    assert [one.code for one in ended] == [0] * size, [one.errors for one in ended]
    return [one.result for one in ended]


def _run(target: Callable[..., Any], arguments: tuple[Any, ...], size: int) -> list[Ended]:
    port = free_port()
    # The store of torchrun's agent outlives the processes.
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    running = []
    for rank in range(size):
        receive, reply = PROCESSES.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        # Pickled by hand: between processes, torch would share tensors' memory.
        work = pickle.dumps((target, arguments))
        process = PROCESSES.Process(target=_child, args=(environment, reply, work))
        process.start()
        reply.close()
        running.append((process, receive))
    ended = []
    for process, receive in running:
        try:
            if not receive.poll(_PATIENCE):
                process.kill()
            code, output, errors, result = receive.recv()
        except EOFError:  # killed
            code, output, errors, result = None, "", "", pickle.dumps(None)
        process.join()
        assert process.exitcode is not None
        ended.append(Ended(process.exitcode if code is None else code, output, errors, pickle.loads(result)))
    del store
    return ended


def _child(environment: dict[str, str], reply: Connection, work: bytes) -> None:
    import io
    import traceback

    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    result = None
    target, arguments = pickle.loads(work)

    def end(code: int) -> None:
        said = sys.stdout.getvalue(), sys.stderr.getvalue()  # type: ignore[attr-defined]
        reply.send((code, *said, pickle.dumps(result)))
        reply.close()
        leave(code)

    leave, os._exit = os._exit, end  # type: ignore[assignment]
    code = 0
    try:
        result = target(*arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    end(code)


def _command(arguments: list[str], prepare: Callable[[int], None] | None) -> None:
    import qat.cli.training
    import qat.train.setup

    qat.cli.training.report_on = lambda run: None  # type: ignore[assignment]
    qat.train.setup.remove_states = lambda path: None  # states of finished runs are compared
    if prepare is not None:
        prepare(int(os.environ["RANK"]))
    sys.argv = ["qat", *arguments]  # otherwise it would be the command line of pytest
    main(arguments)


def _function(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from qat.system.collectives import joined

    with joined():
        return function(*arguments)


def arguments(task: str, out: Path, *overrides: str) -> list[str]:
    """Of a toy `qat TASK` that writes below ``out``."""
    keys = {override.partition("=")[0] for override in overrides}
    fixed = [*TOY, f"output.dir={json.dumps(str(out))}"]
    return [task, *settings([one for one in fixed if one.partition("=")[0] not in keys] + list(overrides))]


def the_run(out: Path) -> Path:
    """The one run below ``out``."""
    (run,) = out.iterdir()
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one epoch each."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def codes(ended: list[Ended]) -> list[int]:
    """Exit codes, by rank."""
    return [one.code for one in ended]


def send(number: int, to: int, at: int, rank: int) -> None:
    """Send a signal to process ``to`` after optimizer step ``at``."""
    from datetime import timedelta

    from torch.optim.optimizer import register_optimizer_step_post_hook

    from qat.system import collectives

    # A killed process never reports why it ended, so the others needn't wait long for its message.
    collectives.PATIENCE = timedelta(seconds=1)
    steps = []

    def passed(*_: object) -> None:
        steps.append(1)
        if rank == to and len(steps) == at:
            os.kill(os.getpid(), number)

    register_optimizer_step_post_hook(passed)
