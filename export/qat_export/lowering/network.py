"""Lowering: a fine-tuned, fake-quantized BNext becomes an :class:`qat_export.integer.network.IntegerNetwork`.

The constants are those that the network's own modules use in evaluation mode (their ``integers()``). Here
they are checked and converted to NumPy, and binary weights are packed into bits. A network that can't be
lowered is refused, with the name of the module (:mod:`qat_export.lowering.refusals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.grid import Grid
from qat.models.bnext import BNext
from qat.nn.block import Block as FloatBlock
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer
from qat.quantize.attention import AttentionIntegers, FakeQuantSqueezeExcitation
from qat.quantize.folding import LayerIntegers, slope_scale
from qat.quantize.preparation import model_is_prepared
from qat.quantize.stem_and_head import FakeQuantLinear, FakeQuantPool, FakeQuantPReLU, FakeQuantStem
from qat.quantize.sub_block import FakeQuantSubBlock
from qat.quantize.sub_block_constants import BranchIntegers
from qat_export.integer.consistency import check_network
from qat_export.integer.network import (
    NEVER,
    Affine,
    Attention,
    BinaryConv,
    Block,
    Branch,
    Head,
    IntegerNetwork,
    Slopes,
    Stem,
    SubBlock,
)
from qat_export.lowering.refusals import (
    left_in_float,
    refuse_branch,
    refuse_step,
    refuse_values,
    refuse_weights,
    refuse_width,
)

Constants = TypeVar("Constants")


def lower(
    model: BNext,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> IntegerNetwork:
    """Lower a prepared, calibrated network.

    Args:
        model: fake-quantized network; it is not changed.
        image_size: side of the images in pixels that exports take by default.
        mean, std: normalization of the network's inputs, per channel.
        class_names: names in the order of the logits; if empty, classes are named by number.
        metadata: texts by name that exports copy into their metadata.

    Raises:
        QuantizationError: a module can't be expressed as integers (the message names it); or the image size,
            normalization or number of class names is impossible.
    """
    if not model_is_prepared(model):
        raise QuantizationError(
            "a float-rest network has no integers to export: fine-tune it first (qat finetune)"
        )
    refuse_values(model)
    stem = model.feature[0]
    if not isinstance(stem, FakeQuantStem):
        raise QuantizationError(left_in_float("feature.0"))
    grid = _grid(stem.trunk, "feature.0.trunk")
    image = _grid(stem.image, "feature.0.image")
    lowered_stem, source = (
        Stem(_affine(_named("feature.0", stem.integers)), int(stem.conv1.stride[0]), image),
        grid,
    )
    blocks: list[Block] = []
    for index, module in enumerate(list(model.feature)[1:], start=1):
        blocks.append(_block(cast(FloatBlock, module), f"feature.{index}", source))
        source = blocks[-1].output_grid
    names = tuple(class_names) or tuple(str(i) for i in range(model.architecture.num_classes))
    network = IntegerNetwork(
        architecture=str(model.architecture),
        image_size=image_size,
        mean=cast(Any, tuple(float(v) for v in mean)),
        std=cast(Any, tuple(float(v) for v in std)),
        class_names=names,
        stem=lowered_stem,
        stem_grid=grid,
        blocks=tuple(blocks),
        head=_head(model),
        metadata=dict(metadata or {}),
    )
    check_network(network, by_module=True)
    return network


def _block(block: FloatBlock, name: str, source: Grid) -> Block:
    middle = _grid(block.trunk_mid, f"{name}.trunk_mid")
    output = _grid(block.trunk_out, f"{name}.trunk_out")

    def child(leaf: str, before: Grid) -> SubBlock:
        return _sub_block(cast(FakeQuantSubBlock, block.get_submodule(leaf)), f"{name}.{leaf}", before)

    return Block(
        name=name,
        spatial=child(block.spatial_name, source),
        pointwise=tuple(child(leaf, middle) for leaf in block.pointwise_names),
        middle_grid=middle,
        output_grid=output,
        input_grid=source,
    )


def _sub_block(module: FakeQuantSubBlock, name: str, source: Grid) -> SubBlock:
    if not module.quantized:
        raise QuantizationError(left_in_float(name))
    conv = module.binary_conv
    refuse_weights(conv, f"{name}.binary_conv")
    y_grid = _grid(module.y, f"{name}.y")
    branch_grid = _grid(module.branch, f"{name}.branch") if module.has_branch else y_grid
    product_grid = _grid(module.product, f"{name}.product") if module.kind == "scale" else None
    # Computing the constants needs these grids. Reading them first gives a message that names the one that is
    # not calibrated.
    grids = _attention_grids(module, name) if module.infor_recoupling else None
    if module.has_branch:
        refuse_branch(module, name)
    constants = _named(name, module.integers)
    attention = branch = None
    if constants.branch is not None:
        branch = _branch(constants.branch, branch_grid, product_grid, static=grids is None)
        if grids is not None:
            attention = _attention(
                constants.branch,
                _named(f"{name}.se", cast(FakeQuantSqueezeExcitation, module.se).integers),
                grids,
            )
    requantization = constants.conv.requantization
    return SubBlock(
        name=name,
        kind=module.kind,
        conv=BinaryConv(
            threshold=_thresholds(module.move.bias, source),
            sign_bits=np.packbits(constants.conv.weight.cpu().numpy().reshape(-1) > 0),
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            bias=_array(requantization.bias).astype(np.int32),
            multiplier=_array(requantization.multiplier),
        ),
        y_grid=y_grid,
        slopes=_slopes(module.activation2),
        residual_slopes=_slopes(module.activation1) if module.kind == "scale" else None,
        attention=attention,
        branch=branch,
        branch_multiplier=constants.sum.branch,
        residual_multiplier=constants.sum.residual,
    )


def _branch(constants: BranchIntegers, grid: Grid, product: Grid | None, *, static: bool) -> Branch:
    if product is not None and constants.product_step is not None:
        product = replace(product, scale=constants.product_step)
    return Branch(
        gain=_array(constants.gain).astype(np.int8) if static else None,
        first=constants.first,
        product=product,
        second=constants.second,
        offset=_array(constants.offset).astype(np.int8),
        grid=grid,
    )


def _attention_grids(module: FakeQuantSubBlock, name: str) -> dict[str, Grid]:
    se = module.se
    if not isinstance(se, FakeQuantSqueezeExcitation):
        raise QuantizationError(left_in_float(f"{name}.se"))
    points = {"pooled": se.pooled, "hidden": se.hidden, "logits": se.logits, "attention": se.attention}
    return {leaf: _grid(point, f"{name}.se.{leaf}") for leaf, point in points.items()}


def _attention(branch: BranchIntegers, constants: AttentionIntegers, grids: dict[str, Grid]) -> Attention:
    assert branch.input_mean is not None
    assert branch.y_mean is not None
    return Attention(
        input_mean=_array(branch.input_mean),
        y_mean=_array(branch.y_mean),
        reduce=_affine(constants.reduce, flat=True),
        expand=_affine(constants.expand, flat=True),
        table=_array(constants.table).astype(np.uint8),
        gain=_array(branch.gain),
        **grids,
    )


def _head(model: BNext) -> Head:
    prelu, pool, fc = model.prelu, model.pool, model.fc
    if not isinstance(prelu, FakeQuantPReLU):
        raise QuantizationError(left_in_float("prelu"))
    if not isinstance(fc, FakeQuantLinear) or not isinstance(pool, FakeQuantPool):
        raise QuantizationError(left_in_float("fc"))
    grid = _grid(fc.input, "fc.input")
    return Head(
        slopes=_slopes(prelu),
        mean=np.float32(float(pool.multiplier())),
        input=grid,
        classifier=_affine(_named("fc", fc.integers)),
    )


def _named(name: str, integers: Callable[[], Constants]) -> Constants:
    """The constants that ``integers`` computes; the message of an error is prefixed by the module's name."""
    try:
        return integers()
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from error


