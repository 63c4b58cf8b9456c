"""Quantized variants of a toy network, for the tests of what quantization costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import toyruns

from qat.bnext import BNext
from qat.data import MemorySplit
from qat.evaluate import predictor
from qat.recipe import Quantization
from qat.sensitivity import Variants

FULL = Quantization()


class Counter:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.expected = 0
        self.names: list[str] = []

    def expect(self, steps: int) -> None:
        self.expected += steps

    def done(self, what: str) -> None:
        self.names.append(what)


def make_variants(model: BNext, count: int = 64) -> Variants:
    """Variants of a toy on random images, whose labels are the float-rest network's answers."""
    overrides = ("data.image_size=16", "schedule.calibration_batches=2", "data.batch_size=32")
    recipe = toyruns.recipe("tiny_int8", Path("runs"), *overrides).recipe
    random = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (64, 1, 16, 16), generator=random, dtype=torch.uint8)
    names = [str(label) for label in range(10)]
    train = MemorySplit(names, pixels, torch.zeros(64, dtype=torch.long))
    images, labels = train.evenly(count)
    answers = predictor(model)(images.float() / 255).argmax(dim=1)
    assert labels.shape == answers.shape
    return Variants(model, recipe, train, images, answers)


def layer_of(point: str, layers: Sequence[str]) -> str:
    """The innermost layer around a quantization point."""
    return max((name for name in layers if f"{point}.".startswith(f"{name}.")), key=len)
