"""What quantization costs, part by part: one group or layer alone, and all but one.

A variant is the float-rest network, prepared with other groups or globs. Its grids are those of the fully
quantized network, which is calibrated once: variants differ in what is quantized, and in nothing else.
"""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from qat.augment import image_grid
from qat.bnext import BNext
from qat.data import Split, normalize
from qat.errors import CheckpointError
from qat.evaluate import accuracy_of, predictor
from qat.fakequant import activation_quantizers
from qat.prepare import GroupName, calibrate, prepare, quantized_layers
from qat.recipe import Quantization, Recipe
from qat.train import calibration_pass

GROUPS: Final[tuple[GroupName, ...]] = ("stem", "se", "classifier", "trunk")

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


@dataclass(frozen=True)
class Part:
    """A group or a layer, and the two ways to ask what its quantization costs.

    Attributes:
        name: of the group, or of the module as globs know it.
        kind: which of them it is.
        group: the group, or that of the layer.
        alone: nothing but this part is quantized.
        left_out: everything that the recipe quantizes but this part.
    """

    name: str
    kind: Literal["group", "layer"]
    group: GroupName
    alone: Quantization
    left_out: Quantization


@dataclass(frozen=True)
class Sensitivity:
    """What the quantization of one part costs.

    Attributes:
        name, kind, group: see :class:`Part`.
        alone, left_out: both variants.
        loss: points of top-1 lost by quantizing this part alone.
        gain: points of top-1 gained by leaving it out of the fully quantized network.
        gain_db: dB of signal to noise gained by leaving it out.
    """

    name: str
    kind: Literal["group", "layer"]
    group: GroupName
    alone: Measure
    left_out: Measure
    loss: float
    gain: float
    gain_db: float


@dataclass(frozen=True)
class Ranks:
    """Places of one part among all of its kind; 1 costs most.

    Attributes:
        by_loss: by accuracy loss alone, then by noise.
        by_noise: by noise alone.
        by_gain: by accuracy gained where left out, then by noise.
        by_noise_gain: by noise where left out.
    """

    by_loss: int
    by_noise: int
    by_gain: int
    by_noise_gain: int


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

    def sensitivities(
        self, parts: Sequence[Part], full: Quantization, grids: Grids, watch: Watcher
    ) -> list[Sensitivity]:
        """Measure each part alone and left out, in the order of ``parts``.

        Args:
            parts: from :func:`parts_of`.
            full: what the recipe quantizes.
            grids: of the network quantized so.
            watch: told of each variant.
        """
        watch.expect(2 * len(parts) + 2)
        before = self.measure(self.model)
        watch.done("float rest")
        whole = self.measure(self.build(full, grids))
        watch.done("fully quantized")
        found = []
        for part in parts:
            alone = self.measure(self.build(part.alone, grids))
            watch.done(f"{part.name} alone")
            left_out = self.measure(self.build(part.left_out, grids))
            watch.done(f"all but {part.name}")
            loss, gain = before.top1 - alone.top1, left_out.top1 - whole.top1
            gain_db = difference(left_out.sqnr, whole.sqnr)
            found.append(Sensitivity(part.name, part.kind, part.group, alone, left_out, loss, gain, gain_db))
        return found

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


def parts_of(
    model: BNext, quantization: Quantization, kind: Literal["group", "layer"], groups: Sequence[GroupName]
) -> list[Part]:
    """The groups or layers to measure, in forward order.

    Args:
        model: float-rest.
        quantization: the recipe's.
        kind: groups or layers.
        groups: only these, or layers of these; what the recipe leaves in float is passed over.

    Raises:
        QuantizationError: a glob of the recipe matches nothing.
    """
    layers = quantized_layers(model, quantization)
    if kind == "group":
        present = [group for group in GROUPS if group in groups and group in layers.values()]
        return [
            Part(
                group,
                kind,
                group,
                _enabled(quantization, {group}),
                _enabled(quantization, {*GROUPS} - {group}),
            )
            for group in present
        ]
    chosen = {name: group for name, group in layers.items() if group in groups}
    return [
        Part(name, kind, group, _only(quantization, name), without(quantization, [name]))
        for name, group in chosen.items()
    ]


def without(quantization: Quantization, layers: Sequence[str]) -> Quantization:
    """The same with ``layers`` left in float."""
    exclude = [*quantization.exclude, *(glob.escape(name) for name in layers)]
    return quantization.model_copy(update={"exclude": exclude})


def ranks_of(found: Sequence[Sensitivity]) -> dict[str, Ranks]:
    """Ranks of each part by name. Equal figures keep the order of ``found``."""
    orders = (
        sorted(found, key=lambda one: (-one.loss, one.alone.sqnr)),
        sorted(found, key=lambda one: one.alone.sqnr),
        sorted(found, key=lambda one: (-one.gain, -one.gain_db)),
        sorted(found, key=lambda one: -one.gain_db),
    )
    places = [{one.name: place for place, one in enumerate(order, start=1)} for order in orders]
    return {one.name: Ranks(*(place[one.name] for place in places)) for one in found}


def _only(quantization: Quantization, layer: str) -> Quantization:
    return quantization.model_copy(update={"include": [glob.escape(layer)], "exclude": []})


def _enabled(quantization: Quantization, groups: set[GroupName]) -> Quantization:
    """The same with every group outside of ``groups`` in float."""
    off: dict[str, object] = {
        name: getattr(quantization, name).model_copy(update={"enabled": False})
        for name in GROUPS
        if name not in groups
    }
    return quantization.model_copy(update=off)
