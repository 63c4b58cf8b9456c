"""The suggested section: its limits, the order in which settings get more bits, layers in float."""

from __future__ import annotations

import dataclasses

import pytest

from qat.quantize.overrides import GroupName
from qat.recipe.schema import Quantization
from qat.sensitivity.bitwidths import Limits, Setting, Width, with_bits
from qat.sensitivity.parts import Sensitivity, parts_of, without
from qat.sensitivity.suggestion import Candidate, Suggestion, find_candidates, suggest
from qat.sensitivity.variants import Measure
from tests.helpers.toy_variants import ANYTHING, FULL, SETTINGS, Counter, Study, make_study

# One process: each would measure for itself.
pytestmark = pytest.mark.xdist_group("suggestion")


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


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
    """Each setting alone may cost 4 dB. All of them together cost more, so the noisiest get more bits."""
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


# Layers in float


def layer(name: str, group: GroupName, gain: float, gain_db: float) -> Sensitivity:
    measure = Measure(50.0, 0, 10.0)
    return Sensitivity(name, "layer", group, measure, measure, 0.0, gain, gain_db)


def test_candidates_gain_accuracy_and_save_noise_and_are_measured_again(study: Study) -> None:
    coarse = {
        key: value * 60 if key == "feature.1.trunk_out.fake.scale" else value
        for key, value in study.state.items()
    }
    ruined = study.variants.measure(study.variants.build(FULL, coarse))
    layers = [
        layer("feature.1.trunk_out", "trunk", 5.0, 5.0),
        layer("feature.2.Attention", "trunk", 50.0, -0.1),  # chance: more accuracy with more noise
        layer("fc", "classifier", 50.0, 1.0),  # not confirmed when it is measured again
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
    assert suggestion(best - 0.01).excluded == ()  # no exclusion reaches it, so none is made
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
