"""The fake-quantized channel attention computes its formula, and its integers those of its definition."""

import copy
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.attention import FakeQuantSqueezeExcitation
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization
from tests.helpers.toy_networks import build_float_toy


def attentions(model: nn.Module) -> list[FakeQuantSqueezeExcitation]:
    found = [module for module in model.modules() if isinstance(module, FakeQuantSqueezeExcitation)]
    assert found
    return found


def layers(twin: FakeQuantSqueezeExcitation) -> tuple[nn.Conv2d, nn.Conv2d]:
    return cast(nn.Conv2d, twin.se[1]), cast(nn.Conv2d, twin.se[3])


def vectors(twin: FakeQuantSqueezeExcitation, count: int = 5) -> Tensor:
    """Pooled vectors (count, C, 1, 1) of the size that the twin was calibrated with, some beyond it."""
    channels = layers(twin)[0].in_channels
    noise = torch.randn(count, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    return noise * float(cast(ActivationQuantizer, twin.pooled).scale) * 90


def test_its_integers_are_sums_of_integers_requantized_and_looked_up(toy: BNext) -> None:
    for twin in attentions(toy.eval()):
        constants = twin.integers()
        pooled = cast(ActivationQuantizer, twin.pooled)
        steps = vectors(twin) / pooled.scale
        q = np.clip(np.rint(steps.numpy()), pooled.quant_min, pooled.quant_max)[:, :, 0, 0].astype(np.int64)
        for layer, point in ((constants.reduce, twin.hidden), (constants.expand, twin.logits)):
            grid, rule = cast(ActivationQuantizer, point), layer.requantization
            weight = layer.weight.flatten(1).numpy()
            assert np.array_equal(weight, np.rint(weight))
            assert np.abs(weight).max() <= 127
            sums = q @ weight.astype(np.int64).T + rule.bias.numpy().reshape(-1).astype(np.int64)
            scaled = sums.astype(np.float32) * rule.multiplier.numpy().reshape(-1)
            q = np.clip(np.rint(scaled), grid.quant_min, grid.quant_max).astype(np.int64)
        expected = constants.table.numpy()[q + 128]
        assert np.array_equal(twin.attention_steps(steps)[:, :, 0, 0].numpy(), expected)
        assert expected.min() >= 0
        assert expected.max() <= 255


def test_training_and_evaluation_compute_one_formula_on_its_grids(toy: BNext) -> None:
    for twin in attentions(toy.eval()):
        x = vectors(twin)
        with torch.no_grad():
            evaluated = twin(x)
            reduce, expand = layers(twin)
            weights = [twin.weight_quantizer(layer.weight).flatten(1) for layer in (reduce, expand)]
            hidden = twin.hidden(F.relu(F.linear(twin.pooled(x).flatten(1), weights[0], reduce.bias)))
            logits = twin.logits(F.linear(hidden, weights[1], expand.bias))
            plain = twin.attention(torch.sigmoid(logits))
        torch.testing.assert_close(evaluated[:, :, 0, 0], plain, atol=1.01 / 255, rtol=0)
        for point in (twin.pooled, twin.hidden, twin.logits):
            cast(ActivationQuantizer, point).eval()
        trained = copy.deepcopy(twin)
        trained.training = True  # its points keep their grids
        assert torch.allclose(trained(x), evaluated, atol=1.01 / 255)


def test_both_layers_and_the_vector_learn(toy: BNext) -> None:
    for twin in attentions(toy):
        x = vectors(twin).requires_grad_()
        twin.train()(x).sum().backward()
        for layer in layers(twin):
            for parameter in layer.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


def test_grids_are_known_once_it_is_calibrated(toy: BNext) -> None:
    fresh = build_float_toy()
    prepare(fresh, Quantization(), image_grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert not any(twin.has_grids for twin in attentions(fresh))
    assert all(twin.has_grids for twin in attentions(toy))


def test_what_is_no_number_stays_none_and_reaches_no_table(toy: BNext) -> None:
    twin = attentions(toy.eval())[0]
    steps = vectors(twin)
    steps[0, 0] = float("nan")
    found = twin.attention_steps(steps)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
