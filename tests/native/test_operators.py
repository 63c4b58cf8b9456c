"""Every native operator equals the interpreter's functions exactly, on every set of kernels that runs."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from qat_export.integer import reference
from qat_export.integer.network import Affine, Attention, Slopes
from qat_export.integer.reference import F32, Interpreter

from qat.grid import Grid
from qat.quantize.dyadic import PRODUCT_BITS, SUM_BITS, Dyadic
from tests.helpers.native_models import (
    KERNELS,
    Array,
    Fed,
    Node,
    channels_first,
    channels_last,
    needs_library,
    pack,
)

pytestmark = needs_library

Random = np.random.Generator
CASES = 24


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs once with each set; sessions read the variable when they are made."""
    monkeypatch.setenv("BNEXT_QAT_KERNELS", request.param)
    name: str = request.param
    return name


def a_grid(random: Random, signed: bool = True) -> Grid:
    return Grid(1.0, int(random.integers(2, 9)), signed)


def integers(random: Random, low: int, high: int, *shape: int, dtype: type = np.int8) -> Array:
    return random.integers(low, high + 1, shape).astype(dtype)


def on(grid: Grid, random: Random, *shape: int) -> Array:
    """Values on a grid, one in four of them at one of its ends."""
    values = integers(random, grid.low, grid.high, *shape)
    ends = np.where(random.random(shape) < 0.5, grid.low, grid.high)
    return np.where(random.random(shape) < 0.25, ends, values).astype(np.int8)


def some_slopes(random: Random, channels: int) -> Slopes:
    """Slopes beyond 1 and negative ones too."""
    shift = int(random.choice([-2, 0, 3, 6, 7, 10, 14]))
    return Slopes(integers(random, -128, 127, channels), shift)


def some_multipliers(random: Random, count: int, scale: float) -> Array:
    """Around ``scale``, or far from it, or so large that products are infinite; ties are frequent."""
    exact = np.ldexp(1.0, np.round(np.log2(scale) + random.integers(-2, 3, count)).astype(int))
    kind = random.integers(0, 12, count)
    values = np.where(kind < 4, exact, scale * np.exp(random.normal(0, 1, count)))
    values = np.where(kind == 9, 1e-30, np.where(kind == 10, 3e38, np.where(kind == 11, 1e30, values)))
    return values.astype(F32)


def channels_of(random: Random) -> int:
    return int(random.choice([random.integers(1, 201), random.choice([1, 31, 32, 33, 63, 64, 65, 128])]))


def size_of(random: Random) -> tuple[int, int]:
    return int(random.integers(1, 12)), int(random.integers(1, 12))


# ---- BinaryConv


def binary_convolution(
    random: Random, images: int, size: tuple[int, int], inputs: int, outputs: int, kernel: int, stride: int
) -> tuple[Node, list[Array]]:
    """A convolution, and what the interpreter's functions make of it: y, sums of y, sums of x."""
    x = channels_first(on(a_grid(random), random, images, *size, inputs))
    threshold = integers(random, -128, 128, inputs, dtype=np.int16)
    threshold[random.random(inputs) < 0.2] = random.choice([-128, 128, 127, -127, 0])
    weight = random.choice(np.array([-1, 1], np.int8), (outputs, inputs, kernel, kernel))
    spread = float(np.sqrt(inputs) * kernel * 64)
    bias = (random.normal(0, 2 * spread, outputs)).astype(np.int32)
    extreme = random.random(outputs) < 0.1
    bias[extreme] = random.choice([-(2**31), 2**31 - 1, 2**30, -(2**24) - 1], extreme.sum())
    multiplier = some_multipliers(random, outputs, 50 / spread)
    grid, slopes = a_grid(random), some_slopes(random, outputs)
    node = Node(
        "BinaryConv",
        [Fed(channels_last(x)), pack(weight), threshold, bias, multiplier, slopes.integers],
        {"stride": stride, "low": grid.low, "high": grid.high, "slope_shift": slopes.shift},
    )
    bits = reference.signs(x, SimpleNamespace(threshold=threshold))
    with np.errstate(over="ignore"):
        accumulator = reference.convolve(bits, weight, stride) * 64
        y = reference.prelu(reference.requantize(accumulator, bias, multiplier, grid), slopes, grid)
    padded = reference.pad_to_even(x) if stride == 2 else x
    return node, [channels_last(y), y.sum((2, 3)), padded.sum((2, 3), dtype=np.int32)]


