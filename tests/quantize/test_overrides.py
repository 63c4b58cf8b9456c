"""Settings of single modules: what they reach, what is refused, and that mixed bits export exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qat_export.graphs.portable import emit_portable

from qat.errors import QuantizationError
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.preparation import prepare, quantization_map
from qat.recipe.schema import LayerOverride, Quantization
from tests.helpers.cases import slow
from tests.helpers.networks import (
    float_network,
    lowered,
    parity_problems,
    pixels,
    prepared,
    torch_problems,
    toy,
)


def overridden(*entries: dict[str, Any], **settings: Any) -> Quantization:
    return Quantization.model_validate({"overrides": list(entries), **settings})


def bits_of(quantization: Quantization) -> dict[str, str]:
    """Type by quantization point."""
    model = prepare(float_network(), quantization)
    return {name: str(line["type"]) for name, line in quantization_map(model).items()}


def test_an_override_reaches_what_its_glob_matches_and_nothing_else() -> None:
    plain = bits_of(Quantization())
    found = bits_of(overridden({"match": "feature.2.*.se", "weight_bits": 4, "activation_bits": 5}))
    changed = {name: kind for name, kind in found.items() if kind != plain[name]}
    leaves = {"pooled": "int5", "hidden": "uint5", "logits": "int5", "attention": "uint5"}
    leaves["weight_quantizer"] = "int4"
    subs = ("feature.2.Attention", "feature.2.FFN")
    assert changed == {f"{sub}.se.{leaf}": kind for sub in subs for leaf, kind in leaves.items()}


@pytest.mark.parametrize(
    ("match", "key", "changed"),
    [
        ("feature.0", "weight_bits", {"feature.0.weight_quantizer"}),
        ("fc", "weight_bits", {"fc.weight_quantizer"}),
        ("fc", "activation_bits", {"fc.input"}),
        ("feature.0.trunk", "activation_bits", {"feature.0.trunk"}),
        ("feature.1.trunk_*", "activation_bits", {"feature.1.trunk_mid", "feature.1.trunk_out"}),
        (
            "feature.2.Attention",
            "activation_bits",
            {f"feature.2.Attention.{leaf}" for leaf in ("y", "product", "branch")},
        ),
    ],
)
def test_every_kind_of_module_takes_its_bits(match: str, key: str, changed: set[str]) -> None:
    plain, found = bits_of(Quantization()), bits_of(overridden({"match": match, key: 3}))
    assert {name for name in plain if found[name] != plain[name]} == changed
    assert all(found[name].endswith("int3") for name in changed)


def test_of_two_overrides_the_later_wins_key_by_key() -> None:
    first = {"match": "*", "activation_bits": 6, "weight_bits": 5}
    found = bits_of(overridden(first, {"match": "fc", "activation_bits": 3}))
    assert (found["fc.input"], found["fc.weight_quantizer"], found["feature.0.trunk"]) == (
        "int3",
        "int5",
        "int6",
    )
    found = bits_of(overridden({"match": "fc", "activation_bits": 3}, first))
    assert found["fc.input"] == "int6"


def test_observers_and_their_settings_can_be_overridden() -> None:
    entry = {"match": "fc", "observer": "percentile", "percentile": 90.0, "clip": 0.01}
    model = prepare(float_network(), overridden(entry))
    points = dict(activation_quantizers(model))
    assert points["fc.input"].observer == "percentile"
    assert points["fc.input"].fake.activation_post_process.percentile == 90.0
    assert points["fc.input"].clip == 0.01
    others = prepare(float_network(), Quantization())
    expected = {name: point.observer for name, point in activation_quantizers(others)}
    assert {name: point.observer for name, point in points.items()} == expected | {"fc.input": "percentile"}
    assert set(expected.values()) == {"moving_average", "percentile"}
    slow = prepare(float_network(), overridden({"match": "fc", "averaging_constant": 0.5}))
    assert (
        dict(activation_quantizers(slow))["fc.input"].fake.activation_post_process.averaging_constant == 0.5
    )


def test_an_override_of_what_stays_in_float_changes_nothing() -> None:
    found = bits_of(overridden({"match": "fc", "weight_bits": 4}, exclude=["fc"]))
    assert not [name for name in found if name.startswith("fc")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"match": "feature.1.FFNN_1", "activation_bits": 4},
            r"^quantization\.overrides\[1\]\.match: 'feature\.1\.FFNN_1' matches no module \(did you mean "
            r"'feature\.1\.FFN_1'\?\); modules are feature\.0, ",
        ),
        ({"match": "fc"}, r"^quantization\.overrides\[1\]: sets nothing for 'fc'$"),
        (
            {"match": "feature.0", "activation_bits": 4},
            r"^quantization\.overrides\[1\]\.activation_bits: 'feature\.0' matches feature\.0, which has no "
            r"use for it: it has weights alone: its output is the trunk's, feature\.0\.trunk$",
        ),
        (
            {"match": "feature.1.trunk_*", "weight_bits": 4},
            r"overrides\[1\]\.weight_bits: .* feature\.1\.trunk_mid, which has no use for it: its weights",
        ),
        (
            {"match": "prelu", "activation_bits": 4},
            r"prelu, which has no use for it: its grid is that of its input",
        ),
        (
            {"match": "*", "activation_bits": 16},
            r"^quantization\.overrides\[1\]\.activation_bits: found 16 for feature\.\d\.\w+\.se, allowed "
            r"outside of the trunk: an integer from 2 to 8$",
        ),
    ],
)
def test_an_override_of_no_use_is_refused_and_the_network_left_alone(entry: Any, message: str) -> None:
    model = float_network()
    before = list(model.state_dict())
    with pytest.raises(QuantizationError, match=message):
        prepare(model, overridden({"match": "fc", "weight_bits": 4}, entry))
    assert list(model.state_dict()) == before


def test_a_key_that_some_of_the_matched_modules_use_is_fine() -> None:
    found = bits_of(overridden({"match": "feature.1.*", "weight_bits": 3}))
    assert found["feature.1.FFN_1.se.weight_quantizer"] == "int3"


def test_every_key_of_an_override_is_one_of_its_groups() -> None:
    keys = set(LayerOverride.model_fields) - {"match"}
    sections = {
        name: set(type(getattr(Quantization(), name)).model_fields) for name in ("se", "trunk", "stem")
    }
    assert keys == set.union(*sections.values()) - {"enabled"}


# Mixed bits, layer by layer.

MIXED: dict[str, list[dict[str, Any]]] = {
    "trunk": [
        {"match": "feature.1.*", "activation_bits": 4},
        {"match": "feature.2.trunk_mid", "activation_bits": 8},
        {"match": "feature.2.FFN", "activation_bits": 2},
        {"match": "feature.3.FFN_?", "activation_bits": 5},
    ],
    "W4A8 and W4A4 attention": [
        {"match": "*.se", "weight_bits": 4},
        {"match": "feature.3.*.se", "activation_bits": 4},
        {"match": "feature.0", "weight_bits": 3},
    ],
    "every point differs": [
        {"match": f"feature.{block}.{leaf}", "activation_bits": 2 + (3 * block + index) % 7}
        for block in (1, 2, 3)
        for index, leaf in enumerate(("Attention", "FFN*", "trunk_mid", "trunk_out", "Attention.se"))
    ],
}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((slow if name != "every point differs" else pytest.param)(name, "torch_ao") for name in MIXED),
        ("every point differs", "brevitas"),
        pytest.param("trunk", "brevitas", marks=pytest.mark.exhaustive),
        pytest.param("W4A8 and W4A4 attention", "brevitas", marks=pytest.mark.exhaustive),
    ],
)
def test_a_network_of_mixed_bits_equals_its_export_exactly(
    name: str, power_of_two: bool, backend: str
) -> None:
    settings = overridden(*MIXED[name], power_of_two=power_of_two, backend=backend)
    model = toy(3, settings)
    network = lowered(model)
    kinds = {str(grid.bits) for grid in network.grids.values()}
    assert len(kinds) > 1
    images = pixels(5, 3, 16).numpy()
    assert list(torch_problems(model, network, images, sub_blocks=True)) == []
    assert list(parity_problems(network, emit_portable(network), images)) == []


def test_the_description_carries_the_bits_of_each_layer() -> None:
    network = lowered(toy(3, overridden(*MIXED["trunk"])))
    grids = {name: grid.bits for name, grid in network.grids.items()}
    assert (grids["feature.1/trunk_mid"], grids["feature.2/trunk_mid"], grids["feature.2/trunk_out"]) == (
        4,
        8,
        8,
    )
    assert {sub.name: sub.y_grid.bits for sub in network.sub_blocks()} == {
        "feature.1.Attention": 4,
        "feature.1.FFN_1": 4,
        "feature.1.FFN_2": 4,
        "feature.2.Attention": 8,
        "feature.2.FFN": 2,
        "feature.3.Attention": 8,
        "feature.3.FFN_1": 5,
        "feature.3.FFN_2": 5,
    }


# A trunk of 16 bits.


def test_a_trunk_of_16_bits_trains_and_evaluates_closer_to_float_than_8_and_is_not_exported() -> None:
    images = pixels(5, 8, 16)
    with torch.no_grad():
        model = float_network(3)
        for module in model.modules():  # the sign of 0 that prepared networks have
            if hasattr(module, "zero_is_positive"):
                module.zero_is_positive = True
        exact = model(images)
    errors = {}
    for bits in (8, 16):
        wide = toy(3, overridden({"match": "*trunk*", "activation_bits": bits}))
        with torch.no_grad():
            errors[bits] = float((wide(images) - exact).square().mean())
    assert errors[16] < errors[8]
    wide.train()(images).square().mean().backward()
    assert wide.feature[1].FFN_1.binary_conv.weight.grad.isfinite().all()
    with pytest.raises(
        QuantizationError,
        match=r"^feature\.0\.trunk: 16 bits are simulated in float; an integer network needs 8 or fewer",
    ):
        lowered(wide.eval())


def test_one_wide_point_is_refused_by_its_name_and_simulated_in_evaluation() -> None:
    model = prepared(float_network(3), overridden({"match": "feature.2.FFN", "activation_bits": 12}), seed=3)
    point = dict(activation_quantizers(model))["feature.2.FFN.y"]
    assert (point.quant_min, point.quant_max) == (-2048, 2047)
    assert not point.is_integer
    with torch.no_grad():
        y = point(torch.arange(-3000, 3000) * float(point.scale))
    assert len(y.unique()) == 4096
    with pytest.raises(QuantizationError, match=r"^feature\.2\.FFN\.y: 12 bits are simulated"):
        lowered(model)
