"""When a fake-quantized network computes integers: evaluating, calibrated, whatever the type of its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.models.bnext import BNext, set_temperature
from qat.quantize.activation_quantizers import ActivationQuantizer, activation_quantizers
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup
from qat.train.precision import autocast
from tests.helpers.cases import combinations, slow
from tests.helpers.networks import (
    MEAN,
    STD,
    float_network,
    lowered,
    make_extreme,
    on_grid,
    pixels,
    placed,
    quantization,
    torch_problems,
    trunk_outputs,
)
from tests.helpers.networks import toy as random_toy
from tests.helpers.prepared_networks import fake_quantized_sub_blocks
from tests.helpers.toy_networks import ABLATIONS, toy_images


def integer_modules(model: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the modules that asked for their integer constants during one forward pass."""
    asked: set[str] = set()
    with monkeypatch.context() as patch:
        for name, module in model.named_modules():
            attribute = "multiplier" if name == "pool" else "integers"
            method = getattr(module, attribute, None)
            if method is None or name.endswith("weight_quantizer"):
                continue

            def spy(name: str = name, method: Callable[[], Any] = method) -> object:
                asked.add(name)
                return method()

            patch.setattr(module, attribute, spy)
        model(images)
    return asked


def everything(model: BNext) -> set[str]:
    names = set(fake_quantized_sub_blocks(model)) | {"feature.0", "pool", "fc"}
    return names | {f"{name}.se" for name in fake_quantized_sub_blocks(model)}


def test_evaluation_computes_integers_and_training_does_not(
    toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert integer_modules(toy, images, monkeypatch) == everything(toy)
    assert integer_modules(toy.train(), images, monkeypatch) == set()
    assert integer_modules(toy.eval(), images, monkeypatch) == everything(toy)


def test_an_uncalibrated_network_computes_no_integers_nor_does_calibration(
    float_toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = copy.deepcopy(float_toy)
    model = prepare(float_toy, Quantization(stem=StemGroup(enabled=False)))
    assert integer_modules(model, images, monkeypatch) == set()
    for _, point in activation_quantizers(model):
        point.start_calibration()
    assert integer_modules(model, images, monkeypatch) == set()
    for _, point in activation_quantizers(model):
        point.finish_calibration()
    assert integer_modules(model, images, monkeypatch) == everything(model) - {"feature.0"}
    assert not torch.equal(model(images), reference(images))


#: A point that is not calibrated, and the modules that then don't compute integers.
MISSING = [
    ("feature.0.trunk", {"feature.0", "feature.1.Attention"}),
    slow("feature.1.trunk_mid", {"feature.1.Attention", "feature.1.FFN"}),
    ("feature.4.trunk_out", {"feature.4.FFN_1", "feature.4.FFN_2", "pool"}),
    ("feature.2.Attention.y", {"feature.2.Attention"}),
    slow("feature.2.Attention.product", {"feature.2.Attention"}),
    slow("feature.2.Attention.branch", {"feature.2.Attention"}),
    ("feature.3.FFN.se.pooled", {"feature.3.FFN"}),
    slow("feature.3.FFN.se.hidden", {"feature.3.FFN"}),
    slow("feature.3.FFN.se.logits", {"feature.3.FFN"}),
    ("fc.input", {"pool", "fc"}),
]


@pytest.mark.parametrize(("point", "modules"), MISSING)
def test_one_unknown_grid_leaves_the_modules_that_need_it_in_float(
    point: str, modules: set[str], toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = toy.get_submodule(point)
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.calibrated = False
    gone = modules | {f"{name}.se" for name in modules & set(fake_quantized_sub_blocks(toy))}
    assert integer_modules(toy, images, monkeypatch) == everything(toy) - gone
    assert toy(images).isfinite().all()


def test_weights_that_are_not_binary_yet_leave_their_sub_blocks_in_float(
    toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_temperature(toy, 1e-3)
    assert integer_modules(toy, images, monkeypatch) == {"feature.0", "pool", "fc"}


def test_evaluating_with_gradients_enabled_gives_the_same_numbers_without_a_warning(
    toy: BNext, images: Tensor
) -> None:
    with torch.enable_grad():
        found = toy(images.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(found, toy(images))


PARTLY = [
    slow(Quantization(stem=StemGroup(enabled=False))),
    slow(Quantization(se=Group(enabled=False))),
    slow(Quantization(classifier=Group(enabled=False))),
    Quantization(trunk=TrunkGroup(enabled=False)),
    Quantization(exclude=["feature.2.*"]),
    slow(Quantization(exclude=["*.trunk_mid", "prelu"])),
    Quantization(include=["feature.1.*", "fc"]),
]


@torch.no_grad()
@pytest.mark.parametrize("bits", PARTLY, ids=range(len(PARTLY)))
def test_a_network_partly_left_in_float_evaluates_repeatably_and_from_its_state(bits: Quantization) -> None:
    model = random_toy(6, bits)
    images = pixels(2, 8, 13)
    logits = model(images)
    assert logits.isfinite().all()
    model(3 * images.flip(0))
    assert torch.equal(model(images), logits)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    restored = prepare(float_network(99), bits, image_grid(MEAN, STD)).eval()
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored(images), logits)


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_a_restored_state_gives_equal_outputs_and_equal_integers(options: dict[str, bool]) -> None:
    bits = quantization(trunk=6, se=5)
    model = random_toy(7, bits, **options)
    restored = prepare(float_network(98, **options), bits).eval()
    restored.load_state_dict(model.state_dict())
    images = pixels(2, 8, 17)
    assert torch.equal(restored(images), model(images))
    assert list(torch_problems(restored, lowered(model), images.numpy(), sub_blocks=True)) == []


def test_a_training_step_after_evaluating_sees_no_constant_of_before(toy: BNext, images: Tensor) -> None:
    before = toy(images)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.mul_(1.1)
    after = toy(images)
    assert not torch.equal(after, before)
    assert torch.equal(copy.deepcopy(toy)(images), after)


@pytest.mark.parametrize("lacks", [False, True])
def test_an_integer_network_gives_the_same_logits_within_autocast(
    toy: BNext, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a teacher that was quantized, in a training in bfloat16."""
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: lacks)
    images = toy_images(2)
    with torch.no_grad():
        alone = toy(images)
        with autocast("bfloat16", torch.device("cpu")):
            assert torch.equal(toy(images), alone)


@torch.no_grad()
@combinations({"extreme": [False, True], "options": ABLATIONS})
def test_a_bfloat16_network_computes_the_integers_of_its_parameters_in_float32(
    options: dict[str, bool], extreme: bool
) -> None:
    model = random_toy(8, **options)
    if extreme:
        make_extreme(model, 8)
    half = model.to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    images = pixels(3, 8, 15).bfloat16()
    ours, theirs = trunk_outputs(half, images), trunk_outputs(full, images.float())
    # bfloat16 tells 256 integers of a grid apart: its values are the float32 ones, rounded.
    for name, values in ours.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, theirs[name].bfloat16()), name
    # They are lowered alike, and that is the network in float32.
    assert list(torch_problems(full, lowered(half), images.float().numpy(), sub_blocks=True)) == []


@torch.no_grad()
def test_sub_blocks_give_the_same_integers_for_an_input_in_bfloat16() -> None:
    model = random_toy(9)
    for sub, source, _ in placed(lowered(model)):
        block = fake_quantized_sub_blocks(model)[sub.name]
        x = torch.from_numpy(on_grid(source, (2, block.channels, 6, 5))).float() * source.scale
        assert torch.equal(block(x).bfloat16(), block(x.bfloat16()))
