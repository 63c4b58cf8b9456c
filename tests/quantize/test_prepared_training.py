"""A fake-quantized network learns: gradients of every parameter, types and devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization, TrunkGroup
from tests.helpers.cases import slow
from tests.helpers.prepared_networks import assert_every_used_parameter_learns, gradients, without_gradient
from tests.helpers.toy_networks import ABLATIONS


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_every_used_parameter_of_every_ablation_learns(
    ablation: dict[str, bool], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(**ablation)
    assert all(point.calibrated for _, point in activation_quantizers(model))
    assert_every_used_parameter_learns(model, images)


@pytest.mark.parametrize("ablation", [ABLATIONS[0], *map(slow, ABLATIONS[1:])], ids=str)
def test_every_ablation_lowers_its_loss(
    ablation: dict[str, bool], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(**ablation).train()
    labels = torch.arange(len(images)) % 10
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]


def test_the_parameters_without_a_gradient_are_those_of_the_float_network(
    float_toy: BNext, toy: BNext, images: Tensor
) -> None:
    missing = [
        {name for name, grad in gradients(model, images).items() if grad is None}
        for model in (float_toy, toy)
    ]
    assert missing[0] == missing[1] == without_gradient(toy)


def test_an_uncalibrated_network_of_moving_ranges_trains_as_well(float_toy: BNext, images: Tensor) -> None:
    model = prepare(float_toy, Quantization(trunk=TrunkGroup(observer="moving_average")))
    assert_every_used_parameter_learns(model, images)
    assert all(point.calibrated for _, point in activation_quantizers(model))


def test_a_bfloat16_network_trains_a_step_on_float32_grids(toy: BNext, images: Tensor) -> None:
    toy.to(torch.bfloat16)
    assert_every_used_parameter_learns(toy, images.bfloat16())
    torch.optim.SGD(toy.parameters(), lr=0.01).step()
    logits = toy.eval()(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert {point.scale.dtype for _, point in activation_quantizers(toy)} == {torch.float32}


def test_autocast_to_bfloat16_trains_a_step(toy: BNext, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(toy, images)
    assert {grad.dtype for grad in found.values() if grad is not None} == {torch.float32}
    assert all(grad.isfinite().all() for grad in found.values() if grad is not None)


def test_quantizers_are_put_beside_the_parameters() -> None:
    with torch.device("meta"):
        model = BNext(10, widths=(8, 8, 16))
    prepare(model, Quantization())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_network_on_a_gpu_learns_and_agrees_with_the_processor(toy: BNext, images: Tensor) -> None:
    expected = toy(images)
    device = copy.deepcopy(toy).cuda()
    assert {tensor.device.type for tensor in device.state_dict().values()} == {"cuda"}
    assert torch.equal(device(images.cuda()).cpu(), expected), "evaluation computes the same integers"
    assert_every_used_parameter_learns(device, images.cuda())
