"""The end of a sub-block: a branch scaled per image and channel, an offset, and the residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.grid import Grid
from qat.native import passes
from qat.native.bindings import usable
from qat.native.passes import fits
from qat.ops.batch_norm import batch_gain_and_offset
from qat.ops.planes import apply, channel_sums, dot, multiply_add, spread
from qat.ops.points import QuantizationPoint
from qat.system.collectives import elementwise_maximum


def scaled_norm_add(
    x: Tensor, factor: Tensor, mean: Tensor, variance: Tensor, norm: nn.BatchNorm2d, residual: Tensor
) -> Tensor:
    """``BN(factor ⊙ x) + residual`` with batch statistics, which the moments of ``x`` give.

    Args:
        x: (N, C, H, W).
        factor: (N, C).
        mean, variance: (N, C), of ``x``.
        norm: :func:`qat.ops.batch_norm.takes_batch_statistics` must hold.
        residual: (N, C, H, W).

    Returns:
        (N, C, H, W).
    """
    gain, offset = batch_gain_and_offset(norm, factor, mean, variance, x.shape[2:].numel())
    function = _NativeScaleAndAdd if fits(x, residual) else _ScaleAndAdd
    return apply(function, x, factor * gain, offset, residual)


def quantized_scale_add(
    y: Tensor,
    gain: Tensor,
    offset: Tensor,
    residual: Tensor,
    branch: QuantizationPoint,
    product: QuantizationPoint | None = None,
) -> Tensor:
    """``[Q_branch(v) + [offset]]_branch + residual``, with ``v = gain ⊙ y``.

    With a point for the product (the sub-block's scale kind) ``v = Q_product(gain ⊙ y) ⊙ residual``.

    Args:
        y: (N, C, H, W).
        gain: (N, C) or (1, C).
        offset: (C,).
        residual: (N, C, H, W).
        branch: one grid for the branch before and after the offset, and for the offset: its range must span
            all three.
        product: of the values that the residual is multiplied with.

    Returns:
        (N, C, H, W).
    """
    grid, product_grid = branch.fixed_grid(), None if product is None else product.fixed_grid()
    if grid is not None and (product is None or product_grid is not None) and fits(y, residual):
        return apply(_NativeScaleAndAdd, y, gain, branch.requantize(offset), residual, grid, product_grid)
    values = scaled(y, gain)
    if product is not None:
        values = product(values, overwrite=True) * residual
    offset = offset.view(1, -1, 1, 1)
    observed = None
    if branch.observes:
        observed = _magnitudes(values.detach(), offset.detach(), branch.looks_at_extremes)
    values = branch(values, observed, overwrite=True)
    # In place, like the residual: no gradient asks for what a sum has added up.
    values = branch.requantize(values.add_(branch.requantize(offset)), overwrite=True)
    return values.add_(residual)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``factor ⊙ x``: (N, C, H, W) times (N, C) or (1, C)."""
    return apply(_NativeScale if usable(x) else _Scale, x, factor)


def _magnitudes(branch: Tensor, offset: Tensor, extremes: bool) -> Tensor:
    """The largest magnitudes of the branch (N, C, H, W) before and after the offset, and of the offset.

    Of every value, or of every channel where the largest one is all that is asked for; then of the images of
    all processes.
    """
    if not extremes:
        return torch.maximum(torch.maximum(branch.abs(), (branch + offset).abs()), offset.abs())
    # Over the images first, which torch vectorizes however small an image is.
    ends = [branch.amin(0).amin((1, 2)), branch.amax(0).amax((1, 2))]
    offset = offset.flatten()
    magnitudes = torch.stack([end.abs() for end in (*ends, *(end + offset for end in ends), offset)])
    return elementwise_maximum(magnitudes.amax(0))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * spread(factor, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, factor = ctx.saved_tensors
        return grads[0] * spread(factor, grads[0]), dot(grads[0], x).sum_to_size(factor.shape)


class _ScaleAndAdd(torch.autograd.Function):
    """``gain ⊙ x + offset + residual``; gain (N, C), offset (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.offset_type = offset.dtype
        out = multiply_add(residual, x, spread(gain, x))
        return out.add_(spread(offset, out))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain = ctx.saved_tensors
        (grad,) = grads
        return (
            grad * spread(gain, grad),
            dot(grad, x).to(gain.dtype),
            channel_sums(grad, ctx.offset_type),
            grad,
        )


class _NativeScale(torch.autograd.Function):
    """``factor ⊙ x``; factor (N, C) or (1, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return passes.scale(x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, factor = ctx.saved_tensors
        grad, products = passes.scale_gradient(grads[0], x, factor)
        return grad, products.sum_to_size(factor.shape).to(factor.dtype)


class _NativeScaleAndAdd(torch.autograd.Function):
    """``factor ⊙ x + offset + residual``, on grids where there are some.

    See :func:`qat.native.passes.add`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        offset: Tensor,
        residual: Tensor,
        grid: Grid | None = None,
        product_grid: Grid | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, factor, offset, None if product_grid is None else residual)
        ctx.grids = grid, product_grid
        return passes.add(x, factor, offset, residual, grid, product_grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, factor, offset, residual = ctx.saved_tensors
        found = passes.add_gradient(
            grads[0], x, factor, offset, x if residual is None else residual, *ctx.grids
        )
        by_factor = found.factor.sum_to_size(factor.shape).to(factor.dtype)
        return found.x, by_factor, found.offset.sum(0).to(offset.dtype), found.residual, None, None
