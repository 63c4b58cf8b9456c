"""What the quantization of one part costs, measured with that part quantized alone and left out alone."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from qat.models.bnext import BNext
from qat.quantize.overrides import GroupName
from qat.quantize.preparation import quantized_layers
from qat.recipe.schema import Quantization
from qat.sensitivity.variants import Measure, QuantizerState, Variants, Watcher, difference

GROUPS: Final[tuple[GroupName, ...]] = ("stem", "se", "classifier", "trunk")


@dataclass(frozen=True)
class Part:
    """A group or a layer, with the two sections that show what its quantization costs.

    Attributes:
        name: name of the group, or of the layer's module as a recipe's globs match it.
        kind: whether it is a group or a layer.
        group: the group itself, or the group of the layer.
        alone: section that quantizes only this part.
        left_out: section that quantizes what the recipe does, except this part.
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
        alone, left_out: measures of the networks with these sections.
        loss: percentage points of top-1 lost by quantizing this part alone.
        gain: percentage points of top-1 gained by leaving it out of the fully quantized network.
        gain_db: dB of SQNR gained by leaving it out.
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
    """Ranks of one part among all of its kind, in four orders; rank 1 is the part that costs most.

    Attributes:
        by_loss: by the accuracy lost with this part quantized alone; equal losses by noise.
        by_noise: by the noise with this part quantized alone.
        by_gain: by the accuracy gained with this part left out; equal gains by dB gained.
        by_noise_gain: by the dB of SQNR gained with this part left out.
    """

    by_loss: int
    by_noise: int
    by_gain: int
    by_noise_gain: int


def parts_of(
    model: BNext, quantization: Quantization, kind: Literal["group", "layer"], groups: Sequence[GroupName]
) -> list[Part]:
    """The groups or layers to measure, in forward order.

    Args:
        model: the float-rest network.
        quantization: the recipe's section.
        kind: whether to return groups or layers.
        groups: groups to return, or to return the layers of; what the recipe leaves in float is skipped.

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


def measure_parts(
    variants: Variants, parts: Sequence[Part], full: Quantization, state: QuantizerState, watch: Watcher
) -> list[Sensitivity]:
    """Measure the network with each part quantized alone, and with each part left out.

    Args:
        variants: makes and measures variants of the float-rest network.
        parts: from :func:`parts_of`.
        full: the recipe's section.
        state: state of the quantizers of the network quantized by the recipe.
        watch: receives the progress, variant by variant.

    Returns:
        One result for each part, in the order of ``parts``.
    """
    watch.expect(2 * len(parts) + 2)
    before = variants.measure(variants.model)
    watch.done("float rest")
    whole = variants.measure(variants.build(full, state))
    watch.done("fully quantized")
    found = []
    for part in parts:
        alone = variants.measure(variants.build(part.alone, state))
        watch.done(f"{part.name} alone")
        left_out = variants.measure(variants.build(part.left_out, state))
        watch.done(f"all but {part.name}")
        loss, gain = before.top1 - alone.top1, left_out.top1 - whole.top1
        gain_db = difference(left_out.sqnr, whole.sqnr)
        found.append(Sensitivity(part.name, part.kind, part.group, alone, left_out, loss, gain, gain_db))
    return found


def ranks_of(found: Sequence[Sensitivity]) -> dict[str, Ranks]:
    """The ranks of each part, by its name. Parts with equal figures keep the order of ``found``."""
    orders = (
        sorted(found, key=lambda one: (-one.loss, one.alone.sqnr)),
        sorted(found, key=lambda one: one.alone.sqnr),
        sorted(found, key=lambda one: (-one.gain, -one.gain_db)),
        sorted(found, key=lambda one: -one.gain_db),
    )
    places = [{one.name: place for place, one in enumerate(order, start=1)} for order in orders]
    return {one.name: Ranks(*(place[one.name] for place in places)) for one in found}


def without(quantization: Quantization, layers: Sequence[str]) -> Quantization:
    """A copy of ``quantization`` that leaves ``layers`` in float."""
    exclude = [*quantization.exclude, *(glob.escape(name) for name in layers)]
    return quantization.model_copy(update={"exclude": exclude})


def _only(quantization: Quantization, layer: str) -> Quantization:
    return quantization.model_copy(update={"include": [glob.escape(layer)], "exclude": []})


def _enabled(quantization: Quantization, groups: set[GroupName]) -> Quantization:
    """A copy of ``quantization`` that leaves every group outside of ``groups`` in float."""
    off: dict[str, object] = {
        name: getattr(quantization, name).model_copy(update={"enabled": False})
        for name in GROUPS
        if name not in groups
    }
    return quantization.model_copy(update=off)
