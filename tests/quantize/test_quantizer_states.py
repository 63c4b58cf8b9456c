"""State dicts, types and copies of quantizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer, activation_quantizers
from qat.quantize.calibration import freeze_observers
from qat.quantize.observers import OBSERVERS, Observer
from qat.quantize.preparation import quantization_map
from qat.quantize.weight_quantizers import WeightQuantizer
from tests.helpers.quantizers import calibrated, noise, same_state, state_of


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_state_dict_restores_the_grid_and_that_it_is_calibrated(observer: Observer, signed: bool) -> None:
    x = noise(300) if signed else noise(300).abs()
    point = calibrated(x, 5, signed, observer)
    restored = ActivationQuantizer(5, signed, observer).eval()
    assert not torch.equal(restored(x), point(x))
    restored.load_state_dict(point.state_dict())
    assert restored.calibrated
    assert torch.equal(restored(x), point(x))


def test_an_uncalibrated_state_dict_makes_a_point_uncalibrated() -> None:
    point = calibrated(noise(64))
    point.load_state_dict(ActivationQuantizer().state_dict())
    assert not point.calibrated


def test_a_state_without_any_key_of_a_point_leaves_it_as_it_is() -> None:
    point = calibrated(noise(64))
    before = state_of(point)
    point.load_state_dict({}, strict=True)
    assert same_state(point, before)
    assert point.calibrated
    fixed = FixedQuantizer(0.5, 3)
    fixed.load_state_dict({}, strict=True)
    assert fixed.scale.item() == 0.5


@pytest.mark.parametrize("make", [lambda: calibrated(noise(64)), lambda: FixedQuantizer(0.5, 3)])
def test_a_state_with_some_keys_of_a_point_is_refused(make: Any) -> None:
    point = make()
    # torch takes eps, a constant of its observers, as optional in every state dict.
    for key in [key for key in point.state_dict() if not key.endswith(".eps")]:
        partial = {other: value for other, value in point.state_dict().items() if other != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            make().load_state_dict(partial)
        make().load_state_dict({**partial, key: point.state_dict()[key]})


def test_a_network_refuses_a_partial_set_of_quantizer_keys(toy: BNext) -> None:
    state = toy.state_dict()
    toy.load_state_dict(state)
    del state["feature.1.FFN.y.fake.scale"]
    with pytest.raises(RuntimeError, match=r"feature\.1\.FFN\.y\.fake\.scale"):
        toy.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_another_type_keeps_the_grid_in_float32_to_the_bit(dtype: torch.dtype) -> None:
    point, fixed = calibrated(noise(64)), FixedQuantizer(1 / 255, 17)
    before, fixed_before = state_of(point), state_of(fixed)
    point.to(dtype)
    fixed.to(dtype)
    assert point.scale.dtype == fixed.scale.dtype == torch.float32
    assert {key: value.dtype for key, value in before.items()} == {
        key: value.dtype for key, value in point.state_dict().items()
    }
    assert same_state(point, before)
    assert same_state(fixed, fixed_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quantizers_return_the_type_they_are_given(dtype: torch.dtype) -> None:
    x = noise(4, 4).to(dtype)
    assert calibrated(noise(64))(x).dtype == dtype
    assert FixedQuantizer(0.1, 3)(x).dtype == dtype
    assert WeightQuantizer()(x).dtype == dtype


def test_a_copied_network_shares_no_grid_with_its_original(toy: BNext, images: Tensor) -> None:
    copied = copy.deepcopy(toy)
    points, copies = dict(activation_quantizers(toy)), dict(activation_quantizers(copied))
    assert points.keys() == copies.keys()
    assert not {id(point) for point in points.values()} & {id(point) for point in copies.values()}
    own = {id(point) for point in copies.values()}
    sources = [module.source.quantizer for module in copied.modules() if hasattr(module, "source")]
    assert len(sources) == 2 + 4 * 3 - 2  # the head's PReLU and pooling, each sub-block of four blocks
    assert {id(source) for source in sources} <= own

    before = toy(images)
    assert torch.equal(copied(images), before)
    for point in copies.values():
        point.fake.scale.mul_(3.0)
    assert torch.equal(toy(images), before)
    assert not torch.equal(copied(images), before)


def test_the_quantizers_of_a_network_are_listed_by_name(toy: BNext) -> None:
    names = [name for name, _ in activation_quantizers(toy)]
    assert len(names) == len(set(names))
    assert {"feature.0.trunk", "feature.2.Attention.product", "feature.4.trunk_out", "fc.input"} <= set(names)
    assert set(names) < quantization_map(toy).keys()


def test_freezing_a_network_fixes_every_grid_in_training(toy: BNext, images: Tensor) -> None:
    copied = copy.deepcopy(toy)
    freeze_observers(toy)
    before = {name: state_of(point) for name, point in activation_quantizers(toy)}
    for model in (toy, copied):
        model.train()(5 * images)
    assert all(same_state(point, before[name]) for name, point in activation_quantizers(toy))
    assert not all(same_state(point, before[name]) for name, point in activation_quantizers(copied))
