"""The verdict: one exact text for each state a network can be in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qat.inspection.facts import SIGN_BITS, InspectedLayer, Inspection, Total
from qat.inspection.verdict import epochs_left, exact_share, percent, verdict

STEM = InspectedLayer(
    "feature.0", "stem", ((4, 3, 3, 3),), "float32", 32, 432, (-0.3, 0.3), "float32", "float32"
)
LATENT = InspectedLayer(
    "feature.1.Attention",
    "bias 3×3",
    ((10, 10, 10, 1),),
    "float32",
    32,
    4000,
    (-1.2, 1.1),
    "clamp(w / T, -1, 1)",
    "float32",
    exact_stored=0.0,
    temperature=1.0,
    exact_in_use=0.031,
)
PACKED = replace(
    LATENT,
    stored=SIGN_BITS,
    bits=1,
    size=125,
    in_use="±1",
    temperature=1e-8,
    exact_stored=1.0,
    exact_in_use=1.0,
)
SIGNED = replace(LATENT, in_use="±1", temperature=1e-8, exact_in_use=1.0)


def inspection(*layers: InspectedLayer, rest: InspectedLayer = STEM, **options: Any) -> Inspection:
    options = {"facts": {}, "exported": False, "published": True} | options
    text = "BNext custom [4, 4], 2 classes, stem stride 1"
    return Inspection("f", "a test", 9999, text, (4, 4), 2, (rest, *layers), Total(0, 0), **options)


def test_packed_signs_and_an_integer_rest() -> None:
    found = verdict(
        inspection(PACKED, PACKED, rest=replace(STEM, stored="uint8", in_use="int8"), exported=True)
    )
    assert (found.answer, found.binary, found.explanation) == ("yes", True, ())
    assert found.line == "binary: yes, 2,000 weights at 1 bit; 2 of 2 layers; rest int8"


@pytest.mark.parametrize(
    ("stored", "used", "text"),
    [
        ("float32", "float32", "float32"),
        ("float16", "float32", "float32, stored as float16"),
        ("float32", "int8", "int8, stored as float32"),
        ("int8", "int4", "int4"),
    ],
)
def test_the_rest_is_named_as_it_is_used_and_as_it_is_stored_where_that_differs(
    stored: str, used: str, text: str
) -> None:
    rest = replace(STEM, stored=stored, in_use=used)
    assert verdict(inspection(PACKED, rest=rest)).line.endswith(f"; rest {text}")


def test_a_rest_of_two_types_names_both() -> None:
    integers = replace(STEM, name="fc", in_use="int8")
    line = verdict(inspection(integers, PACKED)).line
    assert line.endswith("; rest float32 and int8, stored as float32")


def test_signs_of_float32_latent_weights_are_binary_in_use() -> None:
    found = verdict(inspection(SIGNED))
    assert (found.answer, found.binary) == ("in use", True)
    assert found.line == (
        "binary: yes in use, but stored as float32: 1,000 weights at 32 bits; 1 of 1 layers; rest float32 "
        "(qat finetune or pretrain writes them at 1 bit)"
    )
    assert found.explanation[0].startswith("The float32 parameters are latent weights: ")
    assert found.explanation[-1].startswith("T is below 1e-7 here: ")


def test_a_float32_export_advises_another_export() -> None:
    found = verdict(inspection(replace(SIGNED, temperature=None), exported=True, published=False))
    assert found.line.endswith("; rest float32 (qat export --onnx without --float32 writes them at 1 bit)")
    assert found.explanation == (
        "A float32 export holds the weights as they are used, one float32 number for each.",
    )


def test_large_latent_weights_are_binary_at_any_temperature_and_the_explanation_says_so() -> None:
    found = verdict(inspection(replace(SIGNED, temperature=0.5)))
    assert found.answer == "in use"
    assert found.explanation[-1].startswith("T is 0.5 here, but every latent weight is so large that b is ±1")


def test_bare_weights_at_temperature_one_are_not_binary_yet() -> None:
    found = verdict(inspection(LATENT))
    assert (found.answer, found.binary) == ("not yet", False)
    assert found.line == (
        "binary: not yet: 0 of 1 layers; the temperature is 1, and weights in use are clamp(w / 1, -1, 1), "
        "of which 3.1 % are exactly ±1; they become ±1 when it falls below 1e-7 (their training multiplies "
        "it by 0.9 an epoch: 153 epochs from 1)"
    )
    assert found.explanation[0] == (
        "The float32 parameters are latent weights: training adds its small steps to them, and the network "
        "uses b = clamp(w / T, -1, 1) in their place, sign(w) once T is below 1e-7."
    )


def test_a_training_checkpoint_says_how_many_epochs_are_left_after_its_own() -> None:
    layer = replace(LATENT, temperature=0.9**46)
    line = verdict(inspection(layer, facts={"epoch": 46})).line
    assert line.endswith("(their training multiplies it by 0.9 an epoch: 107 epochs after epoch 46)")
    last = verdict(inspection(replace(LATENT, temperature=1.01e-7), facts={"epoch": 152})).line
    assert last.endswith("an epoch: 1 epoch after epoch 152)")


def test_our_own_pretraining_lowers_the_temperature_by_another_rule() -> None:
    line = verdict(inspection(LATENT, published=False)).line
    assert line.endswith("falls below 1e-7 (qat pretrain lowers it until it does)")


def test_layers_in_different_states_are_counted_and_the_others_described() -> None:
    found = verdict(inspection(PACKED, LATENT, replace(LATENT, temperature=0.25), published=False))
    assert (found.answer, found.binary) == ("in part", False)
    assert found.line == (
        "binary: in part: 1 of 3 layers; the temperature of the others is 0.25 to 1, and their weights in "
        "use are clamp(w / T, -1, 1), of which 3.1 % are exactly ±1; they become ±1 when it falls below 1e-7 "
        "(qat pretrain lowers it until it does)"
    )


def test_an_export_that_is_not_binary_knows_no_temperature() -> None:
    exported = {"exported": True, "published": False}
    layer = replace(LATENT, temperature=None)
    assert verdict(inspection(layer, **exported)).line == (
        "binary: not yet: 0 of 1 layers; the weights are stored as they are used, and 3.1 % are exactly ±1: "
        "the network was exported before its temperature fell below 1e-7"
    )
    assert "1 of 2 layers; in the others, their weights are stored as" in (
        verdict(inspection(layer, replace(SIGNED, temperature=None), **exported)).line
    )


def test_the_share_of_several_layers_weighs_each_by_its_weights() -> None:
    small = replace(LATENT, shapes=((10, 10, 1, 1),), exact_in_use=1.0)
    assert exact_share([LATENT, small]) == (31 + 100) / 1100


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.9**46, 1.0001e-7, 1e-7])
def test_epochs_left_are_the_fewest_that_bring_the_temperature_below_the_bound(temperature: float) -> None:
    left = epochs_left(temperature)
    assert temperature * 0.9**left < 1e-7
    assert temperature * 0.9 ** (left - 1) >= 1e-7


def test_no_epoch_is_left_below_the_bound() -> None:
    assert epochs_left(9.9e-8) == 0


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.031, "3.1 %"),
        (1 - 1e-9, "> 99.9 %"),
        (1e-9, "< 0.1 %"),
        (0.9994, "99.9 %"),
    ],
)
def test_all_and_nothing_are_said_only_where_they_are_exact(share: float, text: str) -> None:
    assert percent(share) == text
