"""The fake-quantized channel attention computes its formula, and its integers are those of the formula."""

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


def layers(attention: FakeQuantSqueezeExcitation) -> tuple[nn.Conv2d, nn.Conv2d]:
    return cast(nn.Conv2d, attention.se[1]), cast(nn.Conv2d, attention.se[3])


def vectors(attention: FakeQuantSqueezeExcitation, count: int = 5) -> Tensor:
    """Pooled vectors (count, C, 1, 1) over the range that the attention was calibrated with, and beyond."""
    channels = layers(attention)[0].in_channels
    noise = torch.randn(count, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    return noise * float(cast(ActivationQuantizer, attention.pooled).scale) * 90


def test_its_integers_are_sums_of_integers_requantized_and_looked_up(toy: BNext) -> None:
    for attention in attentions(toy.eval()):
        constants = attention.integers()
        pooled = cast(ActivationQuantizer, attention.pooled)
        steps = vectors(attention) / pooled.scale
        q = np.clip(np.rint(steps.numpy()), pooled.quant_min, pooled.quant_max)[:, :, 0, 0].astype(np.int64)
        for layer, point in ((constants.reduce, attention.hidden), (constants.expand, attention.logits)):
            grid, rule = cast(ActivationQuantizer, point), layer.requantization
            weight = layer.weight.flatten(1).numpy()
            assert np.array_equal(weight, np.rint(weight))
            assert np.abs(weight).max() <= 127
            sums = q @ weight.astype(np.int64).T + rule.bias.numpy().reshape(-1).astype(np.int64)
            scaled = sums.astype(np.float32) * rule.multiplier.numpy().reshape(-1)
            q = np.clip(np.rint(scaled), grid.quant_min, grid.quant_max).astype(np.int64)
        expected = constants.table.numpy()[q + 128]
        assert np.array_equal(attention.attention_steps(steps)[:, :, 0, 0].numpy(), expected)
        assert expected.min() >= 0
        assert expected.max() <= 255


def test_training_and_evaluation_compute_one_formula_on_its_grids(toy: BNext) -> None:
    for attention in attentions(toy.eval()):
        x = vectors(attention)
        with torch.no_grad():
            evaluated = attention(x)
            reduce, expand = layers(attention)
            weights = [attention.weight_quantizer(layer.weight).flatten(1) for layer in (reduce, expand)]
            hidden = attention.hidden(
                F.relu(F.linear(attention.pooled(x).flatten(1), weights[0], reduce.bias))
            )
            logits = attention.logits(F.linear(hidden, weights[1], expand.bias))
            plain = attention.attention(torch.sigmoid(logits))
        torch.testing.assert_close(evaluated[:, :, 0, 0], plain, atol=1.01 / 255, rtol=0)
        for point in (attention.pooled, attention.hidden, attention.logits):
            cast(ActivationQuantizer, point).eval()
        trained = copy.deepcopy(attention)
        trained.training = True  # not train(), in which its points would update their grids
        assert torch.allclose(trained(x), evaluated, atol=1.01 / 255)


def test_both_layers_and_the_vector_learn(toy: BNext) -> None:
    for attention in attentions(toy):
        x = vectors(attention).requires_grad_()
        attention.train()(x).sum().backward()
        for layer in layers(attention):
            for parameter in layer.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


def test_grids_are_known_once_it_is_calibrated(toy: BNext) -> None:
    fresh = build_float_toy()
    prepare(fresh, Quantization(), image_grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert not any(attention.has_grids for attention in attentions(fresh))
    assert all(attention.has_grids for attention in attentions(toy))


def test_what_is_no_number_stays_none_and_reaches_no_table(toy: BNext) -> None:
    attention = attentions(toy.eval())[0]
    steps = vectors(attention)
    steps[0, 0] = float("nan")
    found = attention.attention_steps(steps)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
