"""The part of a record on training runs: whole ones, and ones that were stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import safetensors
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.behaviour.commands import TOY, alike, qat, settings, succeed
from benchmarks.behaviour.project import ROOT, VERSION, has_library, kernels_in_use
from benchmarks.behaviour.values import Values, digest, tensors_digest, timeless

#: Settings of runs with 3 epochs of 4 steps, which save their state after every third step.
SMALL: Final = (*TOY, "schedule.epochs=3", "schedule.save_steps=3", "data.batch_size=320", "output.dir=new")
TUNED: Final = (*SMALL, "model.checkpoint=float.safetensors", "schedule.calibration_batches=2")
#: Settings of each run by its name, which begins with the command.
TASKS: Final[Mapping[str, tuple[str, ...]]] = {
    "pretrain": SMALL,
    "pretrain, mixed and averaged": (
        *(*SMALL, "data.batch_size=107", "schedule.accumulate=3", "schedule.ema=0.9"),
        *("loss.label_smoothing=0.1", "schedule.reestimate_batch_norm=2", "precision=bfloat16"),
        "data.augment={pad: 1, flip: true, mixup: 0.8, cutmix: 1.0, erasing: 0.3}",
    ),
    "finetune": (
        *(*TUNED, "schedule.freeze_observers=0.6", "schedule.freeze_batch_norm=0.4"),
        *("schedule.reestimate_batch_norm=2", "quantization.se.observer=minmax"),
        *("optimizer.weight_decay=0.01", "optimizer.clip_norm=5.0", "schedule.freeze_binary=false"),
    ),
    "finetune, learned scales": (
        *(*TUNED, "quantization.backend=brevitas", "output.float_weights=float16", "optimizer.name=sgd"),
    ),
}


def environment() -> Values:
    """What the numbers depend on besides the code: packages and instruction sets.

    Ends the program if the imported code is that of another checkout, or the version was not replaced.
    """
    if Path(__file__).resolve().parents[2] != ROOT:
        raise SystemExit(f"the package is imported from {ROOT}: use the environment of this checkout")
    shown = qat("--version").stdout.split()[-1]
    if shown != VERSION:
        raise SystemExit(f"the package calls itself {shown}: its version was taken over before it was set")
    packages = ("torch", "numpy", "onnx", "onnxruntime", "safetensors", "pillow", "pyarrow", "scikit-learn")
    return {
        **{name: version(name) for name in packages},
        "brevitas": version("brevitas") if find_spec("brevitas") else "not installed",
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "oneDNN's instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", "the best"),
        "native kernels": kernels_in_use() if has_library() else "not built",
    }


def outcome(run: Path) -> Values:
    """Digests of the files of a run; metrics and summary without times, saved states by their content."""
    found: Values = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        if path.suffix == ".jsonl":
            found[path.name] = [timeless(json.loads(row)) for row in path.read_text("utf-8").splitlines()]
        elif path.name == "summary.json":
            found[path.name] = timeless(json.loads(path.read_text("utf-8")))
        elif path.suffix in (".json", ".yaml"):
            found[path.name] = digest(alike(path.read_text("utf-8")))
        elif path.parent.name == "state" and path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                (text,) = (value for key, value in file.metadata().items() if key != "sha256")
                tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
                found[path.name] = {"tensors": tensors_digest(tensors)}
            found[path.name]["rest"] = digest(json.dumps(timeless(json.loads(text))))
        elif path.suffix == ".safetensors":
            found[path.name] = digest(path.read_bytes())
    return found


def runs() -> Values:
    """Each task, run as a whole, and stopped by SIGTERM after 5 steps and resumed. The whole runs stay."""
    found: Values = {}
    for name, overrides in TASKS.items():
        if "learned" in name and not find_spec("brevitas"):
            continue
        command = (name.partition(",")[0], *settings(overrides))
        succeed(*command)
        (run,) = Path("new").iterdir()
        whole = run.rename(name)
        if name == "pretrain":
            shutil.copy(whole / "best.safetensors", "float.safetensors")
        steps: list[object] = []

        def stop(optimizer: object, *_: object, steps: list[object] = steps) -> None:
            steps.append(optimizer)
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        hook = register_optimizer_step_post_hook(stop)
        code = qat(*command).exit_code
        hook.remove()
        (run,) = Path("new").iterdir()
        found[name] = {"whole": outcome(whole), "exit code": code, "stopped": outcome(run)}
        succeed(command[0], "--resume", run)
        found[name]["resumed"] = outcome(run)
        shutil.rmtree(run)
    return found
