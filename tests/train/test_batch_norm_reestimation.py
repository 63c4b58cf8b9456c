"""Batch-norm re-estimation: what is averaged, and that nothing else of the network changes."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import BNext
from qat.ops.binary import LATENT_CLIP
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import freeze_observers
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from tests.helpers.toy_networks import build_float_toy, toy_images

STATISTICS = ("running_mean", "running_var")


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def _run(model: BNext, *batches: Tensor) -> None:
    for batch in batches or [toy_images(8, seed=9)]:
        model(batch)


def statistics(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [cast(Tensor, getattr(norm, key)) for key in STATISTICS]


def spoil(model: BNext) -> None:
    """Set the statistics to values that no images would give."""
    for norm in norms(model).values():
        cast(Tensor, norm.running_mean).fill_(7.0)
        cast(Tensor, norm.running_var).fill_(1e-3)


def test_statistics_are_the_plain_average_over_the_batches_whatever_they_were(toy: BNext) -> None:
    freeze_observers(toy)
    batches = [toy_images(8, seed=seed) for seed in (3, 4, 5)]
    found: list[dict[str, list[Tensor]]] = []
    for batch in batches:  # each alone
        for norm in norms(toy).values():
            norm.momentum = 1.0
        with torch.no_grad():
            toy.train()(batch)
        stats = {
            name: [getattr(norm, key).clone() for key in STATISTICS] for name, norm in norms(toy).items()
        }
        found.append(stats)
    for norm in norms(toy).values():
        norm.momentum = 0.1
    spoil(toy)
    reestimate_batch_norm(toy.eval(), lambda: _run(toy, *batches))
    for name, norm in norms(toy).items():
        for index, key in enumerate(STATISTICS):
            mean = torch.stack([stats[name][index] for stats in found]).mean(0)
            torch.testing.assert_close(getattr(norm, key), mean, rtol=1e-4, atol=1e-6)


def test_everything_but_the_statistics_stays(toy: BNext) -> None:
    with torch.no_grad():  # outside of the bounds of training mode
        toy.feature[1].FFN.binary_conv.weight.mul_(100.0)
        toy.feature[1].FFN.scale.fill_(1.5)
    assert toy.feature[1].FFN.binary_conv.weight.abs().max() > LATENT_CLIP
    toy.train()
    toy.feature[1].FFN.norm1.eval()
    modes = {name: module.training for name, module in toy.named_modules()}
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    reestimate_batch_norm(toy, lambda: _run(toy))
    after = toy.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {f"{name}.{key}" for name in norms(toy) for key in STATISTICS}
    assert {name: module.training for name, module in toy.named_modules()} == modes
    assert all(point.observing for _, point in activation_quantizers(toy))
    assert {norm.momentum for norm in norms(toy).values()} == {0.1}


def test_a_float_rest_network_is_averaged_alike(float_toy: BNext) -> None:
    expected = {name: norm.running_var.clone() for name, norm in norms(float_toy).items()}
    spoil(float_toy)
    with torch.no_grad():
        spoiled = float_toy(toy_images(4))
    reestimate_batch_norm(float_toy, lambda: _run(float_toy, toy_images(64, seed=100)))
    assert not torch.equal(float_toy(toy_images(4)), spoiled)
    for name, norm in norms(float_toy).items():
        # The same images that gave the toy its statistics.
        torch.testing.assert_close(norm.running_var, expected[name], rtol=1e-3, atol=1e-5)


def test_statistics_stay_where_the_pass_fails(toy: BNext) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}

    def broken() -> None:
        _run(toy)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(toy, broken)
    assert all(torch.equal(value, before[key]) for key, value in toy.state_dict().items())
    assert not toy.training


def test_a_pass_without_images_is_refused(toy: BNext) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"feature\.0\.bn1: no batch reached it"):
        reestimate_batch_norm(toy, lambda: None)
    assert all(torch.equal(value, before[key]) for key, value in toy.state_dict().items())


def test_values_that_are_not_finite_are_refused(toy: BNext) -> None:
    freeze_observers(toy)
    with torch.no_grad():
        toy.feature[0].conv1.weight.mul_(1e30)  # its variance is no float32 number
    with pytest.raises(QuantizationError, match=r"feature\.0\.bn1: its statistics over these batches"):
        reestimate_batch_norm(toy, lambda: _run(toy))
    assert all(bool(value.isfinite().all()) for norm in norms(toy).values() for value in statistics(norm))


def test_grids_must_be_known() -> None:
    model = build_float_toy()
    prepare(model, Quantization())
    with pytest.raises(QuantizationError, match=r"feature\.0\.trunk: not calibrated"):
        reestimate_batch_norm(model, lambda: None)
