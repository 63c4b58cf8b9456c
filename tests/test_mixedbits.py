"""Fewer bits: what each setting costs, and what the suggested section keeps to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import build_float_toy
from toyvariants import FULL, Counter, layer_of, make_variants

from qat.fakequant import WeightQuantizer
from qat.layers import BinaryConv2d
from qat.mixedbits import (
    Candidate,
    Limits,
    Setting,
    Suggestion,
    Width,
    find_candidates,
    measure_widths,
    settings_of,
    suggest,
    weight_bytes,
    with_bits,
)
from qat.prepare import GroupName, group_of
from qat.recipe import Quantization
from qat.sensitivity import GROUPS, Grids, Measure, Sensitivity, Variants, grids_of, parts_of, without

SETTINGS = settings_of(FULL, GROUPS)
ANYTHING = Limits(100.0, 1000.0)


@dataclasses.dataclass
class Study:
    """A toy, measured as the recipe ``FULL`` quantizes it, and with fewer bits."""

    variants: Variants
    grids: Grids
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


@pytest.fixture(scope="module")
def study() -> Study:
    variants = make_variants(build_float_toy(widths=(8, 8, 16)))
    full = variants.calibrated(FULL)
    grids, recipe = grids_of(full, variants.model), variants.measure(full)
    widths = measure_widths(variants, recipe, FULL, grids, SETTINGS, (4, 2), ANYTHING, Counter())
    return Study(variants, grids, variants.measure(variants.model), recipe, widths)


# Settings


def test_the_settings_are_the_bits_that_each_group_has() -> None:
    assert [str(setting) for setting in SETTINGS] == [
        "stem.weight_bits",
        "se.weight_bits",
        "se.activation_bits",
        "classifier.weight_bits",
        "classifier.activation_bits",
        "trunk.activation_bits",
    ]
    assert set(SETTINGS.values()) == {8}
    assert [setting.label for setting in settings_of(FULL, ["se"])] == ["se weights", "se activations"]


def test_bits_are_changed_where_asked_and_nowhere_else() -> None:
    bits = {Setting("se", "weight_bits"): 4, Setting("trunk", "activation_bits"): 6}
    changed = with_bits(FULL, bits)
    assert settings_of(changed, GROUPS) == SETTINGS | bits
    assert changed.model_copy(update={"se": FULL.se, "trunk": FULL.trunk}) == FULL


# Widths


def test_every_lower_width_of_every_setting_is_tried_widest_first(study: Study) -> None:
    tried = [(one.setting, one.bits) for one in study.widths]
    assert tried == [(setting, bits) for setting in SETTINGS for bits in (4, 2)]
    four = with_bits(FULL, dict.fromkeys(SETTINGS, 4))
    watch = Counter()
    grids = grids_of(study.variants.calibrated(four), study.variants.model)
    lower = measure_widths(
        study.variants,
        study.recipe,
        four,
        grids,
        settings_of(four, ["stem"]),
        (8, 5, 4, 3),
        ANYTHING,
        watch,
    )
    assert [(str(one.setting), one.bits) for one in lower] == [("stem.weight_bits", 3)]
    assert watch.expected == len(watch.names) == 1


@pytest.mark.parametrize("setting", list(SETTINGS), ids=str)
def test_a_width_takes_the_grids_of_its_group_from_a_network_of_that_width(
    study: Study, setting: Setting
) -> None:
    variants = study.variants
    (found,) = [one for one in study.widths if (one.setting, one.bits) == (setting, 4)]
    grids = dict(study.grids)
    if setting.key == "activation_bits":
        fours = {one: 4 for one in SETTINGS if one.key == "activation_bits"}
        lower = grids_of(variants.calibrated(with_bits(FULL, fours)), variants.model)
        layers = [part.name for part in parts_of(variants.model, FULL, "layer", GROUPS)]
        own = [key for key in grids if group_of(layer_of(key, layers)) == setting.group]
        assert any(not torch.equal(grids[key], lower[key]) for key in own)
        grids |= {key: lower[key] for key in own}
    assert found.measure == variants.measure(variants.build(with_bits(FULL, {setting: 4}), grids))
    assert found.measure != study.recipe
    assert found.loss == study.recipe.top1 - found.measure.top1
    assert found.drop == study.recipe.sqnr - found.measure.sqnr


def test_a_width_is_within_the_limits_if_both_its_loss_and_its_drop_are(study: Study) -> None:
    (one, *_) = [width for width in study.widths if width.loss > 0 and width.drop > 0]
    settings = {one.setting: 8}

    def within(tolerance: float, budget: float) -> bool:
        limits = Limits(tolerance, budget)
        arguments = (FULL, study.grids, settings, (one.bits,), limits, Counter())
        (found,) = measure_widths(study.variants, study.recipe, *arguments)
        return found.within

    assert within(one.loss, one.drop)
    assert not within(one.loss - 0.01, one.drop)
    assert not within(one.loss, one.drop - 0.01)


# Suggestion


def test_without_limits_every_setting_takes_its_lowest_width(study: Study) -> None:
    suggestion = study.suggest(ANYTHING)
    assert suggestion.bits == dict.fromkeys(SETTINGS, 2)
    assert suggestion.quantization == with_bits(FULL, dict.fromkeys(SETTINGS, 2))
    assert suggestion.combinations == 1
    assert suggestion.exportable


def test_where_every_width_costs_too_much_the_suggestion_is_the_recipe(study: Study) -> None:
    hopeless = [dataclasses.replace(one, drop=1e9) for one in study.widths]
    suggestion = study.suggest(Limits(0.0, 0.0), widths=hopeless)
    assert suggestion.quantization == FULL
    assert suggestion.measure == study.recipe
    assert (suggestion.loss, suggestion.drop) == (0.0, 0.0)
    assert suggestion.weight_bytes == suggestion.recipe_weight_bytes


def test_a_setting_takes_its_lowest_width_that_is_within_the_limits_by_itself(study: Study) -> None:
    fours = [dataclasses.replace(one, loss=0.0 if one.bits == 4 else 101.0) for one in study.widths]
    assert set(study.suggest(ANYTHING, widths=fours).bits.values()) == {4}
    twos = [dataclasses.replace(one, loss=0.0 if one.bits == 2 else 101.0) for one in study.widths]
    assert set(study.suggest(ANYTHING, widths=twos).bits.values()) == {2}


def test_the_combination_keeps_to_the_limits_though_each_setting_did_already(study: Study) -> None:
    """Each setting alone may cost 4 dB; all that do together cost more, and the noisiest give in first."""
    limits = Limits(100.0, 4.0)
    suggestion = study.suggest(limits)
    assert suggestion.combinations > 1
    assert suggestion.drop <= limits.noise_budget
    alone = {
        setting: min(one.bits for one in study.widths if one.setting == setting and one.drop <= 4.0)
        for setting in SETTINGS
        if any(one.setting == setting and one.drop <= 4.0 for one in study.widths)
    }
    widened = {setting for setting, bits in alone.items() if suggestion.bits[setting] > bits}
    kept = alone.keys() - widened
    assert widened
    assert kept
    noise = {(one.setting, one.bits): one.measure.sqnr for one in study.widths}
    assert max(noise[s, alone[s]] for s in widened) < max(noise[s, alone[s]] for s in kept)


def test_the_suggestion_is_measured_as_fine_tuning_will_find_it(study: Study) -> None:
    suggestion = study.suggest(Limits(100.0, 4.0))
    found = study.variants.measure(study.variants.calibrated(suggestion.quantization))
    assert suggestion.measure == found
    assert suggestion == study.suggest(Limits(100.0, 4.0))


def test_bytes_of_weights_are_counted_at_their_bits(study: Study) -> None:
    section = without(with_bits(FULL, {Setting("se", "weight_bits"): 3}), ["fc", "feature.1.FFN.se"])
    model = study.variants.build(section)
    bits = 0
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d):
            bits += module.weight.numel()
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            owner = name.rpartition(".conv1" if name.endswith("conv1") else ".se.")[0] or name
            quantizer = getattr(model.get_submodule(owner), "weight_quantizer", None)
            width = quantizer.bits if isinstance(quantizer, WeightQuantizer) else 32
            bits += module.weight.numel() * width
    assert weight_bytes(study.variants, section) == -(-bits // 8)
    assert weight_bytes(study.variants, section) != weight_bytes(study.variants, FULL)


# Layers in float


def layer(name: str, group: GroupName, gain: float, gain_db: float) -> Sensitivity:
    measure = Measure(50.0, 0, 10.0)
    return Sensitivity(name, "layer", group, measure, measure, 0.0, gain, gain_db)


def test_candidates_gain_accuracy_and_save_noise_and_are_measured_again(study: Study) -> None:
    coarse = {
        key: value * 60 if key == "feature.1.trunk_out.fake.scale" else value
        for key, value in study.grids.items()
    }
    ruined = study.variants.measure(study.variants.build(FULL, coarse))
    layers = [
        layer("feature.1.trunk_out", "trunk", 5.0, 5.0),
        layer("feature.2.Attention", "trunk", 50.0, -0.1),  # luck: more accuracy with more noise
        layer("fc", "classifier", 50.0, 1.0),  # not confirmed
        layer("prelu", "trunk", 1.0, 1.0),
    ]
    found = find_candidates(study.variants, ruined, FULL, coarse, layers, 10.0, watch := Counter())
    assert [one.name for one in found] == []
    assert watch.names == ["all but fc"]
    found = find_candidates(study.variants, ruined, FULL, coarse, layers[:2], 2.0, Counter())
    rest = study.variants.measure(study.variants.build(without(FULL, ["feature.1.trunk_out"]), coarse))
    assert found == [Candidate("feature.1.trunk_out", "trunk", rest.top1 - ruined.top1)]


@pytest.fixture(scope="module")
def coarse(study: Study) -> tuple[Quantization, Measure, list[Candidate], list[float]]:
    """A recipe of four bits in the trunk; layers to exclude, and the points lost with the first n of them."""
    variants = study.variants
    four = with_bits(FULL, {Setting("trunk", "activation_bits"): 4})
    names = [part.name for part in parts_of(variants.model, four, "layer", ["trunk"])]
    measures = [
        variants.measure(variants.calibrated(without(four, names[:count]))) for count in range(len(names) + 1)
    ]
    lost = [study.float_rest.top1 - one.top1 for one in measures]
    return four, measures[0], [Candidate(name, "trunk", 1.0) for name in names], lost


def test_layers_are_excluded_only_where_that_brings_the_recipe_within_the_tolerance(
    study: Study, coarse: tuple[Quantization, Measure, list[Candidate], list[float]]
) -> None:
    four, recipe, candidates, lost = coarse
    best = min(lost)
    count = lost.index(best)
    assert best < lost[0]

    def suggestion(tolerance: float) -> Suggestion:
        limits = Limits(tolerance, 1000.0)
        return suggest(study.variants, study.float_rest, recipe, four, [], candidates, limits, Counter())

    names = tuple(one.name for one in candidates[:count])
    helped = suggestion(best)
    assert helped.excluded == names
    assert helped.quantization == without(four, names)
    assert not helped.exportable
    assert suggestion(best - 0.01).excluded == ()  # not to be reached: nothing is given up for it
    assert suggestion(lost[0]).excluded == ()  # not needed
    assert suggestion(lost[0]).exportable


def test_fewer_bits_do_not_cost_again_what_excluded_layers_gained(
    study: Study, coarse: tuple[Quantization, Measure, list[Candidate], list[float]]
) -> None:
    four, recipe, candidates, lost = coarse
    cheap = [Width(setting, 2, recipe, 0.0, 0.0, True) for setting in SETTINGS if setting.group != "trunk"]
    limits = Limits(min(lost), 1000.0)
    found = suggest(study.variants, study.float_rest, recipe, four, cheap, candidates, limits, Counter())
    assert found.excluded
    assert found.combinations > 1
    assert study.float_rest.top1 - found.measure.top1 <= min(lost)


def test_a_section_of_mixed_bits_is_a_valid_section(study: Study) -> None:
    section = study.suggest(Limits(100.0, 4.0)).quantization
    assert Quantization.model_validate(section.model_dump(mode="json")) == section
