"""Quantized variants of a float-rest network, each compared with it on the same images.

A variant is the float-rest network, prepared with other groups or globs. Its grids are those of the fully
quantized network, which is calibrated once: variants differ in what is quantized, and in nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qat.data.augment import normalize
from qat.data.split import Split
from qat.errors import CheckpointError
from qat.evaluation import accuracy_of, predictor
from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization, Recipe
from qat.train.setup import calibration_pass

#: State of the quantizers of a calibrated network, by key of its state dict.
Grids = Mapping[str, Tensor]


class Watcher(Protocol):
    """Whoever watches the measuring."""

    def expect(self, steps: int) -> None:
        """So many more variants will be measured."""

    def done(self, what: str) -> None:
        """One variant is measured."""


@dataclass(frozen=True)
class Measure:
    """A variant against the float-rest network, on the same images.

    Attributes:
        top1: percent of the images.
        changed: images whose answer is not the float-rest network's.
        sqnr: signal to quantization noise of the logits in dB, see :func:`signal_to_noise`.
    """

    top1: float
    changed: int
    sqnr: float


def signal_to_noise(reference: Tensor, logits: Tensor) -> float:
    """``10 · log10(Σ z² / Σ (z − ẑ)²)`` in dB, of logits less their mean over the classes.

    A shift of all logits of an image changes no answer, so it counts neither as signal nor as noise.

    Args:
        reference: z, (N, classes).
        logits: ẑ, same shape.

    Returns:
        Infinity where both are equal.
    """
    z, found = ((x - x.mean(dim=1, keepdim=True)) for x in (reference.double(), logits.double()))
    signal, noise = float(z.square().sum()), float((z - found).square().sum())
    if not noise:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf


class Variants:
    """Makes quantized variants of one float-rest network and measures each on the same images.

    Args:
        model: float-rest, on the device to work on; it is put into evaluation mode and not changed.
        recipe: says how images are normalized and batched, and how variants are calibrated.
        train: split to calibrate on.
        images: uint8 (N, 3, H, W).
        labels: (N,).

    Raises:
        CheckpointError: the float-rest network's logits are not finite.
    """

    def __init__(self, model: BNext, recipe: Recipe, train: Split, images: Tensor, labels: Tensor) -> None:
        self.model, self.recipe, self.train = model.eval(), recipe, train
        self.images, self.labels = images, labels
        self._reference = self._logits(model)
        if not bool(self._reference.isfinite().all()):
            raise CheckpointError("the float-rest network answers with logits that are not finite")

    def build(self, quantization: Quantization, grids: Grids | None = None) -> BNext:
        """A variant, which shares the float-rest network's parameters.

        Its points take their grids from ``grids``; without it they have none yet.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        variant = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        data = self.recipe.data
        prepare(variant, quantization, image_grid(data.mean, data.std))
        if grids is not None:
            own = grids_of(variant, self.model)
            variant.load_state_dict({key: grids[key] for key in own}, strict=False)
        return variant

    def calibrated(self, quantization: Quantization) -> BNext:
        """A variant with grids of its own: what `qat finetune` starts its training with."""
        variant = self.build(quantization)
        if any(True for _ in activation_quantizers(variant)):  # weights alone need no calibration
            device = next(variant.parameters()).device
            calibrate(variant, lambda: calibration_pass(variant, self.train, self.recipe, device))
        return variant

    def measure(self, model: BNext) -> Measure:
        """Compare ``model`` with the float-rest network."""
        logits = self._logits(model)
        changed = int((logits.argmax(dim=1) != self._reference.argmax(dim=1)).sum())
        top1 = accuracy_of(logits, self.labels).top1
        return Measure(top1, changed, signal_to_noise(self._reference, logits))

    def fewer(self, count: int) -> Variants:
        """The same with ``count`` of the images, evenly spaced; itself where there are no more than that."""
        if count >= len(self.labels):
            return self
        chosen = torch.arange(count) * len(self.labels) // count
        return Variants(self.model, self.recipe, self.train, self.images[chosen], self.labels[chosen])

    def _logits(self, model: BNext) -> Tensor:
        predict, data = predictor(model), self.recipe.data
        device = next(model.parameters()).device
        rows = []
        for start in range(0, len(self.images), data.eval_batch_size):
            images = self.images[start : start + data.eval_batch_size].to(device)
            rows.append(predict(normalize(images, data.mean, data.std)).float().cpu())
        return torch.cat(rows)


def grids_of(model: BNext, float_rest: BNext) -> dict[str, Tensor]:
    """What the state of a prepared network has beyond its float-rest network's: the state of quantizers."""
    known = float_rest.state_dict().keys()
    return {key: value for key, value in model.state_dict().items() if key not in known}


def difference(decibels: float, reference: float) -> float:
    """``decibels − reference``, 0 where both are the same infinity."""
    return 0.0 if decibels == reference else decibels - reference
