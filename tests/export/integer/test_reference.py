"""The interpreter against straightforward computations; the fake-quantized network equals it bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from qat_export.integer.network import Slopes, SubBlock
from qat_export.integer.reference import Interpreter, convolve, multiply, pool2x2, prelu, requantize, saturate

from qat.data.augment import normalize
from qat.grid import Grid
from qat.quantize.activation_quantizers import FixedQuantizer
from qat.quantize.dyadic import Dyadic
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.cases import slow
from tests.helpers.networks import (
    MEAN,
    STD,
    lowered,
    make_extreme,
    on_grid,
    ordinary,
    pixels,
    placed,
    torch_problems,
    toy,
)

Array = NDArray[Any]
INT8 = Grid(1.0, 8, signed=True)


def rounded(value: Fraction | float, grid: Grid) -> int:
    """Half to even (Python's own rule), then clamped."""
    return min(max(round(value), grid.low), grid.high)


# The operations, one by one.


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (1e9, 127), (-1e9, -128)]
)
def test_rounding_is_half_to_even_and_saturates(value: float, expected: int) -> None:
    assert saturate(np.array([value]), INT8)[0] == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 5, 6])
def test_convolutions_are_exact(stride: int, kernel: int, side: int) -> None:
    rng = np.random.default_rng(side)
    x, w = rng.integers(-255, 256, (2, 4, side, side)), rng.integers(-127, 128, (5, 4, kernel, kernel))
    expected = F.conv2d(
        torch.tensor(x).double(), torch.tensor(w).double(), stride=stride, padding=kernel // 2
    )
    np.testing.assert_array_equal(convolve(x, w, stride), expected.numpy())


@pytest.mark.parametrize(
    "slopes", [Slopes(np.array([-128, 0, 127], np.int8), shift) for shift in (-3, 0, 7, 14)]
)
def test_prelu_equals_its_formula_for_every_integer(slopes: Slopes) -> None:
    x = np.arange(-128, 128, dtype=np.int16)
    found = prelu(np.broadcast_to(x, (1, 3, 1, 256)), slopes, INT8)
    for channel, slope in enumerate(slopes.integers.tolist()):
        exact = [
            q if q >= 0 else rounded(Fraction(q * slope) / Fraction(2) ** slopes.shift, INT8)
            for q in x.tolist()
        ]
        assert found[0, channel, 0].tolist() == exact


@pytest.mark.parametrize(
    "multiplier", [Dyadic(1023, 16), Dyadic(512, 10), Dyadic(777, 24), Dyadic(0, 3), Dyadic(513, 9)]
)
def test_a_product_equals_exact_arithmetic_for_all_pairs_of_integers(multiplier: Dyadic) -> None:
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    found = multiply(a, b, multiplier, INT8)
    # The same in float32, as targets compute it: exact, so equal.
    product = (a.astype(np.float32) * np.float32(multiplier.value)) * b.astype(np.float32)
    np.testing.assert_array_equal(found, saturate(product, INT8))
    exact = Fraction(multiplier.integer) / Fraction(2) ** multiplier.shift
    for i, j in np.random.default_rng(0).integers(0, 256, (200, 2)):
        assert found[i, j] == rounded(int(a[i, j]) * int(b[i, j]) * exact, INT8)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 1), (1, 2)])
def test_pooling_is_the_mean_of_edge_replicated_windows(height: int, width: int) -> None:
    x = np.random.default_rng(3).integers(-128, 128, (2, 3, height, width)).astype(np.int16)
    found = pool2x2(x, INT8)
    assert found.shape[2:] == (math.ceil(height / 2), math.ceil(width / 2))
    for n, c, i, j in np.ndindex(found.shape):
        rows, columns = [2 * i, min(2 * i + 1, height - 1)], [2 * j, min(2 * j + 1, width - 1)]
        window = [int(x[n, c, r, s]) for r in rows for s in columns]
        assert found[n, c, i, j] == rounded(Fraction(sum(window), 4), INT8)


def test_requantization_multiplies_in_float32() -> None:
    accumulator = np.array([[3, 2**24 + 1]], np.int32)
    bias, multiplier = np.array([2, 2], np.int32), np.array([0.1, 2.0**-20], np.float32)
    assert requantize(accumulator, bias, multiplier, INT8).tolist() == [
        [0, 16]
    ]  # 0.50000001 is 0.5 in float32


# Whole sub-blocks, written a second time with torch in float64 and plain loops.


