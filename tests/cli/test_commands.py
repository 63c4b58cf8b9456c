"""The command line as a whole: help, exit codes, and what holds for every command."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.cli.group import main
from qat.models.bnext import set_temperature
from qat.recipe.files import recipes_dir
from tests.helpers.killed_training import train
from tests.helpers.paths import ROOT
from tests.helpers.toy_runs import fail, qat, succeed, tune, tuned


def test_help_names_the_commands_and_the_exit_codes() -> None:
    text = succeed("--help")
    for word in ("finetune", "pretrain", "export", "evaluate", "recipe", "--debug", "Exit codes", "130"):
        assert word in text, word
    assert succeed("-h") == text
    assert succeed("--version").startswith("qat, version ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetune", "--recipe --set tiny_int8 KEY=VALUE"),
        ("pretrain", "--recipe --set tiny_digits_pretrain ±1"),
        ("export", "--onnx --run --checkpoint --runs --image-size --set"),
        ("evaluate", "MODEL --recipe --set --json"),
        ("recipe", "list show copy schema"),
        ("recipe show", "NAME --resolved --set"),
        ("recipe copy", "NAME DESTINATION --force"),
    ],
)
def test_each_commands_help_mentions_its_options(command: str, words: str) -> None:
    text = succeed(*command.split(), "--help")
    assert all(word in text for word in words.split())


# Wrong input


@pytest.mark.parametrize("command", [("evaluate",), ("recipe", "copy", "tiny_int8")])
def test_a_name_too_long_for_a_file_is_an_error_of_the_user(command: tuple[str, ...]) -> None:
    assert "too long" in fail(2, *command, "x" * 300)


def test_an_unknown_command_is_an_error_of_the_user() -> None:
    assert "No such command 'train'" in fail(2, "train")


class _Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "bits", "text", "folder", "null bytes"])
def test_a_damaged_checkpoint_is_refused_by_every_command(toys: Path, tmp_path: Path, damage: str) -> None:
    path, good = tmp_path / "c.safetensors", tuned(toys).read_bytes()
    if damage == "folder":
        path.mkdir()
    else:
        content = {
            "empty": b"",
            "truncated": good[: len(good) // 2],
            "header": good[:20] + b"\xff" * 40 + good[60:],
            "bits": good[:-400] + b"\xff" * 400,
            "text": b"hello\n",
            "null bytes": bytes(1000),
        }
        path.write_bytes(content[damage])
    for command in (
        tune(toys, tmp_path / "runs", f"model.checkpoint={path}"),
        ["export", "--onnx", "--checkpoint", path],
        ["evaluate", path],
    ):
        assert str(path) in fail(2, *command)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "model.onnx").exists()


def test_code_in_a_checkpoint_is_not_run(toys: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "c.pth.tar", tmp_path / "trace"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": _Hostile(trace)}, path)
    assert "refused" in fail(2, *tune(toys, tmp_path / "runs", f"model.checkpoint={path}"))
    fail(2, "evaluate", path)
    path.write_bytes(pickle.dumps(_Hostile(trace)))
    fail(2, "export", "--onnx", "--checkpoint", path)
    assert not trace.exists()


def test_weights_that_are_not_binary_are_neither_tuned_nor_exported(toys: Path, tmp_path: Path) -> None:
    for source, name in ((toys / "float.safetensors", "float"), (tuned(toys), "tuned")):
        stored = load_checkpoint(source)
        model = build(stored)
        set_temperature(model, 0.3)
        save_checkpoint(tmp_path / f"{name}.safetensors", model, recipe=stored.recipe)
    soft = f"model.checkpoint={tmp_path / 'float.safetensors'}"
    assert "the temperature is 0.3" in fail(2, *tune(toys, tmp_path / "runs", soft))
    message = fail(2, "export", "--onnx", "--checkpoint", tmp_path / "tuned.safetensors")
    assert "tuned.safetensors: feature.1" in message
    assert "temperature 0.3" in message


# Errors


def test_debug_shows_a_traceback_before_and_after_the_command() -> None:
    for arguments in (("--debug", "evaluate", "nowhere"), ("evaluate", "nowhere", "--debug")):
        result = qat(*arguments)
        assert result.exit_code == 2
        assert "Traceback (most recent call last)" in result.stderr
        assert "CheckpointError" in result.stderr
        assert result.stderr.splitlines()[-1] == "error: nowhere: no such file"
    # As a value it is no option.
    assert "Traceback" not in fail(2, "finetune", "--set", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 2, "error: not enough memory: "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "error: not enough memory: ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: not enough memory: "),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: cannot write: No space left"),
        (ValueError("odd"), 3, "error: internal error: ValueError: odd (see `qat --debug`)\n"),
        (RecursionError("deep"), 3, "error: internal error: RecursionError: deep"),
        (AssertionError(), 3, "error: internal error: AssertionError (see"),
    ],
)
def test_other_errors_have_codes_too_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("qat.commands.evaluation.evaluate_model", broken)
    result = CliRunner().invoke(main, ["evaluate", "x"])
    assert result.exit_code == code
    assert result.stderr.startswith(text)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# As a process of its own


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qat", *map(str, arguments)],
        env=environment | options.pop("env", {}),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_leaves_early_causes_no_traceback_and_no_verdict() -> None:
    table = ["inspect", recipes_dir() / "checkpoints" / "bnext_tiny_digits.safetensors", "--layers"]
    for command in (["recipe", "schema"], ["recipe", "list"], table):
        read, write = os.pipe()
        os.close(read)
        process = start(*command, stdout=write)
        os.close(write)
        _, errors = process.communicate(timeout=60)
        assert (errors, process.returncode) == ("", 141)  # 1 would say that something is not good enough


def test_an_interrupt_ends_a_run_with_130_and_its_checkpoint_stays_readable(
    toys: Path, tmp_path: Path
) -> None:
    ended = train(tune(toys, tmp_path, "schedule.epochs=2"), "metrics", send=signal.SIGINT)
    assert ended.code == 130
    (run,) = tmp_path.iterdir()
    assert ended.errors.splitlines()[-1] == f"error: interrupted; go on with: qat finetune --resume {run}"
    assert "Traceback" not in ended.errors
    assert load_checkpoint(run / "last.safetensors").quantization is not None
    assert not list(run.glob(".*.tmp"))


def test_a_narrow_encoding_replaces_signs_rather_than_failing() -> None:
    process = start("pretrain", "--help", env={"PYTHONIOENCODING": "cp866", "PYTHONUTF8": "0"})  # has no ±
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "exactly ?1." in output


def test_the_command_line_answers_before_torch_is_loaded() -> None:
    program = "import sys, qat.cli; sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime')))"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0
    assert time.perf_counter() - started < 30