def assert_equal(results: list[Array], expected: list[Array], message: str) -> None:
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, value, err_msg=message)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_binary_convolutions_equal_the_reference(kernel: int, stride: int) -> None:
    random = np.random.default_rng(kernel * 10 + stride)
    for case in range(CASES):
        images = [1, 3, 0, 2][case % 4]
        shape = images, size_of(random), channels_of(random), channels_of(random)
        node, expected = binary_convolution(random, *shape, kernel, stride)
        assert_equal(node.run(), expected, f"case {case}: {shape}")


@pytest.mark.parametrize("stride", [1, 2])
def test_work_is_shared_by_threads_without_a_difference(stride: int) -> None:
    random = np.random.default_rng(stride)
    for kernel, images, size, inputs, outputs in [(3, 2, (65, 43), 70, 72), (1, 1, (90, 31), 130, 300)]:
        node, expected = binary_convolution(random, images, size, inputs, outputs, kernel, stride)
        for threads in (1, 2, 3):
            assert_equal(node.run(threads), expected, f"{threads} threads, {size}")


def test_more_channels_than_a_counter_of_bytes_holds() -> None:
    """Populations are counted in bytes on some processors: 3×3 windows of 1100 channels fill them."""
    random = np.random.default_rng(5)
    node, expected = binary_convolution(random, 1, (3, 4), 1100, 20, 3, 1)
    x = node.inputs[0]
    assert isinstance(x, Fed)
    assert_equal(node.run(), expected, "random")
    node.inputs[1] = np.zeros_like(node.inputs[1])  # all -1, against all +1: every bit counts
    node.inputs[2] = np.full(1100, -128, np.int16)
    node.inputs[3], node.inputs[4] = np.zeros(20, np.int32), np.full(20, 2.0**-13, F32)
    node.inputs[5], node.attributes["slope_shift"] = np.ones(20, np.int8), 0
    node.attributes |= {"low": -128, "high": 127}
    windows = np.array([4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4]).reshape(1, 3, 4, 1)
    expected_y = np.rint(-1100 * 64 * windows / 2**13) * np.ones(20)
    np.testing.assert_array_equal(node.run()[0], expected_y)


def test_halves_are_rounded_to_even() -> None:
    biases = np.array([0, 128, 256, 384, -128, -256, -384, -512], np.int32)  # ± 1 · 64 on top, half of it
    count = len(biases)
    node = Node(
        "BinaryConv",
        [
            Fed(np.array([5, -5], np.int8).reshape(1, 1, 2, 1)),
            np.ones((count, 1, 1, 1), np.uint8),
            np.zeros(1, np.int16),
            biases,
            np.full(count, 2.0**-7, F32),
            np.full(count, 1, np.int8),
        ],
        {"stride": 1, "low": -128, "high": 127, "slope_shift": 1},
    )
    plus = [0, 2, 2, 4, 0, -1, -1, -2]  # 0.5 1.5 2.5 3.5 -0.5 -1.5→-2→-1 -2.5→-2→-1 -3.5→-4→-2
    minus = [0, 0, 2, 2, -1, -1, -2, -2]  # -0.5 0.5 1.5 2.5 -1.5→-2→-1 -2.5→-2→-1 -3.5→-4→-2 -4.5→-4→-2
    np.testing.assert_array_equal(node.run()[0].reshape(2, count), [plus, minus])


