"""The rules of a consistent integer network, on which the interpreter and the exports rely.

They are checked after lowering, before a file is written, and after a file is read. Types of fields are not
checked here. For files, :mod:`qat_export.integer.fields` makes sure that they are those of the annotations in
:mod:`qat_export.integer.network`.
"""

from __future__ import annotations

import math
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from qat.errors import QuantizationError
from qat.grid import Grid
from qat.quantize.dyadic import ACCUMULATOR_UNIT, LARGEST_SHIFT, PRODUCT_BITS, SUM_BITS, Dyadic
from qat_export.integer.network import (
    ALWAYS,
    NEVER,
    Affine,
    Attention,
    BinaryConv,
    Block,
    Branch,
    Head,
    IntegerNetwork,
    Slopes,
    SubBlock,
)

Array = NDArray[Any]
_INT32: Final = 2**31 - 1
_FLOAT32: Final = float(np.finfo(np.float32).max)
#: Largest shift of slopes: :func:`qat.quantize.folding.slope_scale` gives no scale below 2^-14.
_SLOPE_SHIFT: Final = 14


def check_network(network: IntegerNetwork, *, by_module: bool = False) -> None:
    """Refuse a network whose parts don't fit each other, or whose values the arithmetic does not allow.

    Args:
        network: the network, with fields of the annotated types.
        by_module: whether messages name modules of the torch network, such as ``feature.4.FFN.conv.bias``;
            else they name fields, as tensors in a file are named, such as ``blocks.3.pointwise.0.conv.bias``.

    Raises:
        QuantizationError: on the first problem; the message names the module or field.
    """
    _check_facts(network)
    stem = network.stem
    stem_name = "feature.0" if by_module else "stem"
    channels = stem.conv.multiplier.size
    _check_grid(stem.image, f"{stem_name}.image", signed=False, zero_point=None)
    _check_stride(stem.stride, stem_name)
    _check_affine(stem.conv, (channels, 3, 3, 3), stem.image, f"{stem_name}.conv")
    _check_grid(network.stem_grid, "feature.0.trunk" if by_module else "stem_grid", signed=True)
    source, taken = network.stem_grid, {"feature.0", "head"}
    if not network.blocks:
        _refuse("blocks", "none; a network has at least one")
    for index, block in enumerate(network.blocks):
        name = block.name if by_module else f"blocks.{index}"
        for own in (block.name, block.spatial.name, *(sub.name for sub in block.pointwise)):
            if own in taken:
                _refuse(name, f"the name {own!r} occurs twice; names of tensors are made of it")
            taken.add(own)
        channels = _check_block(block, channels, source, name, by_module=by_module)
        source = block.output_grid
    _check_head(network.head, channels, source, len(network.class_names), by_module=by_module)


def _check_facts(network: IntegerNetwork) -> None:
    if network.image_size < 1:
        _refuse("image_size", f"{network.image_size}, expected at least 1")
    for name, values, lowest in (("mean", network.mean, -_FLOAT32), ("std", network.std, 0.0)):
        if len(values) != 3 or not all(lowest < value <= _FLOAT32 for value in values):
            _refuse(name, f"{values}, expected 3 finite numbers{'' if lowest else ' above 0'}")


def _check_block(block: Block, channels: int, source: Grid, name: str, *, by_module: bool) -> int:
    """Check a block that reads ``channels`` channels; returns the number of channels of its output."""
    if block.input_grid != source:
        _refuse(f"{name}.input_grid", f"{block.input_grid}, but what comes before gives {source}")
    _check_grid(block.middle_grid, f"{name}.middle_grid", signed=True)
    _check_grid(block.output_grid, f"{name}.output_grid", signed=True)
    if len(block.pointwise) not in (1, 2):
        _refuse(f"{name}.pointwise", f"{len(block.pointwise)} sub-blocks, allowed: 1, 2")
    spatial = block.spatial
    _check_sub_block(spatial, channels, 3, f"{name}.spatial", by_module=by_module)
    for index, sub in enumerate(block.pointwise):
        part = f"{name}.pointwise.{index}"
        _check_sub_block(sub, channels, 1, part, by_module=by_module)
        if sub.conv.stride != 1 or sub.kind != "bias":
            _refuse(part, f"stride {sub.conv.stride}, kind {sub.kind!r}; a 1×1 sub-block has 1 and 'bias'")
    return channels * len(block.pointwise)


