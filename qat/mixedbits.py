"""Fewer bits, setting by setting, and the mixed-bit ``quantization`` section that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from qat.bnext import Architecture
from qat.operations import operations
from qat.prepare import GroupName, group_of, quantized_layers
from qat.recipe import Quantization
from qat.sensitivity import (
    GROUPS,
    Grids,
    Measure,
    Sensitivity,
    Variants,
    Watcher,
    difference,
    grids_of,
    without,
)

#: At most so many layers are looked at as candidates for ``exclude``.
_CANDIDATES: Final = 5

Key = Literal["weight_bits", "activation_bits"]


@dataclass(frozen=True)
class Setting:
    """One number of bits in a recipe, such as ``se.weight_bits``."""

    group: GroupName
    key: Key

    def __str__(self) -> str:
        """As recipes have it."""
        return f"{self.group}.{self.key}"

    @property
    def label(self) -> str:
        """As readers have it, such as ``se weights``."""
        return f"{self.group} {'weights' if self.key == 'weight_bits' else 'activations'}"


@dataclass(frozen=True)
class Limits:
    """What fewer bits may cost, against the recipe's own bits and before fine-tuning.

    Attributes:
        tolerance: points of top-1.
        noise_budget: dB of the logits' signal to noise.
    """

    tolerance: float
    noise_budget: float


@dataclass(frozen=True)
class Width:
    """One setting at fewer bits, everything else as in the recipe.

    Attributes:
        setting, bits: what was changed.
        measure: of the network with it.
        loss: points of top-1 below the recipe's own network.
        drop: dB of signal to noise below it.
        within: whether both are within the limits.
    """

    setting: Setting
    bits: int
    measure: Measure
    loss: float
    drop: float
    within: bool


@dataclass(frozen=True)
class Candidate:
    """A layer that may be worth leaving in float: points of top-1 gained, and its group."""

    name: str
    group: GroupName
    gain: float


@dataclass(frozen=True)
class Suggestion:
    """A ``quantization`` section with mixed bits.

    Attributes:
        quantization: the section.
        bits: of each setting.
        excluded: layers left in float beyond the recipe's.
        measure: of the network quantized so, calibrated anew, before fine-tuning.
        loss, drop: points of top-1 and dB below the recipe's own network.
        weight_bytes, recipe_weight_bytes: of all weights at their bits, with the suggestion and the recipe.
        combinations: how many combinations of bits were measured.
        exportable: whether an integer graph can be exported: not with trunk layers in float.
    """

    quantization: Quantization
    bits: dict[Setting, int]
    excluded: tuple[str, ...]
    measure: Measure
    loss: float
    drop: float
    weight_bytes: int
    recipe_weight_bytes: int
    combinations: int
    exportable: bool


def settings_of(quantization: Quantization, groups: Sequence[GroupName]) -> dict[Setting, int]:
    """Each number of bits that ``groups`` have in a recipe."""
    keys: tuple[Key, ...] = ("weight_bits", "activation_bits")
    return {
        Setting(group, key): getattr(section, key)
        for group in groups
        for section in [getattr(quantization, group)]
        for key in keys
        if hasattr(section, key)
    }


def with_bits(quantization: Quantization, bits: dict[Setting, int]) -> Quantization:
    """The same with other numbers of bits."""
    update: dict[str, dict[str, int]] = {}
    for setting, width in bits.items():
        update.setdefault(setting.group, {})[setting.key] = width
    return quantization.model_copy(
        update={
            group: getattr(quantization, group).model_copy(update=values) for group, values in update.items()
        }
    )


def measure_widths(
    variants: Variants,
    recipe: Measure,
    quantization: Quantization,
    grids: Grids,
    settings: dict[Setting, int],
    widths: Sequence[int],
    limits: Limits,
    watch: Watcher,
) -> list[Width]:
    """Each setting at each lower width, everything else as in the recipe; widest first.

    Activations of fewer bits need other grids: the whole network is calibrated once per width, and the group
    in question takes its grids from there.

    Args:
        variants: of the float-rest network.
        recipe: measure of the recipe's own network.
        quantization: the recipe's.
        grids: of the recipe's own network.
        settings: from :func:`settings_of`.
        widths: to try; those that aren't lower than a setting's own are passed over.
        limits: what is acceptable.
        watch: told of each variant.
    """
    tried = [
        (setting, width)
        for setting, own in settings.items()
        for width in sorted(set(widths), reverse=True)
        if width < own
    ]
    watch.expect(len(tried))
    by_width: dict[int, Grids] = {}
    found = []
    for setting, width in tried:
        taken: Grids = grids
        if setting.key == "activation_bits":
            if width not in by_width:
                lower = {s: min(width, own) for s, own in settings.items() if s.key == "activation_bits"}
                by_width[width] = grids_of(
                    variants.calibrated(with_bits(quantization, lower)), variants.model
                )
            taken = _replaced(grids, by_width[width], setting.group)
        model = variants.build(with_bits(quantization, {setting: width}), taken)
        measure = variants.measure(model)
        loss, drop = recipe.top1 - measure.top1, difference(recipe.sqnr, measure.sqnr)
        within = loss <= limits.tolerance and drop <= limits.noise_budget
        found.append(Width(setting, width, measure, loss, drop, within))
        watch.done(f"{setting} {width}")
    return found


def _replaced(grids: Grids, others: Grids, group: GroupName) -> dict[str, Tensor]:
    """``grids``, those of one group taken from ``others``."""
    return {key: (others if _group_of_key(key) == group else grids)[key] for key in grids}


def _group_of_key(key: str) -> GroupName:
    """The group of a quantizer's state: that of the innermost layer around it."""
    if key.startswith("fc."):
        return "classifier"
    if ".se." in key:
        return "se"
    return "trunk" if not key.startswith("feature.0.") or key.startswith("feature.0.trunk.") else "stem"


