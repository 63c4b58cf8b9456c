"""Compare choices of quantization by accuracy, speed and size: one fine-tuning per choice, as a table.

    python -m benchmarks.quantizers --recipe tiny_int8_cifar10 [--images N] [--row NAME …] [--set KEY=VALUE …]

Every row is the recipe with some keys changed, trained from the same checkpoint on the same images in the
same order. Results are written to OUT/results.jsonl row by row. A row that is there already is not run again,
so that a sweep can be stopped and continued. The columns are top-1 on the test images after calibration,
after the last epoch and of the best checkpoint; images per second of the training steps; megabytes of the
weights, each at its bits; and whether the network can be exported as integers. The settings of a row are
those of its name (see ``--list``) and those of ``--set``. All rows in OUT must have the same recipe,
``--set`` and ``--images``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.cli.progress import ConsoleReporter
from qat.commands.lowering import build_and_lower
from qat.data.paths import cifar10_folder, found_root, parquet_files
from qat.errors import QatError, QuantizationError
from qat.models.operation_count import operations
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Data
from qat.system.files import write_atomically
from qat.train.finetuning import finetune

RESULTS: Final = "results.jsonl"
#: Settings of each row, by its name; the first is the unchanged recipe.
ROWS: Final[Mapping[str, Sequence[str]]] = {
    "the recipe": [],
    "trunk by moving average": ["quantization.trunk.observer=moving_average"],
    "trunk by percentile 99.9": [
        "quantization.trunk.observer=percentile",
        "quantization.trunk.percentile=99.9",
    ],
    "trunk by histogram": ["quantization.trunk.observer=histogram"],
    "learned scales (brevitas)": ["quantization.backend=brevitas"],
    "powers of two": ["quantization.power_of_two=true"],
    "learned powers of two": ["quantization.backend=brevitas", "quantization.power_of_two=true"],
    "SE W4A8": ["quantization.se.weight_bits=4"],
    "SE W4A4": ["quantization.se.weight_bits=4", "quantization.se.activation_bits=4"],
    "stem, SE, classifier W4": [
        "quantization.stem.weight_bits=4",
        "quantization.se.weight_bits=4",
        "quantization.classifier.weight_bits=4",
    ],
    "SE W4A4, learned scales": [
        "quantization.backend=brevitas",
        "quantization.se.weight_bits=4",
        "quantization.se.activation_bits=4",
    ],
    "trunk 6 bits": ["quantization.trunk.activation_bits=6"],
    "trunk 6 bits, learned scales": [
        "quantization.backend=brevitas",
        "quantization.trunk.activation_bits=6",
    ],
    "trunk 5 bits, learned scales": [
        "quantization.backend=brevitas",
        "quantization.trunk.activation_bits=5",
    ],
    "trunk 16 bits": ["quantization.trunk.activation_bits=16"],
    "trunk float (paper)": ["quantization.trunk.enabled=false"],
    "batch statistics, then estimated anew": [
        "schedule.freeze_batch_norm=0.5",
        "schedule.reestimate_batch_norm=40",
    ],
    "statistics estimated anew": ["schedule.reestimate_batch_norm=40"],
    "binary weights trained, latents ±1": ["schedule.freeze_binary=false", "optimizer.binary_lr=2e-4"],
    "binary weights trained, latents ±0.01": [
        "schedule.freeze_binary=false",
        "optimizer.binary_lr=2e-4",
        "model.latent=0.01",
    ],
    "without a teacher": ["distillation.teacher=none"],
    "the teacher's answers alone": ["distillation.weight=1.0"],
}


@contextmanager
def subset(data: Data, count: int | None) -> Iterator[list[str]]:
    """Overrides that reduce a Parquet data set to ``count`` random training images; none if it is ``None``.

    The images are in a temporary folder, which is deleted when the block ends.
    """
    if count is None:
        yield []
        return
    if data.dataset not in ("cifar10", "parquet"):
        raise QatError(f"--images goes with data.dataset 'cifar10' and 'parquet', found {data.dataset!r}")
    folder = cifar10_folder(data) if data.dataset == "cifar10" else found_root(data)
    if folder is None:
        raise QatError("--images needs Parquet files on this machine (data.root, QAT_DATA)")
    tables = [pq.read_table(file) for file in parquet_files(folder, data.train_split, "data.train_split")]
    table = pa.concat_tables(tables)
    if not 0 < count <= len(table):
        raise QatError(f"--images {count}: allowed with these files: 1 to {len(table)}")
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:count])
    with TemporaryDirectory(prefix="qat-images-") as name:
        made = Path(name)
        pq.write_table(table.take(chosen), made / f"{data.train_split}.parquet")
        for file in parquet_files(folder, data.evaluated_split, "data.test_split"):
            shutil.copyfile(file, made / file.name)
        yield [f"data.root={made}"]


def megabytes(checkpoint: Checkpoint, points: Mapping[str, Mapping[str, object]]) -> float:
    """Size of all weights in megabytes, each at its bits: 1 if binary, those of ``points``, or 32."""
    bits = 0
    for layer in operations(checkpoint.architecture, 32).layers:
        if layer.binary:
            bits += layer.weights
            continue
        # The stem's quantizer belongs to the stem itself, not to its convolution, as in other layers.
        point = points.get(f"{layer.name.removesuffix('.conv1')}.weight_quantizer")
        bits += layer.weights * (32 if point is None else int(str(point["type"]).removeprefix("int")))
    return bits / 8e6


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one per line; none if there is no file.

    A last line without a newline is left out: the sweep was killed while it wrote.
    """
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def results_of(file: Path, sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in ``file``.

    Raises:
        QatError: the file is damaged, or a row has other settings than ``sweep``.
    """
    try:
        done = lines_of(file)
        other = next((one["sweep"] for one in done if one["sweep"] != sweep), None)
    except (ValueError, TypeError, KeyError) as error:
        raise QatError(f"{file}: not results of this benchmark; name another --out") from error
    if other is not None:
        raise QatError(f"{file}: has rows of {other}, asked for are {dict(sweep)}; name another --out")
    if done:  # write without an incomplete last line, so that the next row begins a new one
        write_atomically(file, "".join(json.dumps(one) + "\n" for one in done))
    return done


def measure(name: str, recipe: str, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Fine-tune the recipe of one row; returns the row's results."""
    run = finetune(load_recipe(recipe, overrides), ConsoleReporter(console))
    summary = run.summary()
    epochs = lines_of(run.path / "metrics.jsonl")  # empty if the network was only calibrated
    checkpoint = load_checkpoint(run.best)
    assert checkpoint.recipe is not None
    try:
        build_and_lower(checkpoint, checkpoint.recipe.data)
        exports = True
    except QuantizationError:
        exports = False
    return {
        "row": name,
        "settings": list(ROWS[name]),
        "float": summary["float"]["top1"],
        "calibrated": summary["calibrated"]["top1"],
        "trained": epochs[-1]["test_top1"] if epochs else summary["calibrated"]["top1"],
        "tuned": summary["int8"]["top1"],
        "images": summary["int8"]["n"],
        "images_per_second": sum(e["images_per_second"] for e in epochs) / max(len(epochs), 1),
        "seconds": summary["seconds"],
        "megabytes": megabytes(
            checkpoint, json.loads((run.path / "quantization.json").read_text(encoding="utf-8"))
        ),
        "exports": exports,
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| | calibrated | trained | best | against float | images/s | MB | integer export |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['row']} | {one['calibrated']:.2f} | {one['trained']:.2f} | {one['tuned']:.2f} "
        f"| {one['tuned'] - one['float']:+.2f} "
        f"| {one['images_per_second']:.0f} | {one['megabytes']:.2f} | {'yes' if one['exports'] else 'no'} |"
        for one in results
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description="what each choice of quantization gives and costs")
    parser.add_argument("--recipe", default="tiny_int8_cifar10", help="of the fine-tuning")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--images", type=int, help="random training images to use; all by default")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="only these rows")
    parser.add_argument("--list", action="store_true", help="show the rows and their settings, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    options = parser.parse_args()
    if options.list:
        for name, overrides in ROWS.items():
            print(f"{name}: {' '.join(overrides) or '(as it is)'}")
        return
    sweep = {"recipe": options.recipe, "set": options.set, "images": options.images}
    console, file = Console(), options.out / RESULTS
    try:
        if any(one.startswith("output.dir=") for one in options.set):
            raise QatError("--set output.dir: each row writes below --out")
        options.out.mkdir(parents=True, exist_ok=True)
        done = results_of(file, sweep)
        with subset(load_recipe(options.recipe, options.set).recipe.data, options.images) as images:
            for name in options.row or ROWS:
                if any(one["row"] == name for one in done):
                    continue
                console.rule(name)
                settings = [*options.set, *images, *ROWS[name], f"output.dir={options.out / 'runs'}"]
                result = measure(name, options.recipe, settings, console) | {"sweep": sweep}
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(result) + "\n")
                done.append(result)
    except (QatError, OSError, pa.ArrowException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code if isinstance(error, QatError) else 2) from error
    except KeyboardInterrupt as error:
        print("interrupted; the same command goes on with the next row", file=sys.stderr)
        raise SystemExit(130) from error
    print(table(done))
    print(json.dumps({one["row"]: one["tuned"] for one in done}))


if __name__ == "__main__":
    main()
