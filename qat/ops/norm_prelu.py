"""Batch normalization and the PReLU after it, in as few passes over memory as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.grid import Grid
from qat.native import passes
from qat.native.bindings import usable
from qat.ops.batch_norm import (
    folded_batch_norm,
    global_moments,
    synced_batch_norm,
    takes_batch_statistics,
    update_running_statistics,
)
from qat.ops.planes import apply
from qat.ops.points import QuantizationPoint
from qat.ops.prelu import prelu, prelu_gradients, prelu_values
from qat.system.collectives import summed, world


def norm_prelu(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor) -> Tensor:
    """``PReLU(BN(x))`` with batch statistics.

    Args:
        x: (N, C, H, W).
        norm: :func:`qat.ops.batch_norm.takes_batch_statistics` must hold.
        slope: (C,).

    Returns:
        (N, C, H, W).
    """
    if _native_takes(x):
        return _native(x, norm, slope, None)
    if world().size > 1:
        return prelu(synced_batch_norm(x, norm), slope)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    statistics = norm.running_mean, norm.running_var
    return apply(_NormPReLU, x, norm.weight, norm.bias, slope, *statistics, norm.momentum, norm.eps)


def quantized_norm_prelu(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor, point: QuantizationPoint) -> Tensor:
    """``[PReLU(Q(BN(x)))]``: what PReLU is given, and what it gives, lies on the grid of ``point``.

    With the batch's statistics in training, else with the running ones, folded to a gain and an offset as in
    the exported network.

    Args:
        x: (N, C, H, W), the sums of a convolution.
        norm: with running statistics.
        slope: (C,).
        point: observes what BN gives, if it does.

    Returns:
        (N, C, H, W).
    """
    # Autocast leaves sums in half precision, whose steps are wider than the grid's.
    x = x.to(torch.promote_types(x.dtype, norm.weight.dtype))
    grid = point.fixed_grid()
    if grid is not None and (takes_batch_statistics(norm) or not norm.training) and _native_takes(x):
        return _native(x, norm, slope, grid)
    if norm.training:
        normed: Tensor = norm(x)
    else:
        gain, offset = (constant.view(1, -1, 1, 1) for constant in folded_batch_norm(norm))
        normed = torch.addcmul(offset, x, gain)
    return prelu(point(normed, overwrite=True), slope, point)


def _native_takes(x: Tensor) -> bool:
    """Whether the native library can; a single value per channel is torch's, which refuses it."""
    return x.numel() > x.shape[1] and usable(x)


def _native(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor, grid: Grid | None) -> Tensor:
    if not norm.training:
        return apply(_NativeAffinePReLU, x, *folded_batch_norm(norm), slope, grid)
    with torch.no_grad():
        own = _batch_moments(x)
        mean, variance, count = global_moments(*own, len(x) * x.shape[2:].numel())
        update_running_statistics(norm, mean, variance, count)
        invstd = torch.rsqrt(variance + norm.eps)
    return apply(_NativeNormPReLU, x, norm.weight, norm.bias, slope, mean, invstd, count, grid)


def _batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance without correction of each channel, (C,), without a gradient."""
    means, variances = passes.moments(x)
    mean = means.mean(0)
    # Without a difference of large numbers.
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _NormPReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        normed, mean, invstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, slope, normed, mean, invstd)
        ctx.eps = eps
        return prelu_values(normed, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, slope, normed, mean, invstd = ctx.saved_tensors
        grad, grad_slope = prelu_gradients(grads[0], normed, slope)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias, grad_slope, None, None, None, None


class _NativeNormPReLU(torch.autograd.Function):
    """``PReLU((x - mean) · invstd · weight + bias)`` with the moments of the batch, all (C,).

    The batch is ``x`` with what the other processes have of it, ``count`` values a channel. The gradient
    knows that the moments come from all of them. With a grid, what PReLU is given and gives is put on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: float | Tensor,
        grid: Grid | None = None,
    ) -> Tensor:
        gain = weight * invstd
        offset = bias - mean * gain
        ctx.save_for_backward(x, weight, slope, mean, invstd, gain, offset)
        ctx.grid, ctx.count = grid, count
        return passes.norm_prelu(x, passes.NormPrelu(gain, offset, slope), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, slope, mean, invstd, gain, offset = ctx.saved_tensors
        by = passes.NormPrelu(gain, offset, slope)
        found = passes.norm_prelu_sums(grads[0], x, by, mean, ctx.grid)
        by_bias, product, by_slope = (sums.sum(0) for sums in found)
        by_weight = product * invstd
        of_all = summed(torch.cat([by_bias, by_weight])) / ctx.count
        shift, tilt = (-gain * one for one in of_all.chunk(2))
        grad = passes.norm_prelu_gradient(grads[0], x, by, mean, shift, tilt * invstd, ctx.grid)
        kind = weight.dtype
        return grad, by_weight.to(kind), by_bias.to(kind), by_slope.to(slope.dtype), None, None, None, None


class _NativeAffinePReLU(torch.autograd.Function):
    """``PReLU(gain x + offset)``, all (C,); with a grid as :class:`_NativeNormPReLU`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, slope: Tensor, grid: Grid | None = None
    ) -> Tensor:
        ctx.save_for_backward(x, gain, offset, slope)
        ctx.grid = grid
        return passes.norm_prelu(x, passes.NormPrelu(gain, offset, slope), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain, offset, slope = ctx.saved_tensors
        by, zero = passes.NormPrelu(gain, offset, slope), torch.zeros_like(gain)
        found = passes.norm_prelu_sums(grads[0], x, by, zero, ctx.grid)
        by_offset, by_gain, by_slope = (sums.sum(0) for sums in found)
        grad = passes.norm_prelu_gradient(grads[0], x, by, zero, zero, zero, ctx.grid)
        return grad, by_gain.to(gain.dtype), by_offset.to(offset.dtype), by_slope.to(slope.dtype), None
