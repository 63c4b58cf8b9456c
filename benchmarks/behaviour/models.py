"""The parts of a record on exported models, verdicts and findings, of a toy and of the shipped networks.

All but the shipped networks use the runs that :func:`benchmarks.behaviour.runs.runs` leaves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from benchmarks.behaviour.commands import TOY, alike, qat, settings, succeed
from benchmarks.behaviour.project import finetune, has_library, load_recipe
from benchmarks.behaviour.runs import outcome
from benchmarks.behaviour.values import Values, digest, timeless

#: Options of `qat export` for each form of a model.
TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    "portable": (),
    "native": ("--target", "native"),
    "strict": ("--strict-onnx",),
    "float32": ("--float32",),
}
MORE_TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    **TARGETS,
    "pixels": ("--input", "uint8", "--layout", "NHWC", "--image-size", "17"),
    "native pixels": ("--target", "native", "--input", "uint8"),
    "with integers": ("--integer-network", "integers.safetensors", "--layers"),
}


def exported(run: Path, targets: Mapping[str, tuple[str, ...]]) -> Values:
    """Export ``run`` to ``targets``; digests of the models, which stay as TARGET.onnx, and of the output."""
    found: Values = {}
    for name, options in targets.items():
        if has_library() or "native" not in options:
            said = succeed("export", "--onnx", f"{name}.onnx", "--run", run, *options)
            found[name] = {"bytes": digest(Path(f"{name}.onnx").read_bytes()), "printed": digest(said)}
    return found


def described(model: Path | str, *commands: tuple[str, ...]) -> Values:
    """Digest of the JSON that each command prints about a file or a run."""
    found: Values = {}
    for command, *options in commands:
        content = timeless(json.loads(succeed(command, model, "--json", *options)))
        found[command] = digest(json.dumps(content))
    return found


def models() -> Values:
    """Digests of the exports of the toy's runs, of what commands print about them, and of the report."""
    run, learned = Path("finetune"), Path("finetune, learned scales")
    inspect, evaluate, verify = ("inspect",), ("evaluate",), ("verify", "--run", str(run))
    found: Values = {"exported": exported(run, MORE_TARGETS)}
    for name in found["exported"]:
        told = (inspect, evaluate) if name == "float32" else (inspect, evaluate, verify)
        found[name] = described(f"{name}.onnx", *told)
    found |= {str(path): described(path, inspect, evaluate) for path in (run, Path("float.safetensors"))}
    found["integers.safetensors"] = described("integers.safetensors", inspect)
    found["integers.safetensors"]["bytes"] = digest(Path("integers.safetensors").read_bytes())
    if learned.is_dir():
        found["learned scales"] = exported(learned, {"of learned scales": ()})
    found["report"] = _report(run)
    return found


def _report(run: Path) -> str:
    """Digest of the report on ``run``, without times and folders."""
    copy = Path(shutil.copytree(run, "reported"))
    for path in copy.glob("*.yaml"):
        path.write_text(alike(path.read_text("utf-8")), "utf-8")
    for path in (copy / "summary.json", copy / "metrics.jsonl"):
        rows = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        path.write_text("".join(json.dumps(timeless(json.loads(row))) + "\n" for row in rows), "utf-8")
    succeed("report", copy, "-o", "report.html")
    return digest(Path("report.html").read_bytes())


def gate() -> Values:
    """Verdicts of the gate on the portable toy model, with baselines whose answers were changed."""
    succeed("gate", "record", "portable.onnx", "-o", "baseline.json")
    recorded = json.loads(Path("baseline.json").read_text("utf-8"))
    found: Values = {"baseline": digest(json.dumps(timeless(recorded)))}
    rules = (
        (),
        ("--max-drop", 0.2, "--confidence", 0.9, "--floor", 1),
        ("--on-inconclusive", "pass"),
        ("--on-inconclusive", "fail"),
    )
    for lost, gained in ((0, 0), (0, 2), (3, 0), (8, 8), (14, 1), (60, 0), (0, 40)):
        Path("changed.json").write_text(json.dumps(_with_answers(recorded, lost, gained)), "utf-8")
        for options in rules:
            result = qat("gate", "portable.onnx", "--baseline", "changed.json", "--json", *options)
            given = " ".join(map(str, options)) or "by default"
            found[f"{lost} lost, {gained} gained, {given}"] = {
                "exit code": result.exit_code,
                **json.loads(result.stdout),
            }
    return found


def _with_answers(recorded: Mapping[str, Any], lost: int, gained: int) -> Values:
    """A copy of a baseline that has ``lost`` images right which the model has wrong, and ``gained`` wrong
    which the model has right.
    """
    lines = recorded["correct"]
    bits = list("".join(f"{int(line, 16):0{4 * len(line)}b}" for line in lines))
    images = recorded["images"]
    for old, new, count in (("0", "1", lost), ("1", "0", gained)):
        changed = [index for index, bit in enumerate(bits[:images]) if bit == old][:count]
        for index in changed:
            bits[index] = "-" if new == "1" else new
    bits = ["1" if bit == "-" else bit for bit in bits]
    rows = ["".join(bits[start : start + 256]) for start in range(0, len(bits), 256)]
    return {
        **recorded,
        "recorded": "2026-01-02T03:04:05Z",
        "model": recorded["model"] | {"sha256": "a" * 64},
        "correct": [f"{int(row, 2):0{len(row) // 4}x}" for row in rows],
        "top1": round(100 * bits.count("1") / images, 4),
        "top5": 100.0,
    }


def sensitivity() -> Values:
    """The findings of `qat sensitivity` on the toy network, and the recipe that it suggests."""
    toy = settings((*TOY, "model.checkpoint=float.safetensors", "schedule.calibration_batches=2"))
    questions = ("--images", 60, "--bits", "8,3", "--json", "--recipe-out", "suggested.yaml")
    content = timeless(json.loads(succeed("sensitivity", *toy, *questions)))
    found: Values = {name: digest(json.dumps(value)) for name, value in content.items() if name != "recipe"}
    found["suggested.yaml"] = digest(alike(Path("suggested.yaml").read_text("utf-8")))
    return found


class _Silent:
    """A reporter that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def _calibrated(recipe: str) -> Values:
    """Run a packaged recipe without epochs, that is calibration only: digests of the run and its exports."""
    overrides = ["schedule.epochs=0", "threads=1", "device=cpu", "output.dir=calibrated"]
    run = finetune(load_recipe(recipe, overrides), _Silent()).path
    found = {"run": outcome(run), "exported": exported(run, TARGETS)}
    shutil.rmtree("calibrated")
    return found


def digits() -> Values:
    """The digits network that comes with the package."""
    return _calibrated("tiny_int8")


def cifar10() -> Values:
    """The CIFAR-10 network that comes with the package, on the first images."""
    data = os.environ.get("QAT_DATA")
    if not data or not (Path(data) / "cifar10" / "test.parquet").is_file():
        return {"left out": "no $QAT_DATA/cifar10"}
    folder = Path("data", "cifar10")
    folder.mkdir(parents=True)
    for split, images in (("train", 1280), ("test", 200)):
        table = pq.read_table(Path(data) / "cifar10" / f"{split}.parquet")
        pq.write_table(table.slice(0, images), folder / f"{split}.parquet")
    os.environ["QAT_DATA"] = str(folder.parent.absolute())
    try:
        return _calibrated("tiny_int8_cifar10")
    finally:
        os.environ["QAT_DATA"] = data