def _check_sub_block(sub: SubBlock, channels: int, kernel_size: int, field: str, *, by_module: bool) -> None:
    name, attention = (sub.name, f"{sub.name}.se") if by_module else (field, f"{field}.attention")
    _check_binary_conv(sub.conv, channels, f"{name}.conv", kernel_size)
    _check_grid(sub.y_grid, f"{name}.y_grid", signed=True)
    _check_slopes(sub.slopes, channels, f"{name}.slopes")
    scale = sub.kind == "scale"
    _require(sub.residual_slopes, scale, f"{name}.residual_slopes", f"kind {sub.kind!r}")
    if sub.residual_slopes is not None:
        _check_slopes(sub.residual_slopes, channels, f"{name}.residual_slopes")
    if sub.branch is not None:
        static = sub.attention is None
        reason = f"a sub-block {'without' if static else 'with'} attention"
        _require(sub.branch.gain, static, f"{name}.branch.gain", reason)
        _check_branch(sub.branch, channels, f"{name}.branch", scale=scale)
    elif scale or sub.attention is not None:
        _refuse(f"{name}.branch", "missing; kind 'scale' and channel attention need it")
    if sub.attention is not None:
        _check_attention(sub.attention, channels, attention)
    terms = {"branch_multiplier": sub.branch_multiplier, "residual_multiplier": sub.residual_multiplier}
    for leaf, multiplier in terms.items():
        _check_dyadic(multiplier, SUM_BITS, f"{name}.{leaf}")
    if sub.branch_multiplier.shift != sub.residual_multiplier.shift:
        _refuse(f"{name}.residual_multiplier", "its shift is not that of branch_multiplier")