def _affine(layer: LayerIntegers, *, flat: bool = False) -> Affine:
    weight = _array(layer.weight).astype(np.int8)
    return Affine(
        weight=weight.reshape(len(weight), -1) if flat else weight,
        bias=_array(layer.requantization.bias).astype(np.int32),
        multiplier=_array(layer.requantization.multiplier),
    )


def _thresholds(bias: Tensor, source: Grid) -> NDArray[np.int16]:
    """Thresholds (C,) of the signs: the smallest integer ``q`` with ``q * scale + bias >= 0`` in float32."""
    integers = np.arange(source.low, source.high + 1)
    values = integers.astype(np.float32) * np.float32(source.scale)
    positive = values[None, :] + _array(bias.float()).reshape(-1, 1) >= 0
    return np.where(positive.any(1), integers[positive.argmax(1)], NEVER).astype(np.int16)


def _slopes(prelu: nn.PReLU) -> Slopes:
    scale = float(slope_scale(prelu.weight))
    integers = np.clip(np.rint(_array(prelu.weight.double()) / scale), -128, 127).astype(np.int8)
    return Slopes(integers, -int(np.log2(scale)))


def _grid(quantizer: nn.Module, name: str) -> Grid:
    """Grid of the activation quantizer ``name``.

    Raises:
        QuantizationError: it is left in float, is not calibrated, or has a grid that integer networks lack.
    """
    if isinstance(quantizer, FixedQuantizer):
        grid = Grid(
            float(quantizer.scale), quantizer.bits, signed=False, zero_point=int(quantizer.zero_point)
        )
    elif not isinstance(quantizer, ActivationQuantizer):
        raise QuantizationError(left_in_float(name))
    elif not quantizer.calibrated:
        raise QuantizationError(f"{name}: not calibrated, its range is unknown: fine-tune or calibrate first")
    elif zero_point := int(quantizer.fake.zero_point):
        raise QuantizationError(f"{name}: zero point {zero_point}, allowed: 0")
    else:
        grid = Grid(float(quantizer.scale), quantizer.bits, quantizer.signed)
    refuse_width(grid.bits, name)
    refuse_step(grid.scale, name)
    return grid


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
