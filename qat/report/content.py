"""The page of the report: its key figures, and the values that its template is filled in with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch

from qat import __version__
from qat.checkpoints.format import Checkpoint
from qat.evaluation import percent, points
from qat.models.operation_count import operations
from qat.recipe.schema import Recipe
from qat.report.answers import Answers
from qat.report.costs import (
    Costs,
    latency,
    megabytes,
    millions,
    operations_figure,
    operations_table,
    size_table,
    weight_bits,
)
from qat.report.files import BENCH, RunFiles, mapping
from qat.report.layer_statistics import LayerStatistics
from qat.report.layers import group_table, layer_figures, layer_table
from qat.report.page import Tile, number, render
from qat.report.sections import (
    accuracy_figure,
    change_interval,
    comparison_table,
    confused_table,
    confusion_figure,
    curves,
    gallery,
    interval_text,
    verdict,
)


@dataclass(frozen=True)
class Measured:
    """What was computed for a report.

    Attributes:
        answers: answers of the network, and of the one that training started from, on the test images.
        layers: statistics of the layers of a quantized network.
        images: number of images that these statistics were measured on.
        quantization: name of the network's quantization, from
            :func:`qat.quantize.naming.quantization_name`; ``None`` for a float-rest network.
        notes: sentences on what could not be measured.
        device: device that computed all this.
    """

    answers: Answers
    layers: Sequence[LayerStatistics]
    images: int
    quantization: str | None
    notes: Sequence[str]
    device: torch.device


def report_page(files: RunFiles, recipe: Recipe, checkpoint: Checkpoint, measured: Measured) -> str:
    """The report on a run, as HTML."""
    answers, quantization = measured.answers, measured.quantization
    counted = operations(checkpoint.architecture, recipe.data.image_size)
    costs = Costs(counted, weight_bits(counted, checkpoint.quantization_map))
    notes = [*files.problems, *measured.notes]
    widths = sorted({one.bits for one in measured.layers if one.group != "binary"} - {8})
    if widths:
        notes.append(
            f"Some points have {', '.join(map(str, widths))} bits. Multiply-accumulates of weights of 2 to 8 "
            "bits are all counted like those of int8."
        )
    bench = None if files.bench is None else latency(files.bench)
    if files.bench is not None and bench is None:
        notes.append(f"{BENCH} is not what `qat bench --json` prints, and is left out.")
    before = answers.correct_before
    return render(
        "report.html",
        quantization=quantization,
        name=files.run.path.resolve().name,
        facts=_headline(files, checkpoint, recipe),
        notes=notes,
        verdict=verdict(answers, quantization),
        tiles=_tiles(answers, costs, quantization, files),
        accuracy=accuracy_figure(answers, files.summary, quantization),
        comparison=comparison_table(answers, quantization),
        curves=curves(files.metrics, None if before is None else 100 * before / answers.n),
        best_epoch=number(files.summary.get("best_epoch")),
        confusion=confusion_figure(answers),
        confused=confused_table(answers),
        changes=answers.changes,
        gallery=gallery(answers),
        layer_figures=layer_figures(measured.layers),
        groups=group_table(measured.layers),
        layers=layer_table(measured.layers),
        measured=measured.images,
        operations=operations_figure(costs, quantization),
        operations_table=operations_table(costs),
        sizes=size_table(costs, [files.run.best, files.model], quantization is not None),
        parameters=counted.parameters,
        latency=bench,
        recipe=files.recipe,
        origin=_origin(files, recipe, measured),
    )


def _headline(files: RunFiles, checkpoint: Checkpoint, recipe: Recipe) -> str:
    data = recipe.data
    source = data.dataset if data.root is None else f"{data.dataset} {data.root}"
    parts = [str(checkpoint.architecture), f"{source}, {data.image_size} × {data.image_size} pixels"]
    when = _date(number(files.summary.get("finished")))
    if when is not None:
        parts.append(f"finished\u00a0{when.day}\u00a0{when:%b}\u00a0{when.year}")
    return " · ".join(parts)


def _date(seconds: float | None) -> datetime | None:
    """The time ``seconds`` after 1970 began; None if that is beyond the calendar of Python."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):
        return None