def _check_binary_conv(conv: BinaryConv, channels: int, name: str, kernel_size: int) -> None:
    _check_shape(conv.threshold, (channels,), f"{name}.threshold")
    if not ALWAYS <= conv.threshold.min() <= conv.threshold.max() <= NEVER:
        found = f"{conv.threshold.min()} to {conv.threshold.max()}"
        _refuse(f"{name}.threshold", f"found {found}, allowed: {ALWAYS} to {NEVER}")
    if conv.kernel_size != kernel_size:
        _refuse(f"{name}.kernel_size", f"{conv.kernel_size}, expected {kernel_size}")
    _check_stride(conv.stride, name)
    count = math.prod(conv.shape)
    _check_shape(conv.sign_bits, (-(-count // 8),), f"{name}.sign_bits")
    if np.unpackbits(conv.sign_bits[-1:])[count % 8 or 8 :].any():
        _refuse(f"{name}.sign_bits", "bits are set beyond the last weight")
    reach = np.full(channels, ACCUMULATOR_UNIT * channels * kernel_size**2)
    _check_requantization(conv.bias, conv.multiplier, reach, name)


def _check_branch(branch: Branch, channels: int, name: str, *, scale: bool) -> None:
    if branch.gain is not None:
        _check_shape(branch.gain, (channels,), f"{name}.gain")
    _check_shape(branch.offset, (channels,), f"{name}.offset")
    _check_grid(branch.grid, f"{name}.grid", signed=True)
    _check_dyadic(branch.first, PRODUCT_BITS, f"{name}.first")
    kind = "kind 'scale'" if scale else "kind 'bias'"
    _require(branch.product, scale, f"{name}.product", kind)
    _require(branch.second, scale, f"{name}.second", kind)
    if branch.product is not None and branch.second is not None:
        _check_grid(branch.product, f"{name}.product", signed=True)
        _check_dyadic(branch.second, PRODUCT_BITS, f"{name}.second")


def _check_attention(attention: Attention, channels: int, name: str) -> None:
    for leaf in ("input_mean", "y_mean", "gain"):
        _check_shape(getattr(attention, leaf), (channels,), f"{name}.{leaf}")
        _check_finite(getattr(attention, leaf), f"{name}.{leaf}")
    for leaf, signed in {"pooled": True, "hidden": False, "logits": True, "attention": False}.items():
        _check_grid(getattr(attention, leaf), f"{name}.{leaf}", signed=signed)
    hidden = attention.reduce.multiplier.size
    _check_affine(attention.reduce, (hidden, channels), attention.pooled, f"{name}.reduce")
    _check_affine(attention.expand, (channels, hidden), attention.hidden, f"{name}.expand")
    _check_shape(attention.table, (256,), f"{name}.table")
    if attention.table.max() > attention.attention.high:
        _refuse(f"{name}.table", f"found {attention.table.max()}, allowed: up to {attention.attention.high}")


def _check_head(head: Head, channels: int, source: Grid, classes: int, *, by_module: bool) -> None:
    name = "fc" if by_module else "head.classifier"
    rows = head.classifier.multiplier.size
    if rows != classes:
        _refuse("class_names", f"{classes}, but the classifier ({name}) has {rows} rows")
    _check_slopes(head.slopes, channels, "prelu" if by_module else "head.slopes")
    _check_grid(head.input, "fc.input" if by_module else "head.input", signed=True)
    if not 0 < head.mean <= _FLOAT32:
        _refuse(
            "pool" if by_module else "head.mean",
            f"a multiplier of {head.mean}, expected a finite one above 0",
        )
    _check_affine(head.classifier, (rows, channels), head.input, name)


def _check_affine(layer: Affine, shape: tuple[int, ...], source: Grid, name: str) -> None:
    _check_shape(layer.weight, shape, f"{name}.weight")
    if not layer.weight.size:
        _refuse(f"{name}.weight", f"shape {list(shape)}, expected sides of at least 1")
    largest = max(source.zero_point - source.low, source.high - source.zero_point)
    reach = np.abs(layer.weight.astype(np.int64)).reshape(shape[0], -1).sum(1) * largest
    _check_requantization(layer.bias, layer.multiplier, reach, name)


def _check_requantization(bias: Array, multiplier: Array, reach: Array, name: str) -> None:
    """Check ``(accumulator + bias) * multiplier``.

    Args:
        bias: (C,) int32.
        multiplier: (C,) float32.
        reach: largest possible magnitude of each channel's accumulator without the bias, (C,).
        name: what messages call the layer.
    """
    _check_shape(bias, reach.shape, f"{name}.bias")
    _check_shape(multiplier, reach.shape, f"{name}.multiplier")
    total = np.abs(bias.astype(np.int64)) + reach
    if total.max() > _INT32:
        _refuse(f"{name}.bias", "with the largest accumulator the sum does not fit int32")
    _check_finite(multiplier, f"{name}.multiplier")
    if multiplier.min() <= 0:
        _refuse(f"{name}.multiplier", f"found {multiplier.min()}, expected numbers above 0")
    if (total * multiplier.astype(np.float64)).max() > _FLOAT32:
        _refuse(
            f"{name}.multiplier", f"{multiplier.max():.3g} times the largest accumulator is no float32 number"
        )


def _check_slopes(slopes: Slopes, channels: int, name: str) -> None:
    _check_shape(slopes.integers, (channels,), f"{name}.integers")
    if slopes.shift > _SLOPE_SHIFT:
        _refuse(f"{name}.shift", f"{slopes.shift}, allowed: up to {_SLOPE_SHIFT}")
    if (
        slopes.shift < -127
        or np.ldexp(float(np.abs(slopes.integers.astype(int)).max()), -slopes.shift) > _FLOAT32
    ):
        _refuse(f"{name}.shift", f"{slopes.shift}, a slope is no float32 number")


def _check_dyadic(multiplier: Dyadic, bits: int, name: str) -> None:
    if not 0 <= multiplier.integer < 2**bits:
        _refuse(f"{name}.integer", f"{multiplier.integer}, allowed: 0 to {2**bits - 1}")
    if not -127 + bits <= multiplier.shift <= LARGEST_SHIFT:
        _refuse(f"{name}.shift", f"{multiplier.shift}, allowed: {bits - 127} to {LARGEST_SHIFT}")


def _check_grid(grid: Grid, name: str, *, signed: bool, zero_point: int | None = 0) -> None:
    """Check a grid; ``zero_point`` is the only one allowed, and ``None`` allows any within the grid."""
    if not 2 <= grid.bits <= 8:
        _refuse(f"{name}.bits", f"{grid.bits}, allowed: 2 to 8")
    if grid.signed is not signed:
        _refuse(f"{name}.signed", f"{grid.signed}, expected {signed}")
    if not 0 < grid.scale <= _FLOAT32:
        _refuse(f"{name}.scale", f"{grid.scale}, expected a finite number above 0")
    if not grid.low <= grid.zero_point <= grid.high or zero_point not in (None, grid.zero_point):
        allowed = f"{grid.low} to {grid.high}" if zero_point is None else zero_point
        _refuse(f"{name}.zero_point", f"{grid.zero_point}, allowed: {allowed}")


def _check_stride(stride: int, name: str) -> None:
    if stride not in (1, 2):
        _refuse(f"{name}.stride", f"{stride}, allowed: 1, 2")


def _check_shape(array: Array, shape: tuple[int, ...], name: str) -> None:
    if array.shape != shape:
        _refuse(name, f"shape {list(array.shape)}, expected {list(shape)}")


def _check_finite(array: Array, name: str) -> None:
    if not np.isfinite(array).all():
        _refuse(name, "holds NaN or infinity")


def _require(value: object, wanted: bool, name: str, reason: str) -> None:
    """Refuse an optional field that is None although it is ``wanted``, or set although it is not."""
    if (value is not None) is not wanted:
        _refuse(name, f"{'missing' if wanted else 'there'}, which contradicts {reason}")


def _refuse(name: str, problem: str) -> NoReturn:
    raise QuantizationError(f"{name}: {problem}")
