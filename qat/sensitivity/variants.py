"""Quantized variants of a float-rest network, each compared with that network on the same images.

A variant is the float-rest network with other parts quantized. Its quantizers have the grids of the fully
quantized network, which is calibrated once. So variants differ in what is quantized, and in nothing else.
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

#: State of the quantizers of a calibrated network: their part of its state dict.
QuantizerState = Mapping[str, Tensor]


class Watcher(Protocol):
    """Receives the progress of a measurement, to show it."""

    def expect(self, steps: int) -> None:
        """Called before ``steps`` more variants are measured; negative if fewer are left than announced."""

    def done(self, what: str) -> None:
        """Called after one variant, described by ``what``, was measured."""


@dataclass(frozen=True)
class Measure:
    """A variant compared with the float-rest network on the same images.

    Attributes:
        top1: percent of the images that the variant has right.
        changed: number of images that the variant puts into another class than the float-rest network.
        sqnr: signal-to-quantization-noise ratio of the logits in dB, see :func:`signal_to_noise`.
    """

    top1: float
    changed: int
    sqnr: float


def signal_to_noise(reference: Tensor, logits: Tensor) -> float:
    """Signal-to-quantization-noise ratio (SQNR) of logits: ``10 · log10(Σ z² / Σ (z − ẑ)²)`` in dB.

    The mean over the classes is subtracted from the logits of each image first: adding a number to all logits
    of an image changes no answer, so it counts neither as signal nor as noise.

    Args:
        reference: logits z of the float-rest network, (N, classes).
        logits: logits ẑ of a quantized network, same shape.

    Returns:
        The ratio in dB; infinity if both are equal.
    """
    z, found = ((x - x.mean(dim=1, keepdim=True)) for x in (reference.double(), logits.double()))
    signal, noise = float(z.square().sum()), float((z - found).square().sum())
    if not noise:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf


class Variants:
    """Makes quantized variants of one float-rest network and measures each on the same images.

    Args:
        model: the float-rest network, on the device to work on; it is put into evaluation mode.
        recipe: says how images are normalized and batched, and how variants are calibrated.
        train: split to calibrate on.
        images: test images, uint8 (N, 3, H, W).
        labels: their classes, (N,).

    Raises:
        CheckpointError: the float-rest network's logits are not finite.
    """

    def __init__(self, model: BNext, recipe: Recipe, train: Split, images: Tensor, labels: Tensor) -> None:
        self.model, self.recipe, self.train = model.eval(), recipe, train
        self.images, self.labels = images, labels
        self._reference = self._logits(model)
        if not bool(self._reference.isfinite().all()):
            raise CheckpointError("the float-rest network answers with logits that are not finite")

    def build(self, quantization: Quantization, state: QuantizerState | None = None) -> BNext:
        """Make a variant, which shares the float-rest network's parameters.

        Args:
            quantization: what is quantized, and how.
            state: state for the variant's quantizers; without it they are not calibrated.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        variant = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        data = self.recipe.data
        prepare(variant, quantization, image_grid(data.mean, data.std))
        if state is not None:
            own = quantizer_state(variant, self.model)
            variant.load_state_dict({key: state[key] for key in own}, strict=False)
        return variant

    def calibrated(self, quantization: Quantization) -> BNext:
        """Make a variant and calibrate it, as `qat finetune` does before it trains."""
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
        """The same with ``count`` of the images, evenly spaced; with all of them if there are no more."""
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


def quantizer_state(model: BNext, float_rest: BNext) -> dict[str, Tensor]:
    """State of the quantizers of a prepared network: what the float-rest network's state dict lacks."""
    known = float_rest.state_dict().keys()
    return {key: value for key, value in model.state_dict().items() if key not in known}


def difference(decibels: float, reference: float) -> float:
    """``decibels − reference``; 0 if both are the same infinity, where the subtraction would give NaN."""
    return 0.0 if decibels == reference else decibels - reference
