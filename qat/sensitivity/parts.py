"""What quantization costs, part by part: one group or layer alone, and all but one."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from qat.models.bnext import BNext
from qat.quantize.overrides import GroupName
from qat.quantize.preparation import quantized_layers
from qat.recipe.schema import Quantization
from qat.sensitivity.variants import Grids, Measure, Variants, Watcher, difference

GROUPS: Final[tuple[GroupName, ...]] = ("stem", "se", "classifier", "trunk")


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


def measure_parts(
    variants: Variants, parts: Sequence[Part], full: Quantization, grids: Grids, watch: Watcher
) -> list[Sensitivity]:
    """Measure each part alone and left out, in the order of ``parts``.

    Args:
        variants: of the float-rest network.
        parts: from :func:`parts_of`.
        full: what the recipe quantizes.
        grids: of the network quantized so.
        watch: told of each variant.
    """
    watch.expect(2 * len(parts) + 2)
    before = variants.measure(variants.model)
    watch.done("float rest")
    whole = variants.measure(variants.build(full, grids))
    watch.done("fully quantized")
    found = []
    for part in parts:
        alone = variants.measure(variants.build(part.alone, grids))
        watch.done(f"{part.name} alone")
        left_out = variants.measure(variants.build(part.left_out, grids))
        watch.done(f"all but {part.name}")
        loss, gain = before.top1 - alone.top1, left_out.top1 - whole.top1
        gain_db = difference(left_out.sqnr, whole.sqnr)
        found.append(Sensitivity(part.name, part.kind, part.group, alone, left_out, loss, gain, gain_db))
    return found


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


def without(quantization: Quantization, layers: Sequence[str]) -> Quantization:
    """The same with ``layers`` left in float."""
    exclude = [*quantization.exclude, *(glob.escape(name) for name in layers)]
    return quantization.model_copy(update={"exclude": exclude})


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