def test_a_threshold_of_128_lets_nothing_through_and_one_of_minus_128_everything() -> None:
    x = np.array([-128, 0, 127], np.int8).reshape(1, 1, 3, 1)
    for threshold, sign in [(128, -1), (-128, 1)]:
        constants = [np.array([threshold], np.int16), np.zeros(1, np.int32), np.full(1, 1 / 64, F32)]
        weight = np.ones((1, 1, 1, 1), np.uint8)
        attributes: dict[str, int | float] = {"stride": 1, "low": -128, "high": 127, "slope_shift": 0}
        node = Node("BinaryConv", [Fed(x), weight, *constants, np.ones(1, np.int8)], attributes)
        np.testing.assert_array_equal(node.run()[0].ravel(), [sign] * 3)


def test_bits_beyond_the_last_channel_do_not_count() -> None:
    random = np.random.default_rng(8)
    node, expected = binary_convolution(random, 2, (5, 4), 13, 9, 3, 1)
    weight = node.inputs[1]
    assert isinstance(weight, np.ndarray)
    weight[..., -1] |= 0b1110_0000
    assert_equal(node.run(), expected, "set bits beyond channel 13")


@pytest.mark.parametrize("outputs", [["y"], ["y", "y_sum"], ["y", "x_sum"]])
def test_sums_that_nobody_reads_are_left_out(outputs: list[str]) -> None:
    random = np.random.default_rng(3)
    node, expected = binary_convolution(random, 2, (5, 7), 40, 24, 3, 2)
    wanted = [expected[["y", "y_sum", "x_sum"].index(name)] for name in outputs]
    assert_equal(node.run(outputs=outputs), wanted, str(outputs))


# ---- TrunkUpdate