def expected_sub_block(sub: SubBlock, x: Array, source: Grid, output: Grid) -> Array:
    threshold = torch.tensor(sub.conv.threshold).view(1, -1, 1, 1)
    values = torch.tensor(x).double()
    signs = (values >= threshold).double() * 2 - 1
    bits = "".join(f"{byte:08b}" for byte in sub.conv.sign_bits.tolist())[: math.prod(sub.conv.shape)]
    weight = torch.tensor([1.0 if bit == "1" else -1.0 for bit in bits]).double().view(sub.conv.shape)
    padding = sub.conv.kernel_size // 2
    accumulator = 64 * F.conv2d(signs, weight, stride=sub.conv.stride, padding=padding).numpy()
    total = (accumulator + sub.conv.bias.reshape(1, -1, 1, 1)).astype(np.float32)

    def put(v: Array, grid: Grid) -> Array:
        return np.clip(np.round(v.astype(np.float64)), grid.low, grid.high)

    def curve(v: Array, slopes: Slopes, grid: Grid) -> Array:
        slope = slopes.integers.reshape(1, -1, 1, 1) / 2.0**slopes.shift
        return np.where(v < 0, put(v * slope, grid), v)

    def number(multiplier: Dyadic) -> float:
        return multiplier.integer * 2.0**-multiplier.shift

    q = put(total * sub.conv.multiplier.reshape(1, -1, 1, 1), sub.y_grid)
    y = curve(q, sub.slopes, sub.y_grid)
    residual = x.astype(np.float64)
    if sub.kind == "scale":
        assert sub.residual_slopes is not None
        residual = curve(residual, sub.residual_slopes, source)
    even = torch.tensor(x).double()
    if sub.conv.stride == 2:
        right, bottom = x.shape[3] % 2, x.shape[2] % 2
        even = F.pad(even, (0, right, 0, bottom), mode="replicate")
        r = F.pad(torch.tensor(residual), (0, right, 0, bottom), mode="replicate")
        residual = put(F.avg_pool2d(r, 2).numpy(), source)
    branch = y
    if sub.branch is not None:
        if sub.attention is not None:
            a = sub.attention
            f32 = np.float32
            in_pixels, out_pixels = even.shape[2] * even.shape[3], y.shape[2] * y.shape[3]
            left = even.sum((2, 3)).numpy().astype(f32) * (a.input_mean / f32(in_pixels))
            right_ = y.sum((2, 3)).astype(f32) * (a.y_mean / f32(out_pixels))
            pooled = put(left + right_, a.pooled)
            hidden_sum = pooled @ a.reduce.weight.astype(np.float64).T + a.reduce.bias
            hidden = put(hidden_sum.astype(f32) * a.reduce.multiplier, a.hidden)
            logit_sum = hidden @ a.expand.weight.astype(np.float64).T + a.expand.bias
            logits = put(logit_sum.astype(f32) * a.expand.multiplier, a.logits)
            share = np.round(
                a.attention.high / (1 + np.exp(-logits * np.float64(np.float32(a.logits.scale))))
            )
            gain = put(share.astype(f32) * a.gain, INT8)[:, :, None, None]
        else:
            assert sub.branch.gain is not None
            gain = sub.branch.gain.astype(np.float64).reshape(1, -1, 1, 1)
        if sub.branch.product is not None:
            assert sub.branch.second is not None
            product = put(y * gain * number(sub.branch.first), sub.branch.product)
            branch = put(product * residual * number(sub.branch.second), sub.branch.grid)
        else:
            branch = put(y * gain * number(sub.branch.first), sub.branch.grid)
        branch = put(branch + sub.branch.offset.reshape(1, -1, 1, 1).astype(np.float64), sub.branch.grid)
    return put(branch * number(sub.branch_multiplier) + residual * number(sub.residual_multiplier), output)


@pytest.mark.parametrize("elm_attention", [True, False])
@pytest.mark.parametrize("infor_recoupling", [True, False])
@pytest.mark.parametrize("side", [7, slow(8)])
def test_a_sub_block_of_each_kind_equals_an_independent_computation(
    elm_attention: bool, infor_recoupling: bool, side: int
) -> None:
    options = {"elm_attention": elm_attention, "infor_recoupling": infor_recoupling}
    for extreme in (False, True):
        model = toy(1, **options)
        if extreme:
            make_extreme(model, 3)
        network = lowered(model)
        rng = np.random.default_rng(side)
        kinds = set()
        for sub, source, output in placed(network):
            spread = rng.normal(0, 40, (2, sub.conv.channels, side, side))
            x = np.clip(np.rint(spread), source.low, source.high).astype(np.int16)
            found = Interpreter(network).sub_block(sub, x, source, output)
            np.testing.assert_array_equal(found, expected_sub_block(sub, x, source, output), err_msg=sub.name)
            kinds.add((sub.kind, sub.conv.kernel_size, sub.conv.stride))
        assert {("bias", 3, 1), ("bias", 1, 1), ("scale" if elm_attention else "bias", 3, 1)} <= kinds
        assert any(stride == 2 for _, _, stride in kinds)