def find_candidates(
    variants: Variants,
    recipe: Measure,
    quantization: Quantization,
    grids: Grids,
    layers: Sequence[Sensitivity],
    tolerance: float,
    watch: Watcher,
) -> list[Candidate]:
    """Layers whose leaving out gains more than ``tolerance`` points and saves noise, most points first.

    A gain without less noise is luck. Layers may have been measured on fewer images, of which one counts for
    much: the best are measured again.
    """
    promising = [one for one in layers if one.gain > tolerance and one.gain_db > 0]
    promising = sorted(promising, key=lambda one: -one.gain)[:_CANDIDATES]
    watch.expect(len(promising))
    found = []
    for one in promising:
        measure = variants.measure(variants.build(without(quantization, [one.name]), grids))
        watch.done(f"all but {one.name}")
        found.append(Candidate(one.name, one.group, measure.top1 - recipe.top1))
    return sorted((one for one in found if one.gain > tolerance), key=lambda one: -one.gain)


def suggest(
    variants: Variants,
    float_rest: Measure,
    recipe: Measure,
    quantization: Quantization,
    widths: Sequence[Width],
    candidates: Sequence[Candidate],
    limits: Limits,
    watch: Watcher,
) -> Suggestion:
    """The section with the fewest bits that stays within the limits, as a whole and measured as a whole.

    Each setting starts at the lowest width that is within the limits by itself. While their combination is
    not, the setting with the worst noise takes the next larger width that is: at last the recipe's own bits.
    Layers are excluded only where the recipe itself loses more than the tolerance against the float-rest
    network, and only if that brings it within.

    Args:
        variants: of the float-rest network.
        float_rest, recipe: measures of the float-rest network and of the recipe's own.
        quantization: the recipe's.
        widths: from :func:`measure_widths`.
        candidates: from :func:`find_candidates`.
        limits: what is acceptable.
        watch: told of each variant.
    """
    excluded = _needed(variants, float_rest, recipe, quantization, candidates, limits.tolerance, watch)
    base = without(quantization, excluded)
    own = settings_of(quantization, GROUPS)
    ladders = {setting: [one for one in widths if one.setting == setting and one.within] for setting in own}
    # Index into the ladder, whose widest is first; -1 is the recipe's own width.
    place = {setting: len(ladder) - 1 for setting, ladder in ladders.items()}
    combinations = 0
    while True:
        bits = {
            setting: ladders[setting][index].bits if index >= 0 else own[setting]
            for setting, index in place.items()
        }
        section = with_bits(base, bits)
        watch.expect(1)
        measure = variants.measure(variants.calibrated(section))
        combinations += 1
        watch.done("a combination")
        loss, drop = recipe.top1 - measure.top1, difference(recipe.sqnr, measure.sqnr)
        lowered = [setting for setting, index in place.items() if index >= 0]
        within = loss <= limits.tolerance and drop <= limits.noise_budget
        if excluded:  # for the sake of the accuracy in float, which fewer bits must not cost again
            within &= float_rest.top1 - measure.top1 <= limits.tolerance
        if within or not lowered:
            break
        worst = min(lowered, key=lambda setting: ladders[setting][place[setting]].measure.sqnr)
        place[worst] -= 1
    before, after = (weight_bytes(variants, one) for one in (quantization, section))
    return Suggestion(
        quantization=section,
        bits=bits,
        excluded=tuple(excluded),
        measure=measure,
        loss=loss,
        drop=drop,
        weight_bytes=after,
        recipe_weight_bytes=before,
        combinations=combinations,
        exportable=all(group_of(name) != "trunk" for name in excluded),
    )


def _needed(
    variants: Variants,
    float_rest: Measure,
    recipe: Measure,
    quantization: Quantization,
    candidates: Sequence[Candidate],
    tolerance: float,
    watch: Watcher,
) -> list[str]:
    """The first candidates with which the recipe comes within ``tolerance`` of the float-rest network."""
    if float_rest.top1 - recipe.top1 <= tolerance:
        return []
    watch.expect(len(candidates))
    excluded: list[str] = []
    for candidate in candidates:
        excluded.append(candidate.name)
        measure = variants.measure(variants.calibrated(without(quantization, excluded)))
        watch.done(f"all but {', '.join(excluded)}")
        if float_rest.top1 - measure.top1 <= tolerance:
            watch.expect(len(excluded) - len(candidates))
            return excluded
    return []


def weight_bytes(variants: Variants, quantization: Quantization) -> int:
    """Bytes of all weights packed at their bits: 1 in binary convolutions, 32 where left in float."""
    architecture: Architecture = variants.model.architecture
    layers = quantized_layers(variants.model, quantization)
    bits = 0
    for layer in operations(architecture, variants.images.shape[-1]).layers:
        name = "feature.0" if layer.kind == "stem" else layer.name
        if layer.kind == "binary":
            bits += layer.weights
        else:
            width = getattr(quantization, group_of(name)).weight_bits if name in layers else 32
            bits += layer.weights * width
    return -(-bits // 8)
