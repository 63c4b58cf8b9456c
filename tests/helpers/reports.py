"""Reports on given answers and layers, without a network and without images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qat.checkpoints.format import Checkpoint
from qat.models.bnext import Architecture
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Quantization
from qat.report.answers import Answers, ChangedImage
from qat.report.content import Measured, report_page
from qat.report.files import RunFiles
from qat.report.layer_statistics import LayerStatistics
from qat.runs import RunDirectory

DIGITS = tuple("0123456789")


def answers(
    labels: Sequence[int],
    after: Sequence[int],
    before: Sequence[int] | None = None,
    names: Sequence[str] = DIGITS,
    side: int = 8,
) -> Answers:
    """Answers whose changed images are noise of ``side`` pixels."""
    random = torch.Generator().manual_seed(0)
    changed = [
        ChangedImage(
            index,
            torch.randint(0, 256, (3, side, side), generator=random, dtype=torch.uint8),
            label,
            was,
            now,
        )
        for index, (label, was, now) in enumerate(zip(labels, before or after, after, strict=True))
        if was != now
    ]
    tensors = [torch.tensor(one) if one is not None else None for one in (labels, after, before)]
    assert tensors[0] is not None
    assert tensors[1] is not None
    return Answers(names, tensors[0], tensors[1], tensors[2], changed)


def layer(name: str, **changes: Any) -> LayerStatistics:
    """Statistics of a point of the trunk, with ``changes``."""
    fields: dict[str, Any] = {
        "name": name,
        "group": "trunk",
        "weights": False,
        "type": "int8",
        "bits": 8,
        "scale_min": 0.02,
        "scale_max": 0.02,
        "low": -2.5,
        "high": 2.5,
        "count": 1000,
        "clipped": 0.001,
        "sqnr": 40.0,
    }
    return LayerStatistics(**fields | changes)


def binary_layer(name: str, **changes: Any) -> LayerStatistics:
    """Statistics of a binary convolution, with ``changes``."""
    fields: dict[str, Any] = {
        "group": "binary",
        "type": "1 bit",
        "bits": 1,
        "scale_min": 1.0,
        "scale_max": 1.0,
        "clipped": None,
        "sqnr": None,
        "exact": 1.0,
        "flipped": 0.25,
        "positive": 0.5,
    }
    return layer(name, **fields | changes)


def page(
    folder: Path,
    found: Answers,
    layers: Sequence[LayerStatistics] = (),
    *,
    quantization: str | None = "int8",
    size: str = "tiny",
    **texts: Any,
) -> str:
    """The report on a run in ``folder``; ``texts`` are fields of :class:`RunFiles`."""
    architecture = Architecture.of(size, len(found.class_names))
    checkpoint = Checkpoint(architecture, {}, quantization=Quantization() if quantization else None)
    fields: dict[str, Any] = {"summary": {}, "metrics": [], "bench": None, "recipe": "", "problems": []}
    files = RunFiles(RunDirectory(folder), **fields | texts)
    measured = Measured(found, layers, 256, quantization, [], torch.device("cpu"))
    return report_page(files, load_recipe("tiny_int8").recipe, checkpoint, measured)