def trunk_update(
    random: Random, images: int, size: tuple[int, int], channels: int, stride: int, kind: str, prelu: bool
) -> tuple[Node, Array]:
    """``kind``: ``plain`` (y is the branch), ``fixed`` or ``attention`` gain, both also with ``scales``."""
    out_size = tuple((side + stride - 1) // stride for side in size)
    source, y_grid, branch_grid, product, output = (a_grid(random) for _ in range(5))
    x = on(source, random, images, channels, *size)
    y = on(y_grid, random, images, channels, *out_size)
    of_sum = random.integers(0, 2**SUM_BITS, 2) * (random.random(2) < 0.9)
    shift = int(random.integers(2, 17))
    branch_multiplier, residual_multiplier = (Dyadic(int(value), shift) for value in of_sum)
    first, second = (
        Dyadic(int(random.integers(0, 2**PRODUCT_BITS)), int(random.choice([-3, 6, 9, 12, 16])))
        for _ in range(2)
    )
    slopes = some_slopes(random, channels) if prelu else None
    offset = integers(random, -128, 127, channels) if kind != "plain" else None
    rows = images if "attention" in kind else 1
    gain = integers(random, -128, 127, rows, channels) if kind != "plain" else None
    scales = "scales" in kind

    residual: Array = x.astype(np.int16)
    if slopes is not None:
        residual = reference.prelu(residual, slopes, source)
    if stride == 2:
        residual = reference.pool2x2(residual, source)
    branch: Array = y.astype(np.int16)
    if gain is not None and offset is not None:
        wide = gain[:, :, None, None]
        if scales:
            branch = reference.multiply(branch, wide, first, product)
            branch = reference.multiply(branch, residual, second, branch_grid)
        else:
            branch = reference.multiply(branch, wide, first, branch_grid)
        branch = reference.saturate(branch + offset.reshape(1, -1, 1, 1).astype(np.int32), branch_grid)
    total = branch * branch_multiplier.value + residual * residual_multiplier.value

    fed_gain = Fed(gain) if gain is not None and "attention" in kind else gain
    inputs = [
        Fed(channels_last(y)),
        Fed(channels_last(x)),
        fed_gain,
        offset,
        slopes.integers if slopes else None,
    ]
    while inputs[-1] is None:
        inputs.pop()
    node = Node(
        "TrunkUpdate",
        inputs,
        {
            "stride": stride,
            "scales": int(scales),
            "residual_low": source.low,
            "residual_high": source.high,
            "residual_shift": slopes.shift if slopes else 0,
            "first": first.value,
            "product_low": product.low,
            "product_high": product.high,
            "second": second.value,
            "branch_low": branch_grid.low,
            "branch_high": branch_grid.high,
            "branch_multiplier": branch_multiplier.value,
            "residual_multiplier": residual_multiplier.value,
            "low": output.low,
            "high": output.high,
        },
    )
    return node, channels_last(reference.saturate(total, output))


@pytest.mark.parametrize("prelu", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "fixed", "attention", "fixed scales", "attention scales"])
def test_trunk_updates_equal_the_reference(kind: str, stride: int, prelu: bool) -> None:
    random = np.random.default_rng(len(kind) * 4 + stride * 2 + prelu)
    for case in range(CASES // 4):
        images, size, channels = [1, 3, 0, 2][case % 4], size_of(random), channels_of(random)
        node, expected = trunk_update(random, images, size, channels, stride, kind, prelu)
        assert_equal(node.run(), [expected], f"case {case}: {images}, {size}, {channels} channels")


def test_trunk_updates_are_shared_by_threads_without_a_difference() -> None:
    random = np.random.default_rng(4)
    for stride in (1, 2):
        node, expected = trunk_update(random, 2, (41, 33), 100, stride, "attention scales", True)
        for threads in (1, 2, 3):
            assert_equal(node.run(threads), [expected], f"stride {stride}, {threads} threads")


# ---- ChannelAttention


def channel_attention(random: Random, images: int, channels: int, hidden: int) -> tuple[Node, Array]:
    x = on(a_grid(random), random, images, channels, 5, 3).astype(np.int16)
    y = on(a_grid(random), random, images, channels, 3, 2).astype(np.int16)

    def affine(outputs: int, inputs: int) -> Affine:
        spread = 60.0 * np.sqrt(inputs) * 60
        bias = random.normal(0, spread, outputs).astype(np.int32)
        bias[random.random(outputs) < 0.05] = random.choice([-(2**31), 2**31 - 1])
        multiplier = some_multipliers(random, outputs, 60 / spread)
        return Affine(integers(random, -128, 127, outputs, inputs), bias, multiplier)

    attention = Attention(
        input_mean=random.normal(1, 1, channels).astype(F32),
        y_mean=some_multipliers(random, channels, 0.5),
        pooled=a_grid(random),
        reduce=affine(hidden, channels),
        hidden=a_grid(random, signed=False),
        expand=affine(channels, hidden),
        logits=a_grid(random),
        table=integers(random, 0, 255, 256, dtype=np.uint8),
        attention=Grid(1 / 255, 8, signed=False),
        gain=(random.normal(0, 1, channels) * random.choice([1e-3, 0.5, 2.0, 1e37])).astype(F32),
    )
    with np.errstate(over="ignore"):
        expected = Interpreter(None).attention(attention, x, y, "attention")  # type: ignore[arg-type]
    node = Node(
        "ChannelAttention",
        [
            Fed(x.sum((2, 3), dtype=np.int32)),
            Fed(y.sum((2, 3), dtype=np.int32)),
            attention.input_mean / F32(15),
            attention.y_mean / F32(6),
            *(attention.reduce.weight, attention.reduce.bias, attention.reduce.multiplier),
            *(attention.expand.weight, attention.expand.bias, attention.expand.multiplier),
            attention.table,
            attention.gain,
        ],
        {
            "pooled_low": attention.pooled.low,
            "pooled_high": attention.pooled.high,
            "hidden_low": attention.hidden.low,
            "hidden_high": attention.hidden.high,
            "logits_low": attention.logits.low,
            "logits_high": attention.logits.high,
        },
    )
    return node, expected


def test_channel_attention_equals_the_reference() -> None:
    random = np.random.default_rng(6)
    for case in range(CASES):
        images, channels, hidden = [1, 3, 0, 2][case % 4], channels_of(random), int(random.integers(1, 70))
        node, expected = channel_attention(random, images, channels, hidden)
        assert_equal(node.run(), [expected], f"case {case}: {images}, {channels} channels, {hidden} hidden")


# ---- Stem and head


def stem(
    random: Random, images: int, size: tuple[int, int], channels: int, stride: int
) -> tuple[Node, Array]:
    image = integers(random, 0, 255, images, 3, *size, dtype=np.uint8)
    zero_point, grid = int(random.integers(0, 256)), a_grid(random)
    weight = integers(random, -128, 127, channels, 3, 3, 3)
    bias = random.normal(0, 30000, channels).astype(np.int32)
    bias[random.random(channels) < 0.1] = random.choice([-(2**31), 2**31 - 1, 2**24 + 1])
    multiplier = some_multipliers(random, channels, 2.0**-10)
    node = Node(
        "Stem",
        [Fed(image), weight, bias, multiplier],
        {"stride": stride, "zero_point": zero_point, "low": grid.low, "high": grid.high},
    )
    with np.errstate(over="ignore"):
        accumulator = reference.convolve(image.astype(np.int16) - zero_point, weight, stride)
        return node, channels_last(reference.requantize(accumulator, bias, multiplier, grid))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_stem_equals_the_reference(stride: int) -> None:
    random = np.random.default_rng(stride)
    for case in range(CASES):
        images, size, channels = [1, 3, 0, 2][case % 4], size_of(random), channels_of(random)
        node, expected = stem(random, images, size, channels, stride)
        assert_equal(node.run(), [expected], f"case {case}: {images}, {size}, {channels} channels")
    node, expected = stem(random, 2, (70, 53), 20, stride)
    for threads in (1, 2, 3):
        assert_equal(node.run(threads), [expected], f"{threads} threads")


def test_channel_sums_equal_the_reference() -> None:
    random = np.random.default_rng(7)
    for case in range(CASES):
        images, size, channels = [1, 3, 0, 2][case % 4], size_of(random), channels_of(random)
        grid, slopes = a_grid(random), some_slopes(random, channels)
        x = on(grid, random, images, *size, channels)
        attributes: dict[str, int | float] = {"low": grid.low, "high": grid.high, "slope_shift": slopes.shift}
        node = Node("ChannelSums", [Fed(x), slopes.integers], attributes)
        activated = reference.prelu(channels_first(x).astype(np.int16), slopes, grid)
        for threads in (1, 2):
            assert_equal(node.run(threads), [activated.sum((2, 3))], f"case {case}: {x.shape}, {grid}")


# ---- Sessions


def test_one_session_serves_several_threads_at_once() -> None:
    random = np.random.default_rng(9)
    node, _ = binary_convolution(random, 1, (14, 14), 96, 96, 3, 1)
    session = node.session(threads=2)
    inputs = [integers(random, -128, 127, 1 + i % 3, 14, 14 + i % 2, 96) for i in range(8)]
    expected = [session.run(None, {"i0": x}) for x in inputs]
    failures: list[str] = []

    def work(start: int) -> None:
        for i in range(start, start + 40):
            results = session.run(None, {"i0": inputs[i % 8]})
            if not all(np.array_equal(a, b) for a, b in zip(results, expected[i % 8], strict=True)):
                failures.append(f"run {i}")

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_sessions_with_different_kernels_live_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(10)
    node, expected = binary_convolution(random, 1, (6, 6), 70, 40, 3, 1)
    sessions = []
    for name in KERNELS:
        monkeypatch.setenv("BNEXT_QAT_KERNELS", name)
        sessions.append(node.session())
    for session in sessions:
        assert_equal(session.run(None, node.feeds()), expected, "one of many")