def test_stem_and_head_equal_an_independent_computation() -> None:
    network = ordinary()[1]
    interpreter = Interpreter(network)
    logits = interpreter(pixels(3, 2, 9).numpy())
    stem, tensors = network.stem, interpreter.tensors
    image = torch.tensor(tensors["image"]).double() - stem.image.zero_point
    acc = F.conv2d(image, torch.tensor(stem.conv.weight).double(), stride=stem.stride, padding=1).numpy()
    total = (acc + stem.conv.bias.reshape(1, -1, 1, 1)).astype(np.float32)
    trunk = np.clip(np.round(total * stem.conv.multiplier.reshape(1, -1, 1, 1)), -128, 127)
    np.testing.assert_array_equal(tensors["feature.0/trunk"], trunk)
    last, head = tensors["feature.3/trunk_out"], network.head
    slope = head.slopes.integers.reshape(1, -1, 1, 1) / 2.0**head.slopes.shift
    curved = np.where(last < 0, np.clip(np.round(last * slope), -128, 127), last)
    step = head.mean / np.float32(last.shape[2] * last.shape[3])
    pooled = np.clip(np.round(curved.sum((2, 3)).astype(np.float32) * step), head.input.low, head.input.high)
    expected = (pooled @ head.classifier.weight.astype(np.float64).T + head.classifier.bias).astype(
        np.float32
    )
    np.testing.assert_array_equal(logits, expected * head.classifier.multiplier)


# The fake-quantized torch network: in evaluation mode it computes the same integers.


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3), (IMAGENET_MEAN, IMAGENET_STD), (MEAN, STD)],
    ids=["0 to 1", "-1 to 1", "ImageNet", "here"],
)
def test_every_pixel_value_gets_the_integer_that_torch_gives_it(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    scale, zero_point = image_grid(mean, std)
    values = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 1).unsqueeze(2)
    images = normalize(values, mean, std)
    point = FixedQuantizer(scale, zero_point)
    network = ordinary()[1]
    stem = replace(network.stem, image=Grid(scale, 8, signed=False, zero_point=zero_point))
    interpreter = Interpreter(replace(network, stem=stem))
    interpreter(images.numpy())
    np.testing.assert_array_equal(interpreter.tensors["image"] - zero_point, point.steps(images).numpy())
    # Training rounds with a reciprocal: at most the integer beside it.
    trained = point(images).double().numpy() / np.float32(scale) + zero_point
    assert np.abs(interpreter.tensors["image"] - np.rint(trained)).max() <= 1


@pytest.mark.parametrize("elm_attention", [True, False])
@pytest.mark.parametrize("infor_recoupling", [True, False])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_the_evaluating_network_equals_the_interpreter_in_trunk_head_and_logits(
    elm_attention: bool, infor_recoupling: bool, stem_stride: int
) -> None:
    model = toy(0, elm_attention=elm_attention, infor_recoupling=infor_recoupling, stem_stride=stem_stride)
    images = pixels(5, 32, 16).numpy()
    assert list(torch_problems(model, lowered(model), images, sub_blocks=True)) == []


@pytest.mark.parametrize("elm_attention", [True, False])
def test_the_attention_s_vectors_equal_the_interpreter_s(elm_attention: bool) -> None:
    model = toy(0, elm_attention=elm_attention)
    network = lowered(model)
    for sub, source, target in placed(network):
        assert sub.attention is not None
        interpreter = Interpreter(network)
        x = on_grid(source, (4, sub.conv.channels, 6, 6))
        interpreter.sub_block(sub, x, source, target)
        pooled = torch.from_numpy(interpreter.tensors[f"{sub.name}/pooled"]).float()[:, :, None, None]
        found = model.get_submodule(f"{sub.name}.se").attention_steps(pooled)[:, :, 0, 0]
        np.testing.assert_array_equal(found.numpy(), interpreter.tensors[f"{sub.name}/attention"])


def test_the_comparison_with_torch_sees_a_difference_of_one_step() -> None:
    model, network, _ = ordinary()
    bias = network.stem.conv.bias.copy()
    bias[0] += round(1 / float(network.stem.conv.multiplier[0]))
    wrong = replace(network, stem=replace(network.stem, conv=replace(network.stem.conv, bias=bias)))
    problems = list(torch_problems(model, wrong, pixels(0, 2, 16).numpy(), sub_blocks=True))
    assert any("feature.0/trunk" in problem for problem in problems)
    spatial = replace(wrong.blocks[0].spatial, y_grid=Grid(1.0, 4, signed=True))
    wrong = replace(network, blocks=(replace(network.blocks[0], spatial=spatial), *network.blocks[1:]))
    problems = list(torch_problems(model, wrong, pixels(0, 2, 16).numpy(), sub_blocks=True))
    assert any(f"{spatial.name} alone differs" in problem for problem in problems)
