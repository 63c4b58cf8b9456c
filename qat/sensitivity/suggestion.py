"""Search for a ``quantization`` section with few, mixed bits that stays within the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qat.quantize.overrides import GroupName, group_of
from qat.recipe.schema import Quantization
from qat.sensitivity.bitwidths import Limits, Setting, Width, settings_of, weight_bytes, with_bits
from qat.sensitivity.parts import GROUPS, Sensitivity, without
from qat.sensitivity.variants import Measure, QuantizerState, Variants, Watcher, difference

#: Largest number of layers that are measured as candidates for ``exclude``.
_CANDIDATES: Final = 5


@dataclass(frozen=True)
class Candidate:
    """A layer that may be worth leaving in float, its group, and the points of top-1 that this gains."""

    name: str
    group: GroupName
    gain: float


@dataclass(frozen=True)
class Suggestion:
    """A suggested ``quantization`` section with mixed bits.

    Attributes:
        quantization: the section.
        bits: number of bits of each setting.
        excluded: layers left in float in addition to those of the recipe.
        measure: measure of the network quantized so, calibrated anew, without fine-tuning.
        loss, drop: percentage points of top-1, and dB of SQNR, lost against the recipe's own section.
        weight_bytes, recipe_weight_bytes: bytes of all weights, each at its bits, with the suggestion and
            with the recipe.
        combinations: number of combinations of bits that were measured.
        exportable: whether the suggestion adds no layer of the trunk to those in float: with one, no integer
            graph can be exported.
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
    state: QuantizerState,
    layers: Sequence[Sensitivity],
    tolerance: float,
    watch: Watcher,
) -> list[Candidate]:
    """Layers that gain more than ``tolerance`` points and lower the noise if left in float, best first.

    A gain in accuracy without less noise is chance. The layers may have been measured on few images, of which
    a single one changes top-1 much, so the best are measured again on all images of ``variants``.

    Args:
        variants: makes and measures variants of the float-rest network.
        recipe: measure of the network quantized by the recipe.
        quantization: the recipe's section.
        state: state of the quantizers of the network quantized by the recipe.
        layers: the measured layers.
        tolerance: percentage points of top-1.
        watch: receives the progress, variant by variant.
    """
    promising = [one for one in layers if one.gain > tolerance and one.gain_db > 0]
    promising = sorted(promising, key=lambda one: -one.gain)[:_CANDIDATES]
    watch.expect(len(promising))
    found = []
    for one in promising:
        measure = variants.measure(variants.build(without(quantization, [one.name]), state))
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
    """Search, greedily, for the section with the fewest bits that stays within the limits as a whole.

    Each setting starts at the lowest number of bits that is within the limits if it alone is changed. The
    combination is calibrated and measured. While it is not within the limits, the setting with the worst
    noise takes its next larger number of bits that is, and in the end the recipe's own. Layers are excluded
    only if the recipe itself loses more than the tolerance against the float-rest network, and only if the
    exclusion brings it within the tolerance.

    Args:
        variants: makes and measures variants of the float-rest network.
        float_rest, recipe: measures of the float-rest network and of the network quantized by the recipe.
        quantization: the recipe's section.
        widths: from :func:`qat.sensitivity.bitwidths.measure_widths`.
        candidates: from :func:`find_candidates`.
        limits: how much fewer bits may cost.
        watch: receives the progress, variant by variant.
    """
    excluded = _needed(variants, float_rest, recipe, quantization, candidates, limits.tolerance, watch)
    base = without(quantization, excluded)
    own = settings_of(quantization, GROUPS)
    ladders = {setting: [one for one in widths if one.setting == setting and one.within] for setting in own}
    # Index of each setting's number of bits in its ladder, which begins with the largest number; -1 stands
    # for the recipe's own.
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
        if excluded:  # for the accuracy of the float-rest network, which fewer bits must not lose again
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
    """The fewest candidates, taken in order, that must stay in float for the recipe to keep the accuracy.

    To keep it means a top-1 at most ``tolerance`` points below the float-rest network's. Empty if the recipe
    keeps it anyway, or if not even all candidates are enough.
    """
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
