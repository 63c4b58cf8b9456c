"""Runs a training in its own process, sends it a signal at a given moment, and compares what it leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qat.cli.group import main
from tests.helpers.fork_server import PROCESSES
from tests.helpers.toy_runs import TOY, settings

#: One block beside the stem, of the kind that has most layers.
WIDTHS = "model.widths=[8,16]"
#: 3 epochs of 4 steps, a state after every third step.
SMALL = (
    *TOY,
    WIDTHS,
    "schedule.epochs=3",
    "schedule.save_steps=3",
    "data.batch_size=320",
    "data.augment.translate=0.1",
    "data.augment.rotate=5.0",
)
#: Two kinds of observers, observers and batch norm that freeze under way, statistics averaged at the end.
TUNED = (
    "schedule.calibration_batches=2",
    "schedule.freeze_observers=0.6",
    "schedule.freeze_batch_norm=0.4",
    "schedule.reestimate_batch_norm=2",
    "quantization.se.observer=minmax",
    "optimizer.weight_decay=0.01",
    "optimizer.clip_norm=5.0",
)


@dataclass(frozen=True)
class Ended:
    """How a process ended, what it wrote, and the moments it passed if it was not killed."""

    code: int
    errors: str
    moments: list[str]

    def moment(self, name: str) -> int:
        """Number of the moment ``name``, from 1."""
        return self.moments.index(name) + 1


def train(
    arguments: list[str],
    at: int | str | None = None,
    *,
    send: int = signal.SIGKILL,
    times: int = 1,
    tidy: bool = False,
) -> Ended:
    """Run `qat ARGUMENTS` in a process that gets a signal ``times`` times at moment ``at``, a number or name.

    These are the moments: ``half NAME``, when half of a file is written; ``before NAME``, when the file is
    complete under its temporary name; ``NAME``, when it has its name; ``step``, after an optimizer step; and
    ``metrics``, after a line of metrics. Unless ``tidy``, the states of a finished run are not removed. No
    report is written.
    """
    receive, reply = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_child, args=(arguments, at, send, times, tidy, reply))
    process.start()
    reply.close()
    try:
        moments, errors = receive.recv()
    except EOFError:  # killed
        moments, errors = [], ""
    process.join()
    assert process.exitcode is not None
    named = [
        f"half {moments[index + 1].removeprefix('before ')}" if moment == "half" else moment
        for index, moment in enumerate(moments)
    ]
    return Ended(process.exitcode, errors, named)


def _child(
    arguments: list[str], at: int | str | None, send: int, times: int, tidy: bool, reply: Connection
) -> None:
    import io

    from torch.optim.optimizer import register_optimizer_step_post_hook

    import qat.cli.training
    import qat.train.setup
    from qat.runs import RunDirectory

    moments: list[str] = []

    def pass_by(name: str, file: int | None = None) -> None:
        moments.append(name)
        if at == len(moments) or (at == name and moments.count(name) == 1):
            if file is not None:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            for _ in range(times):
                os.kill(os.getpid(), send)

    fsync, replace, log = os.fsync, Path.replace, RunDirectory.log

    def written(file: int) -> None:
        pass_by("half", file if send == signal.SIGKILL else None)
        fsync(file)

    def renamed(path: Path, target: Path) -> Path:
        pass_by(f"before {target.name}")
        result = replace(path, target)
        pass_by(target.name)
        return result

    def logged(run: RunDirectory, metrics: dict[str, Any]) -> None:
        log(run, metrics)
        pass_by("metrics")

    for owner, name, function in (
        (os, "fsync", written),
        (Path, "replace", renamed),
        (RunDirectory, "log", logged),
        (qat.cli.training, "report_on", lambda run: None),
        *([] if tidy else [(qat.train.setup, "remove_states", lambda path: None)]),
    ):
        setattr(owner, name, function)
    register_optimizer_step_post_hook(lambda *_: pass_by("step"))
    # Shells start background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        main(arguments)
    finally:
        reply.send((moments, sys.stdout.getvalue() + sys.stderr.getvalue()))


def arguments(task: str, out: Path, start: Path | None, *overrides: str) -> list[str]:
    """Of a small `qat TASK` that writes below ``out``; fine-tuning starts from ``start``."""
    fixed = [*SMALL, f"output.dir={json.dumps(str(out))}"]
    if task == "finetune":
        fixed += [*TUNED, f"model.checkpoint={json.dumps(str(start))}"]
    keys = {override.partition("=")[0] for override in overrides}
    return [task, *settings([one for one in fixed if one.partition("=")[0] not in keys] + list(overrides))]


def resume(run: Path, *overrides: str) -> list[str]:
    """Arguments that go on with ``run``."""
    task = "pretrain" if "pretrain" in run.name else "finetune"
    return [task, "--resume", str(run), *settings(overrides)]


def unfinished(out: Path) -> Path:
    """The one run below ``out`` without a summary."""
    (run,) = (path for path in out.iterdir() if not (path / "summary.json").exists())
    return run


def timeless(content: dict[str, Any]) -> dict[str, Any]:
    """Metrics or a summary without what depends on the clock."""
    clocks = ("seconds", "images_per_second", "finished")
    return {key: value for key, value in content.items() if key not in clocks}


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run leaves, without times.

    That is the bytes of its files, its metrics and summary, and the tensors of its newest state, which has
    the latent weights, too.
    """
    from qat.train.state_file import newest_state

    found: dict[str, Any] = {}
    for path in sorted(run.iterdir()):
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[path.name] = [timeless(row) for row in rows]
        elif path.name == "summary.json":
            found[path.name] = timeless(json.loads(path.read_text("utf-8")))
        elif path.is_file():
            found[path.name] = path.read_bytes()
    state = newest_state(run, print)
    if state is not None:
        found["states"] = sorted(path.name for path in (run / "state").iterdir())
        found |= {key: value.numpy().tobytes() for key, value in state.tensors.items()}
        record = state.record.model_dump(exclude={"seconds", "rows"})
        found |= {f"record/{key}": value for key, value in record.items()}
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The parts in which two outcomes differ. The number of states that are left is ignored."""
    return [key for key in {**a, **b} if key != "states" and a.get(key) != b.get(key)]
