"""What a fake-quantized network computes: values on its grids, close to the float network's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.native.bindings import torch_alone
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import freeze_observers
from qat.recipe.schema import Group, Quantization, TrunkGroup
from tests.helpers.prepared_networks import sub_blocks
from tests.helpers.rounding_bounds import assert_integers, assert_within, sum_bound


def everything_at(bits: int) -> Quantization:
    group = Group(activation_bits=bits, weight_bits=bits)
    return Quantization(trunk=TrunkGroup(activation_bits=bits), se=group, classifier=group)


def test_trunk_values_are_integers_times_their_scale(toy: BNext, images: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    trunk = {
        name: point
        for name, point in activation_quantizers(toy)
        if name.rpartition(".")[2].startswith("trunk")
    }
    for name, point in trunk.items():
        point.register_forward_hook(lambda module, x, out, name=name: seen.update({name: out / module.scale}))
    # The stem puts its result on the trunk's grid itself.
    stem = toy.feature[0]
    stem.register_forward_hook(
        lambda module, x, out: seen.update({"feature.0.trunk": out / module.trunk.scale})
    )
    toy(images)
    assert seen.keys() == trunk.keys()
    assert len(seen) == 9
    for steps in seen.values():
        assert_integers(steps)
        assert -128 <= steps.round().min() < 0 < steps.round().max() <= 127
        assert len(steps.round().unique()) > 32


def test_the_head_s_activation_stays_on_the_trunk_s_grid(toy: BNext, images: Tensor) -> None:
    seen: list[Tensor] = []
    toy.prelu.register_forward_hook(lambda module, x, out: seen.append(out))
    toy(images)
    steps = seen[0] / toy.feature[4].trunk_out.scale
    assert_integers(steps)


@pytest.mark.parametrize("elm_attention", [True, False], ids=["scale kind", "bias kind"])
def test_a_pooled_residual_returns_to_its_input_s_grid(
    elm_attention: bool, make_toy: Callable[..., BNext], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_toy(elm_attention=elm_attention)
    block = model.feature[2].get_submodule(model.feature[2].spatial_name)
    assert (block.stride, block.kind) == (2, "scale" if elm_attention else "bias")
    requantize, branches, outs = block.branch.requantize, [], []

    def record(x: Tensor, **options: bool) -> Tensor:
        branches.append(requantize(x).clone())  # the residual is added in place
        return branches[-1].clone()

    monkeypatch.setattr(block.branch, "requantize", record)
    block.register_forward_hook(lambda module, args, out: outs.append(out))
    freeze_observers(model)
    model.train()  # in evaluation, the sum would already be on the next grid
    with torch.no_grad(), torch_alone():  # which shows the branch
        model(images)
    scale = block.source.quantizer.scale
    steps = (outs[0] - branches[-1]) / scale
    # Rounding errors of a product, of the sum that the test takes apart again, and of a quotient.
    magnitudes = (outs[0].double().abs() + branches[-1].double().abs()) / scale
    assert_within(steps, steps.round(), sum_bound(magnitudes, 4, torch.float32))
    assert len(steps.round().unique()) > 16


def test_the_sign_of_zero_is_plus_one_in_a_prepared_network_only(float_toy: BNext, toy: BNext) -> None:
    zeros = torch.zeros(3)
    for model, expected in ((float_toy, 0.0), (toy, 1.0)):
        blocks = sub_blocks(model)
        assert len(blocks) == 10
        for block in blocks.values():
            assert block.binary_activation(zeros).tolist() == [expected] * 3


def test_evaluation_depends_on_the_input_and_the_state_alone(toy: BNext, images: Tensor) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    first = toy(images)
    toy(100 * images + 3)
    assert torch.equal(toy(images), first)
    after = toy.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_image_s_logits_do_not_depend_on_its_batch(toy: BNext, images: Tensor) -> None:
    alone = torch.cat([toy(image[None]) for image in images])
    beside = toy(torch.cat([images, 50 * images]))[: len(images)]
    assert torch.equal(alone, beside)


def sub_block_errors(float_model: BNext, model: BNext, images: Tensor) -> dict[str, float]:
    """Relative error of each quantized sub-block against the float one on the same input."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            expected = float_model.get_submodule(name)(args[0])
            errors[name] = float((out - expected).norm() / expected.norm())

        return hook

    hooks = [block.register_forward_hook(compare(name)) for name, block in sub_blocks(model).items()]
    with torch.no_grad():
        model(images)
    for handle in hooks:
        handle.remove()
    return errors


def test_eight_bits_keep_every_sub_block_close_to_float(float_toy: BNext, toy: BNext, images: Tensor) -> None:
    kinds = {name: block.kind for name, block in sub_blocks(toy).items()}
    errors = sub_block_errors(float_toy, toy, images)
    assert errors.keys() == kinds.keys()
    # The scale kind multiplies two quantized maps, so its errors add up and its tails are long.
    assert max(error for name, error in errors.items() if kinds[name] == "bias") < 0.05
    assert max(error for name, error in errors.items() if kinds[name] == "scale") < 0.15


def test_more_bits_bring_the_network_closer_to_float(
    make_toy: Any, make_float_toy: Any, images: Tensor
) -> None:
    inside, logits = [], []
    in_float = [make_float_toy(seed=seed) for seed in range(3)]
    for bits in (8, 6, 4):
        block_errors, logit_errors = [], []
        for seed, float_model in enumerate(in_float):
            model = make_toy(everything_at(bits), seed=seed)
            errors = sub_block_errors(float_model, model, images)
            block_errors.append(sum(errors.values()) / len(errors))
            with torch.no_grad():
                expected, found = float_model(images), model(images)
            logit_errors.append(float((found - expected).norm() / expected.norm()))
        inside.append(sum(block_errors) / 3)
        logits.append(sum(logit_errors) / 3)
    assert 4 * inside[0] < 2 * inside[1] < inside[2]
    assert logits[0] < logits[1] < logits[2]
    assert logits[0] < 0.5
