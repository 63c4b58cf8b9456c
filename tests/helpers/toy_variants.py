"""Quantized variants of a toy network, for the tests of what quantization costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from qat.data.split import MemorySplit
from qat.evaluation import predictor
from qat.models.bnext import BNext
from qat.recipe.schema import Quantization
from qat.sensitivity.bitwidths import Limits, Width, measure_widths, settings_of
from qat.sensitivity.parts import GROUPS
from qat.sensitivity.suggestion import Candidate, Suggestion, suggest
from qat.sensitivity.variants import Measure, QuantizerState, Variants, quantizer_state
from tests.helpers import toy_runs as toyruns
from tests.helpers.toy_networks import build_float_toy

FULL = Quantization()
SETTINGS = settings_of(FULL, GROUPS)
ANYTHING = Limits(100.0, 1000.0)


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
    """Variants of a toy network, with random images whose labels are the float-rest network's answers."""
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


@dataclasses.dataclass
class Study:
    """A toy network, measured with the section ``FULL`` and with fewer bits."""

    variants: Variants
    state: QuantizerState
    float_rest: Measure
    recipe: Measure
    widths: list[Width]

    def suggest(
        self, limits: Limits, candidates: tuple[Candidate, ...] = (), widths: list[Width] | None = None
    ) -> Suggestion:
        chosen = [judged(one, limits) for one in (self.widths if widths is None else widths)]
        return suggest(
            self.variants, self.float_rest, self.recipe, FULL, chosen, candidates, limits, Counter()
        )


def judged(width: Width, limits: Limits) -> Width:
    within = width.loss <= limits.tolerance and width.drop <= limits.noise_budget
    return dataclasses.replace(width, within=within)


def make_study() -> Study:
    """A toy of three stages, each setting tried at 4 and 2 bits."""
    variants = make_variants(build_float_toy(widths=(8, 8, 16)))
    full = variants.calibrated(FULL)
    state, recipe = quantizer_state(full, variants.model), variants.measure(full)
    widths = measure_widths(variants, recipe, FULL, state, SETTINGS, (4, 2), ANYTHING, Counter())
    return Study(variants, state, variants.measure(variants.model), recipe, widths)
