"""Fewer bits: which settings there are, what each costs at fewer bits, and the bytes of weights."""

from __future__ import annotations

import pytest
import torch

from qat.nn.layers import BinaryConv2d
from qat.quantize.overrides import group_of
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.sensitivity.bitwidths import Limits, Setting, measure_widths, settings_of, weight_bytes, with_bits
from qat.sensitivity.parts import GROUPS, parts_of, without
from qat.sensitivity.variants import quantizer_state
from tests.helpers.toy_variants import ANYTHING, FULL, SETTINGS, Counter, Study, layer_of, make_study


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


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
    state = quantizer_state(study.variants.calibrated(four), study.variants.model)
    lower = measure_widths(
        study.variants,
        study.recipe,
        four,
        state,
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
    state = dict(study.state)
    if setting.key == "activation_bits":
        fours = {one: 4 for one in SETTINGS if one.key == "activation_bits"}
        lower = quantizer_state(variants.calibrated(with_bits(FULL, fours)), variants.model)
        layers = [part.name for part in parts_of(variants.model, FULL, "layer", GROUPS)]
        own = [key for key in state if group_of(layer_of(key, layers)) == setting.group]
        assert any(not torch.equal(state[key], lower[key]) for key in own)
        state |= {key: lower[key] for key in own}
    assert found.measure == variants.measure(variants.build(with_bits(FULL, {setting: 4}), state))
    assert found.measure != study.recipe
    assert found.loss == study.recipe.top1 - found.measure.top1
    assert found.drop == study.recipe.sqnr - found.measure.sqnr


def test_a_width_is_within_the_limits_if_both_its_loss_and_its_drop_are(study: Study) -> None:
    (one, *_) = [width for width in study.widths if width.loss > 0 and width.drop > 0]
    settings = {one.setting: 8}

    def within(tolerance: float, budget: float) -> bool:
        limits = Limits(tolerance, budget)
        arguments = (FULL, study.state, settings, (one.bits,), limits, Counter())
        (found,) = measure_widths(study.variants, study.recipe, *arguments)
        return found.within

    assert within(one.loss, one.drop)
    assert not within(one.loss - 0.01, one.drop)
    assert not within(one.loss, one.drop - 0.01)


# Bytes


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
