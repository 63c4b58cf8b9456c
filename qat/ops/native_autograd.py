"""Training steps by passes of the native library, as autograd functions; for whom: :mod:`qat.ops`.

For tensors of which :func:`qat.native.bindings.usable` holds. Formulas and gradients are theirs, but for what
is no number: its sign is none, too. Gradients have no gradients of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.grid import Grid
from qat.native import passes as nativepasses
from qat.native.passes import Affine
from qat.ops.binary import ACTIVATION_CLIP
from qat.system.collectives import summed


class ShiftedSign(torch.autograd.Function):
    """``sign(x + bias)``; bias (1, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        """See :func:`qat.ops.norm_activation.shifted_sign`."""
        ctx.save_for_backward(x, bias)
        return nativepasses.sign(x, bias.flatten(), zero_is_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x`` and the bias."""
        x, bias = ctx.saved_tensors
        grad, sums = nativepasses.sign_gradient(grads[0], x, bias.flatten(), ACTIVATION_CLIP)
        return grad, sums.sum(0).to(bias.dtype).view_as(bias), None


class PReLU(torch.autograd.Function):
    """``PReLU(x)``, slopes (C,); with a grid the result is put on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, grid: Grid | None = None) -> Tensor:
        """See :func:`qat.ops.norm_activation.prelu`."""
        ctx.save_for_backward(x, slope)
        ctx.grid = grid
        return nativepasses.prelu(x, slope, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x`` and the slopes."""
        x, slope = ctx.saved_tensors
        grad, sums = nativepasses.prelu_gradient(grads[0], x, slope, ctx.grid)
        return grad, sums.sum(0).to(slope.dtype), None


class NormPReLU(torch.autograd.Function):
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
        """See :func:`qat.ops.norm_activation.norm_prelu`."""
        gain = weight * invstd
        offset = bias - mean * gain
        ctx.save_for_backward(x, weight, slope, mean, invstd, gain, offset)
        ctx.grid, ctx.count = grid, count
        return nativepasses.norm_prelu(x, Affine(gain, offset, slope), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x``, weight, bias and slopes."""
        x, weight, slope, mean, invstd, gain, offset = ctx.saved_tensors
        by = Affine(gain, offset, slope)
        found = nativepasses.norm_prelu_sums(grads[0], x, by, mean, ctx.grid)
        by_bias, product, by_slope = (sums.sum(0) for sums in found)
        by_weight = product * invstd
        of_all = summed(torch.cat([by_bias, by_weight])) / ctx.count
        shift, tilt = (-gain * one for one in of_all.chunk(2))
        grad = nativepasses.norm_prelu_gradient(grads[0], x, by, mean, shift, tilt * invstd, ctx.grid)
        kind = weight.dtype
        return grad, by_weight.to(kind), by_bias.to(kind), by_slope.to(slope.dtype), None, None, None, None


class AffinePReLU(torch.autograd.Function):
    """``PReLU(gain x + offset)``, all (C,); with a grid as :class:`NormPReLU`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, slope: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """See :func:`qat.ops.norm_activation.native_norm_prelu`."""
        ctx.save_for_backward(x, gain, offset, slope)
        ctx.grid = grid
        return nativepasses.norm_prelu(x, Affine(gain, offset, slope), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x``, gain, offset and slopes."""
        x, gain, offset, slope = ctx.saved_tensors
        by, zero = Affine(gain, offset, slope), torch.zeros_like(gain)
        found = nativepasses.norm_prelu_sums(grads[0], x, by, zero, ctx.grid)
        by_offset, by_gain, by_slope = (sums.sum(0) for sums in found)
        grad = nativepasses.norm_prelu_gradient(grads[0], x, by, zero, zero, zero, ctx.grid)
        return grad, by_gain.to(gain.dtype), by_offset.to(offset.dtype), by_slope.to(slope.dtype), None


class Moments(torch.autograd.Function):
    """Mean and variance over height and width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        """See :func:`qat.ops.pooling.moments`."""
        mean, variance = nativepasses.moments(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x``."""
        x, mean = ctx.saved_tensors
        by_mean, by_variance = (grad / x.shape[2:].numel() for grad in grads)
        slope = 2.0 * by_variance
        return nativepasses.scale(x, slope, by_mean - slope * mean)


class Scale(torch.autograd.Function):
    """``factor ⊙ x``; factor (N, C) or (1, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        """See :func:`qat.ops.norm_activation.scaled`."""
        ctx.save_for_backward(x, factor)
        return nativepasses.scale(x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x`` and the factor."""
        x, factor = ctx.saved_tensors
        grad, products = nativepasses.scale_gradient(grads[0], x, factor)
        return grad, products.sum_to_size(factor.shape).to(factor.dtype)


class FakeQuantize(torch.autograd.Function):
    """``x`` on a grid of integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, overwrite: bool) -> Tensor:
        """See :func:`qat.ops.fake_quantize.fake_quantize`."""
        out, inside = nativepasses.fake_quantize(x, grid, overwrite)
        ctx.save_for_backward(inside)
        if overwrite:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x``."""
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else nativepasses.fake_quantize_gradient(grads[0], inside)
        return grad, None, None


class ScaleAndAdd(torch.autograd.Function):
    """``factor ⊙ x + offset + other``, on grids where there are some: see :func:`qat.native.passes.add`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        offset: Tensor,
        other: Tensor,
        grid: Grid | None = None,
        inner: Grid | None = None,
    ) -> Tensor:
        """(N, C, H, W) → same shape."""
        ctx.save_for_backward(x, factor, offset, None if inner is None else other)
        ctx.grids = grid, inner
        return nativepasses.add(x, factor, offset, other, grid, inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """By ``x``, factor, offset and other."""
        x, factor, offset, other = ctx.saved_tensors
        found = nativepasses.add_gradient(
            grads[0], x, factor, offset, x if other is None else other, *ctx.grids
        )
        by_factor = found.factor.sum_to_size(factor.shape).to(factor.dtype)
        return found.x, by_factor, found.offset.sum(0).to(offset.dtype), found.other, None, None


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance without correction of each channel, (C,), without a gradient."""
    means, variances = nativepasses.moments(x)
    mean = means.mean(0)
    # Without a difference of large numbers.
    return mean, variances.mean(0) + (means - mean).square().mean(0)
