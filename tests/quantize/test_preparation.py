"""A float network becomes a fake-quantized one: the ways in, and which points a recipe chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.errors import QuantizationError
from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer
from qat.quantize.calibration import calibrate
from qat.quantize.preparation import model_is_prepared, prepare, quantization_map
from qat.quantize.quantizer_base import Quantizer
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup
from tests.helpers.prepared_networks import OFF, PARTS, assert_every_used_parameter_learns, sub_blocks


def test_a_quantized_network_loads_a_float_checkpoint_strictly(float_toy: BNext) -> None:
    model = BNext(10, widths=float_toy.architecture.widths, quant=True)
    state = float_toy.state_dict()
    result = model.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert loaded.keys() > state.keys()

    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        model.load_state_dict(state, strict=True)


def test_the_recipe_path_and_quant_true_give_the_same_network(float_toy: BNext, images: Tensor) -> None:
    fresh = prepare(copy.deepcopy(float_toy), Quantization())
    calibrate(fresh, lambda: fresh(images))
    calibrated_here = BNext(10, widths=float_toy.architecture.widths, quant=True).eval()
    calibrated_here.load_state_dict(fresh.state_dict())
    assert quantization_map(fresh) == quantization_map(calibrated_here)
    assert torch.equal(fresh(images), calibrated_here(images))
    assert not torch.equal(fresh(images), float_toy(images))


def test_the_state_of_a_quantized_network_is_all_that_it_depends_on(toy: BNext, images: Tensor) -> None:
    restored = BNext(10, widths=toy.architecture.widths, quant=True).eval()
    assert not torch.equal(restored(images), toy(images))
    restored.load_state_dict(toy.state_dict())
    assert torch.equal(restored(images), toy(images))


def test_preparing_works_in_place_and_keeps_the_parameters(float_toy: BNext) -> None:
    parameters = dict(float_toy.named_parameters())
    prepared = prepare(float_toy, Quantization())
    assert prepared is float_toy
    after = dict(prepared.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("training", [True, False])
def test_preparing_keeps_the_mode(float_toy: BNext, training: bool) -> None:
    prepare(float_toy.train(training), Quantization())
    assert {module.training for module in float_toy.modules()} == {training}


def test_preparing_twice_is_refused(float_toy: BNext) -> None:
    assert not model_is_prepared(float_toy)
    prepare(float_toy, Quantization())
    assert model_is_prepared(float_toy)
    with pytest.raises(QuantizationError, match="prepared already"):
        prepare(float_toy, Quantization())


def test_a_network_with_every_group_off_counts_as_prepared(float_toy: BNext) -> None:
    prepare(float_toy, Quantization(**OFF))
    with pytest.raises(QuantizationError, match="prepared already"):
        prepare(float_toy, Quantization())


def test_the_image_grid_is_the_one_given(float_toy: BNext) -> None:
    prepare(float_toy, Quantization(), image=(0.25, 7))
    image = quantization_map(float_toy)["feature.0.image"]
    assert (image["type"], image["scale"], image["zero_point"]) == ("uint8", 0.25, 7)


def test_by_default_every_point_of_the_table_is_quantized(toy: BNext) -> None:
    lines = quantization_map(toy)
    for name, block in sub_blocks(toy).items():
        inside = {
            "y",
            "gain",
            "branch",
            "se.pooled",
            "se.hidden",
            "se.logits",
            "se.attention",
            "se.weight_quantizer",
        }
        inside |= {"product"} if block.kind == "scale" else set()
        assert {line.removeprefix(f"{name}.") for line in lines if line.startswith(f"{name}.")} == inside
    trunk = {f"feature.{index}.{end}" for index in range(1, 5) for end in ("trunk_mid", "trunk_out")}
    assert trunk | {"feature.0.trunk", "feature.0.image", "feature.0.weight_quantizer"} <= lines.keys()
    assert {"fc.input", "fc.weight_quantizer"} <= lines.keys()
    assert lines["feature.1.FFN.se.hidden"]["type"] == lines["feature.1.FFN.se.attention"]["type"] == "uint8"
    assert {lines[name]["type"] for name in trunk} == {"int8"}


def test_a_float_network_has_an_empty_map(float_toy: BNext) -> None:
    assert quantization_map(float_toy) == {}


@pytest.mark.parametrize("group", OFF)
def test_a_group_switched_off_stays_in_float(
    group: str, toy: BNext, make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(**{group: OFF[group]}))
    everything, left = quantization_map(toy).keys(), quantization_map(model).keys()
    assert everything - left == {name for name in everything if PARTS[group](name)}
    assert left < everything
    assert model(images).isfinite().all()
    assert_every_used_parameter_learns(model, images)


def test_bits_reach_their_points(make_toy: Callable[..., BNext]) -> None:
    lines = quantization_map(
        make_toy(
            Quantization(
                stem=StemGroup(weight_bits=7),
                trunk=TrunkGroup(activation_bits=6, observer="minmax"),
                se=Group(weight_bits=4, activation_bits=5),
                classifier=Group(weight_bits=3, activation_bits=2),
            )
        )
    )
    assert lines["feature.0.weight_quantizer"]["type"] == "int7"
    assert lines["feature.0.image"]["type"] == "uint8"
    assert lines["feature.2.Attention.product"]["type"] == lines["feature.3.trunk_mid"]["type"] == "int6"
    assert lines["feature.2.Attention.y"]["range"] == "minmax"
    assert lines["feature.2.Attention.se.weight_quantizer"]["type"] == "int4"
    assert lines["feature.2.Attention.se.pooled"]["type"] == "int5"
    assert lines["feature.2.Attention.se.attention"]["type"] == "uint5"
    assert (lines["fc.weight_quantizer"]["type"], lines["fc.input"]["type"]) == ("int3", "int2")


def test_excluded_modules_stay_in_float(toy: BNext, make_toy: Callable[..., BNext], images: Tensor) -> None:
    model = make_toy(Quantization(exclude=["fc", "feature.2.*.se", "feature.3.FFN"]))
    gone = quantization_map(toy).keys() - quantization_map(model).keys()
    prefixes = ("fc.", "feature.3.FFN.y", "feature.3.FFN.gain", "feature.3.FFN.branch")
    assert gone == {
        name
        for name in quantization_map(toy)
        if name.startswith(prefixes) or (name.startswith("feature.2.") and ".se." in name)
    }
    assert model(images).isfinite().all()


def test_only_included_modules_are_quantized_and_exclude_wins(
    make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(include=["feature.1.*", "fc"], exclude=["feature.1.Attention*"]))
    names = quantization_map(model).keys()
    assert {name.split(".FFN")[0].split(".trunk")[0].split(".")[0] for name in names} == {"feature", "fc"}
    assert all(name.startswith(("feature.1.FFN.", "feature.1.trunk", "fc.")) for name in names)
    assert {"feature.1.FFN.y", "feature.1.FFN.se.pooled", "feature.1.trunk_out", "fc.input"} <= names
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    "choice",
    [
        {"exclude": ["feature.1.trunk_out"]},
        {"exclude": ["*.trunk*"]},
        {"include": ["feature.2.*"]},
        {"include": ["feature.2.Attention"]},
    ],
    ids=str,
)
def test_a_scale_kind_sub_block_works_behind_a_trunk_left_in_float(
    choice: dict[str, list[str]], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(**choice))
    assert model(images).isfinite().all()
    assert_every_used_parameter_learns(model, images)


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize(
    ("glob", "meant"), [("feature.2.Atention", "feature.2.Attention"), ("feature.1.FFM", "feature.1.FFN")]
)
def test_a_glob_that_matches_nothing_is_refused(float_toy: BNext, key: str, glob: str, meant: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        prepare(float_toy, Quantization(**{key: ["*", glob] if key == "include" else [glob]}))
    message = str(caught.value)
    assert f"quantization.{key}: '{glob}' matches no module" in message
    assert f"did you mean '{meant}'" in message
    assert not model_is_prepared(float_toy)


def test_a_refused_glob_leaves_a_network_that_can_be_prepared(float_toy: BNext) -> None:
    with pytest.raises(QuantizationError):
        prepare(float_toy, Quantization(exclude=["nothing.like.it"]))
    prepare(float_toy, Quantization(exclude=["fc"]))
    assert "fc.input" not in quantization_map(float_toy)


def test_points_left_in_float_own_no_state(make_toy: Callable[..., BNext]) -> None:
    model = make_toy(Quantization(trunk=TrunkGroup(enabled=False)))
    points = [module for module in model.modules() if type(module) is Quantizer]
    assert points
    assert all(point.state_dict() == {} for point in points)
    kinds = {type(module) for module in model.modules() if isinstance(module, Quantizer)}
    assert kinds == {Quantizer, ActivationQuantizer, FixedQuantizer}
