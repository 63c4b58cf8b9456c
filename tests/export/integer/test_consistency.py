"""The rules of a consistent network: what lowering gives keeps them, and each broken one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qat_export.integer.consistency import check_network
from qat_export.integer.network import IntegerNetwork

from qat.errors import QuantizationError
from qat.grid import Grid
from qat.quantize.dyadic import Dyadic
from tests.helpers.network_changes import at, changed
from tests.helpers.networks import lowered, make_extreme, ordinary, quantization, toy

#: In the network of these tests: bias kind with two 1×1 sub-blocks, and scale kind.
BIAS, SCALE, POINTWISE = "blocks.0.spatial", "blocks.1.spatial", "blocks.0.pointwise.1"
STEM_WIDTH, CLASSES = 8, 10


def first(value: float) -> Callable[[Any], Any]:
    """A copy of an array with its first element replaced."""

    def change(array: Any) -> Any:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


def fields(**changes: Any) -> Callable[[Any], Any]:
    """A copy of a dataclass with fields replaced."""
    return lambda value: replace(value, **changes)


def shorter(array: Any) -> Any:
    return array[:-1]


@pytest.mark.parametrize("elm_attention", [True, False])
@pytest.mark.parametrize("infor_recoupling", [True, False])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_every_architecture_is_consistent(
    elm_attention: bool, infor_recoupling: bool, stem_stride: int
) -> None:
    options = {"elm_attention": elm_attention, "infor_recoupling": infor_recoupling}
    check_network(lowered(toy(0, stem_stride=stem_stride, **options)))


@pytest.mark.parametrize("bits", [2, 5])
def test_every_width_of_the_grids_is_consistent(bits: int) -> None:
    check_network(lowered(toy(0, quantization(trunk=bits, se=bits, classifier=bits, se_weight=bits))))


@pytest.mark.parametrize("seed", range(3))
def test_extreme_parameters_give_a_consistent_network(seed: int) -> None:
    model = toy(seed)
    make_extreme(model, seed)
    check_network(lowered(model))


FACTS = [
    ("image_size", 0, r"^image_size: 0, expected at least 1$"),
    ("mean", (0.0, float("nan"), 0.0), r"^mean: \(0\.0, nan, 0\.0\), expected 3 finite numbers$"),
    ("mean", (0.0, 0.0), r"^mean: .*expected 3 finite numbers$"),
    ("std", (1.0, 0.0, 1.0), r"^std: .*expected 3 finite numbers above 0$"),
    ("std", (1.0, float("inf"), 1.0), r"^std: "),
    ("class_names", ("a",), r"^class_names: 1, but the classifier \(head\.classifier\) has 10 rows$"),
    ("blocks", (), r"^blocks: none; a network has at least one$"),
    ("blocks.1.name", "feature.1", r"^blocks\.1: the name 'feature\.1' occurs twice"),
    ("blocks.1.spatial.name", "feature.1.FFN_1", r"^blocks\.1: the name 'feature\.1\.FFN_1' occurs twice"),
    ("blocks.0.name", "head", r"^blocks\.0: the name 'head' occurs twice"),
]
GRIDS = [
    ("stem_grid.scale", 0.0, r"^stem_grid\.scale: 0\.0, expected a finite number above 0$"),
    (f"{BIAS}.y_grid.scale", float("inf"), r"^blocks\.0\.spatial\.y_grid\.scale: inf"),
    (f"{BIAS}.branch.grid.scale", float("nan"), r"^blocks\.0\.spatial\.branch\.grid\.scale: nan"),
    (f"{SCALE}.branch.product.scale", -1.0, r"^blocks\.1\.spatial\.branch\.product\.scale: -1\.0"),
    ("head.input.bits", 1, r"^head\.input\.bits: 1, allowed: 2 to 8$"),
    ("blocks.0.middle_grid.bits", 9, r"^blocks\.0\.middle_grid\.bits: 9"),
    ("blocks.2.output_grid.signed", False, r"^blocks\.2\.output_grid\.signed: False, expected True$"),
    (f"{BIAS}.attention.hidden.signed", True, r"\.attention\.hidden\.signed: True, expected False$"),
    (f"{BIAS}.attention.logits.zero_point", 1, r"\.attention\.logits\.zero_point: 1, allowed: 0$"),
    ("stem.image.zero_point", 256, r"^stem\.image\.zero_point: 256, allowed: 0 to 255$"),
    ("blocks.1.input_grid", Grid(1.0, 8, True), r"^blocks\.1\.input_grid: Grid\(.*what comes before gives"),
    ("blocks.0.output_grid.scale", 1.0, r"^blocks\.1\.input_grid: "),
]
LAYERS = [
    ("stem.stride", 3, r"^stem\.stride: 3, allowed: 1, 2$"),
    (
        "stem.conv.weight",
        lambda w: w[:, :2],
        r"^stem\.conv\.weight: shape \[8, 2, 3, 3\], expected \[8, 3, 3, 3\]$",
    ),
    ("stem.conv.multiplier", shorter, r"^stem\.conv\.weight: shape \[8, 3, 3, 3\], expected \[7, 3, 3, 3\]$"),
    (
        "stem.conv.multiplier",
        np.float32(1).reshape(()),
        r"^stem\.conv\.weight: shape .*expected \[1, 3, 3, 3\]$",
    ),
    ("stem.conv.bias", shorter, r"^stem\.conv\.bias: shape \[7\], expected \[8\]$"),
    ("stem.conv.bias", first(2**31 - 1), r"^stem\.conv\.bias: with the largest accumulator .* int32$"),
    ("stem.conv.bias", first(-(2**31)), r"^stem\.conv\.bias: with the largest accumulator .* int32$"),
    ("stem.conv.multiplier", first(0), r"^stem\.conv\.multiplier: found 0\.0, expected numbers above 0$"),
    ("stem.conv.multiplier", first(float("nan")), r"^stem\.conv\.multiplier: holds NaN or infinity$"),
    ("stem.conv.multiplier", first(1e36), r"^stem\.conv\.multiplier: 1e\+36 times .* no float32 number$"),
    (f"{BIAS}.conv.threshold", first(129), r"\.conv\.threshold: found .* to 129, allowed: -128 to 128$"),
    (f"{BIAS}.conv.threshold", first(-129), r"\.conv\.threshold: found -129 to "),
    (
        f"{BIAS}.conv.threshold",
        shorter,
        r"^blocks\.0\.spatial\.conv\.threshold: shape \[7\], expected \[8\]$",
    ),
    (f"{BIAS}.conv.kernel_size", 5, r"\.conv\.kernel_size: 5, expected 3$"),
    (f"{POINTWISE}.conv.kernel_size", 3, r"pointwise\.1\.conv\.kernel_size: 3, expected 1$"),
    (f"{BIAS}.conv.stride", 0, r"\.conv\.stride: 0, allowed: 1, 2$"),
    (f"{POINTWISE}.conv.stride", 2, r"^blocks\.0\.pointwise\.1: stride 2, kind 'bias'; a 1×1 sub-block"),
    (f"{BIAS}.conv.sign_bits", shorter, r"\.conv\.sign_bits: shape \[71\], expected \[72\]$"),
    (f"{BIAS}.conv.bias", shorter, r"^blocks\.0\.spatial\.conv\.bias: shape"),
    (f"{BIAS}.conv.bias", first(2**31 - 1), r"^blocks\.0\.spatial\.conv\.bias: with the largest"),
    (f"{POINTWISE}.conv.multiplier", first(-1), r"pointwise\.1\.conv\.multiplier: found -1\.0"),
    (f"{POINTWISE}.conv.multiplier", first(float("inf")), r"pointwise\.1\.conv\.multiplier: holds NaN"),
    (
        "head.classifier.weight",
        lambda w: w[:, 1:],
        r"^head\.classifier\.weight: shape \[10, 31\], expected \[10, 32\]$",
    ),
    ("head.classifier.multiplier", first(3e38), r"^head\.classifier\.multiplier: 3e\+38 times"),
    ("head.mean", np.float32(0), r"^head\.mean: a multiplier of 0\.0"),
    ("head.mean", np.float32("nan"), r"^head\.mean: a multiplier of nan"),
    ("blocks.2.pointwise", (), r"^blocks\.2\.pointwise: 0 sub-blocks, allowed: 1, 2$"),
    ("blocks.2.pointwise", lambda subs: subs[:1], r"^head\.slopes\.integers: shape \[32\], expected \[16\]$"),
]
SLOPES = [
    (
        f"{BIAS}.slopes.integers",
        shorter,
        r"^blocks\.0\.spatial\.slopes\.integers: shape \[7\], expected \[8\]$",
    ),
    ("head.slopes.shift", 15, r"^head\.slopes\.shift: 15, allowed: up to 14$"),
    (
        "head.slopes",
        fields(shift=-127, integers=np.full(32, 2, np.int8)),
        r"^head\.slopes\.shift: -127, a slope",
    ),
    ("head.slopes.shift", -(10**9), r"^head\.slopes\.shift: -1000000000, a slope is no float32 number$"),
    (f"{SCALE}.residual_slopes.shift", 99, r"^blocks\.1\.spatial\.residual_slopes\.shift: 99"),
]
BRANCHES = [
    (
        f"{BIAS}.kind",
        "scale",
        r"^blocks\.0\.spatial\.residual_slopes: missing, which contradicts kind 'scale'$",
    ),
    (f"{SCALE}.kind", "bias", r"^blocks\.1\.spatial\.residual_slopes: there, which contradicts kind 'bias'$"),
    (f"{SCALE}.residual_slopes", None, r"residual_slopes: missing"),
    (f"{SCALE}.branch.product", None, r"\.branch\.product: missing, which contradicts kind 'scale'$"),
    (f"{SCALE}.branch.second", None, r"\.branch\.second: missing, which contradicts kind 'scale'$"),
    (f"{BIAS}.branch.second", Dyadic(1, 1), r"\.branch\.second: there, which contradicts kind 'bias'$"),
    (
        f"{BIAS}.branch",
        None,
        r"^blocks\.0\.spatial\.branch: missing; kind 'scale' and channel attention need",
    ),
    (f"{BIAS}.attention", None, r"\.branch\.gain: missing, which contradicts a sub-block without attention$"),
    (
        f"{BIAS}.branch.gain",
        np.ones(STEM_WIDTH, np.int8),
        r"\.branch\.gain: there, which contradicts a sub-block with attention$",
    ),
    (f"{BIAS}.branch.offset", shorter, r"\.branch\.offset: shape"),
    (f"{BIAS}.branch.first", Dyadic(1024, 3), r"\.branch\.first\.integer: 1024, allowed: 0 to 1023$"),
    (f"{BIAS}.branch.first", Dyadic(-1, 3), r"\.branch\.first\.integer: -1, "),
    (f"{SCALE}.branch.second", Dyadic(1, 17), r"\.branch\.second\.shift: 17, allowed: -117 to 16$"),
    (f"{BIAS}.branch_multiplier", Dyadic(1, -114), r"\.branch_multiplier\.shift: -114, allowed: -113 to 16$"),
    (f"{BIAS}.residual_multiplier", Dyadic(2**14, 3), r"\.residual_multiplier\.integer: 16384"),
    (f"{BIAS}.residual_multiplier", Dyadic(1, 16), r"\.residual_multiplier: its shift is not that of branch"),
]
ATTENTION = [
    (f"{BIAS}.attention.input_mean", first(float("nan")), r"\.attention\.input_mean: holds NaN or infinity$"),
    (f"{BIAS}.attention.y_mean", shorter, r"\.attention\.y_mean: shape \[7\], expected \[8\]$"),
    (f"{BIAS}.attention.gain", first(float("-inf")), r"\.attention\.gain: holds NaN or infinity$"),
    (f"{BIAS}.attention.reduce.weight", lambda w: w[:, 1:], r"\.attention\.reduce\.weight: shape \[1, 7\]"),
    (
        f"{BIAS}.attention.expand.weight",
        lambda w: w.T,
        r"\.attention\.expand\.weight: shape \[1, 8\], expected",
    ),
    (f"{BIAS}.attention.table", shorter, r"\.attention\.table: shape \[255\], expected \[256\]$"),
    (f"{BIAS}.attention.attention.bits", 7, r"\.attention\.table: found \d+, allowed: up to 127$"),
    (
        f"{BIAS}.attention.reduce",
        lambda a: replace(a, weight=a.weight[:0], bias=a.bias[:0], multiplier=a.multiplier[:0]),
        r"\.attention\.reduce\.weight: shape \[0, 8\], expected sides of at least 1$",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), [*FACTS, *GRIDS, *LAYERS, *SLOPES, *BRANCHES, *ATTENTION]
)
def test_a_broken_rule_is_refused_by_the_field_s_name(path: str, value: Any, message: str) -> None:
    network = ordinary()[1]
    check_network(network)
    with pytest.raises(QuantizationError, match=message):
        check_network(changed(network, path, value))


EDGES: list[tuple[str, Any]] = [
    (f"{BIAS}.conv.threshold", first(128)),
    (f"{BIAS}.conv.threshold", first(-128)),
    ("stem.image.zero_point", 0),
    ("stem.image.zero_point", 255),
    ("head.slopes", fields(shift=-127, integers=np.full(32, 1, np.int8))),
    (f"{BIAS}.branch.first", Dyadic(1023, 16)),
    (f"{BIAS}.attention.gain", first(-0.0)),
    ("image_size", 1),
    ("mean", (0.0, -1e30, 3.0)),
]


@pytest.mark.parametrize(("path", "value"), EDGES)
def test_the_last_value_that_a_rule_allows_is_accepted(path: str, value: Any) -> None:
    check_network(changed(ordinary()[1], path, value))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_that_just_fits_int32_with_every_accumulator_is_accepted(sign: int) -> None:
    network = ordinary()[1]
    conv = at(network, f"{POINTWISE}.conv")
    limit = 2**31 - 1 - 64 * conv.channels
    tiny = changed(network, f"{POINTWISE}.conv.multiplier", lambda m: np.full_like(m, 2.0**-22))
    check_network(changed(tiny, f"{POINTWISE}.conv.bias", first(sign * limit)))
    with pytest.raises(QuantizationError, match="does not fit int32"):
        check_network(changed(tiny, f"{POINTWISE}.conv.bias", first(sign * (limit + 1))))


def odd_network() -> IntegerNetwork:
    """Sign bits that leave the last byte partly free."""
    return lowered(toy(0, widths=(3, 3, 6)))


def test_bits_beyond_the_last_weight_are_refused() -> None:
    network = odd_network()
    check_network(network)
    assert at(network, BIAS).conv.sign_bits.shape == (11,)  # 81 bits
    wrong = changed(
        network, f"{BIAS}.conv.sign_bits", lambda bits: bits | (np.arange(11) == 10).astype(np.uint8)
    )
    with pytest.raises(QuantizationError, match=r"sign_bits: bits are set beyond the last weight$"):
        check_network(wrong)


MODULES = [
    (f"{BIAS}.conv.bias", r"^feature\.1\.Attention\.conv\.bias: "),
    (f"{POINTWISE}.slopes.integers", r"^feature\.1\.FFN_2\.slopes\.integers: "),
    (f"{BIAS}.attention.gain", r"^feature\.1\.Attention\.se\.gain: "),
    ("stem.conv.bias", r"^feature\.0\.conv\.bias: "),
    ("head.slopes.integers", r"^prelu\.integers: "),
    ("head.classifier.bias", r"^fc\.bias: "),
]


@pytest.mark.parametrize(("path", "message"), MODULES)
def test_problems_are_named_by_module_on_request(path: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        check_network(changed(ordinary()[1], path, shorter), by_module=True)