def _tiles(answers: Answers, costs: Costs, quantization: str | None, files: RunFiles) -> list[Tile]:
    top1 = percent(100 * answers.correct / answers.n)
    interval = f"95 % confidence: {interval_text(answers.correct, answers.n)}"
    tiles = []
    if answers.pairs is not None and answers.correct_before is not None:
        before = percent(100 * answers.correct_before / answers.n)
        about = f"95 % confidence: {interval_text(answers.correct_before, answers.n)}"
        tiles.append(Tile("Float-rest top-1", before, about))
    tiles.append(Tile("Top-1" if quantization is None else f"{quantization} top-1", top1, interval))
    if answers.pairs is not None:
        low, high = change_interval(answers.pairs)
        # Coloured only if the 95 % confidence interval excludes 0.
        tone: Literal["", "good", "bad"] = "good" if low > 0 else "bad" if high < 0 else ""
        about = f"95 % confidence: {points(100 * low)} to {points(100 * high)}"
        tiles.append(Tile("Change in points", points(100 * answers.pairs.change), about, tone))
    if (last := _final_tile(files)) is not None:
        tiles.append(last)
    full = costs.operations.parameters.float32_bytes
    tiles.append(
        Tile("Parameters", megabytes(costs.bytes), f"{full / costs.bytes:.1f}× smaller than in float32")
    )
    if files.model.is_file():
        tiles.append(Tile("model.onnx", megabytes(files.model.stat().st_size), "exported integer graph"))
    about = f"{millions(costs.operations.bops)} BOPs / 64"
    if quantization is not None:
        about = f"{millions(costs.operations.float_rest_ops)} before quantization"
    tiles.append(Tile("OPs per image", millions(costs.ops()), about))
    return tiles


def _final_tile(files: RunFiles) -> Tile | None:
    """The accuracy on images that no epoch was chosen on, where the run measured it."""
    final = mapping(files.summary.get("final"))
    top1, n = number(final.get("top1")), number(final.get("n"))
    if top1 is None or not 0 <= top1 <= 100 or n is None or n < 1:
        return None
    split = mapping(files.summary.get("measured_on")).get("final", "the final split")
    interval = interval_text(round(top1 * n / 100), round(n))
    return Tile(
        f"Top-1 on {split}",
        percent(top1),
        f"{n:.0f} images that no epoch was chosen on; 95 % confidence: {interval}",
    )


def _origin(files: RunFiles, recipe: Recipe, measured: Measured) -> list[tuple[str, Any]]:
    """Names and values of the section on the run's origin: seed, files, fingerprints, versions, device."""
    facts: list[tuple[str, Any]] = [("Task", recipe.task), ("Seed", recipe.seed)]
    if recipe.model.checkpoint is not None:
        facts.append(("Started from", recipe.model.checkpoint))
    if recipe.model.classifier == "new":
        facts.append(("Classifier", f"new, for {recipe.model.num_classes} classes"))
    if recipe.schedule.float_epochs:
        facts.append(("Trained in float before quantization", f"{recipe.schedule.float_epochs} epochs"))
    if files.pretrained_sha256 is not None:
        facts.append(("SHA-256 of that file", files.pretrained_sha256))
    names = {"train": "Training images, SHA-256", "test": "Test images, SHA-256"}
    facts += [(name, files.data[key]) for key, name in names.items() if key in files.data]
    versions = mapping(files.summary.get("versions"))
    if versions:
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    seconds = number(files.summary.get("seconds"))
    if seconds is not None:
        facts.append(("Training time", f"{seconds:,.0f} s"))
    device = measured.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts.append(("This report", f"bnext-qat {__version__}, torch {torch.__version__}, on the {where}"))
    return facts
