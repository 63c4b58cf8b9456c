"""The mixed-bit ``quantization`` section with the fewest bits that stays within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qat.quantize.overrides import GroupName, group_of
from qat.recipe.schema import Quantization
from qat.sensitivity.bitwidths import Limits, Setting, Width, settings_of, weight_bytes, with_bits
from qat.sensitivity.parts import GROUPS, Sensitivity, without
from qat.sensitivity.variants import Grids, Measure, Variants, Watcher, difference

#: At most so many layers are looked at as candidates for ``exclude``.
_CANDIDATES: Final = 5


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
