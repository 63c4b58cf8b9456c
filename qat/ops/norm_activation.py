"""The steps of a sub-block's training in as few passes over large tensors as torch's operators allow.

On a CPU the native library, where it was built, takes fewer (:mod:`qat.ops.native_autograd`).

Each function equals the plain formula, forward and backward, to rounding. What runs over (N, C, H, W) has its
gradient written out; what runs over vectors (N, C) is left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.grid import Grid
from qat.native.bindings import usable
from qat.native.passes import fits
from qat.ops import native_autograd as nativefused
from qat.ops.batch_norm import correction, global_moments, synced_batch_norm
from qat.ops.binary import ACTIVATION_CLIP, sign
from qat.ops.planes import HALF, apply, channel_sums, dot, multiply_add, portions, spread, without_autocast
from qat.system.collectives import world


def shifted_sign(x: Tensor, bias: Tensor, zero_is_positive: bool = False) -> Tensor:
    """``sign(x + bias)`` with the gradient of :func:`qat.ops.binary.binarize_activation`.

    Args:
        x: (N, C, H, W).
        bias: (1, C, 1, 1).
        zero_is_positive: see :func:`qat.ops.binary.binarize_activation`.

    Returns:
        (N, C, H, W).
    """
    function = nativefused.ShiftedSign if usable(x) else _ShiftedSign
    return apply(function, x, bias, zero_is_positive)


def can_fuse(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` is in training, and its running statistics are moving averages."""
    return norm.training and norm.momentum is not None and norm.track_running_stats and norm.affine


def norm_prelu(x: Tensor, norm: nn.BatchNorm2d, activation: nn.PReLU) -> Tensor:
    """``PReLU(BN(x))`` with batch statistics, for which :func:`can_fuse` must hold; (N, C, H, W)."""
    if can_norm(x):
        return native_norm_prelu(x, norm, activation.weight)
    if world().size > 1:
        return prelu(synced_batch_norm(x, norm), activation.weight)
    _count(norm)
    return apply(
        _NormPReLU,
        x,
        norm.weight,
        norm.bias,
        activation.weight,
        norm.running_mean,
        norm.running_var,
        norm.momentum,
        norm.eps,
    )


def can_norm(x: Tensor) -> bool:
    """Whether :func:`native_norm_prelu` can take ``x``; one value alone is torch's, which refuses it."""
    return x.numel() > x.shape[1] and usable(x)


def native_norm_prelu(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor, grid: Grid | None = None) -> Tensor:
    """:func:`norm_prelu` by the native library, for which :func:`can_norm` must hold.

    In training the batch is that of all processes.

    Args:
        x: (N, C, H, W).
        norm: in training, or with its running statistics.
        slope: of PReLU, (C,).
        grid: what PReLU is given, and gives, is put on it.
    """
    if not norm.training:
        return apply(nativefused.AffinePReLU, x, *fold_batch_norm(norm), slope, grid)
    _count(norm)
    with torch.no_grad():
        mean, variance, count = global_moments(*nativefused.batch_moments(x), len(x) * x.shape[2:].numel())
        _update(norm, mean, variance, count)
        invstd = torch.rsqrt(variance + norm.eps)
    return apply(nativefused.NormPReLU, x, norm.weight, norm.bias, slope, mean, invstd, count, grid)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``PReLU(x)``: (N, C, H, W), slopes (C,); torch's own gradient takes several times as long."""
    return apply(nativefused.PReLU if usable(x) else _PReLU, x, slope)


def scaled_norm(
    x: Tensor, factor: Tensor, mean: Tensor, variance: Tensor, norm: nn.BatchNorm2d, residual: Tensor
) -> Tensor:
    """``BN(factor ⊙ x) + residual`` with batch statistics, which the moments of ``x`` give.

    The variance of a channel is the mean of the images' variances and the variance of their means, so that
    no difference of large numbers occurs.

    Args:
        x: (N, C, H, W).
        factor: (N, C).
        mean: (N, C), of ``x``.
        variance: (N, C), of ``x``.
        norm: :func:`can_fuse` must hold.
        residual: (N, C, H, W).

    Returns:
        (N, C, H, W).
    """
    gain, offset = affine_form(norm, factor, mean, variance, x.shape[2:].numel())
    function = nativefused.ScaleAndAdd if fits(x, residual) else _ScaleAndAdd
    return apply(function, x, factor * gain, offset, residual)


def affine_form(
    norm: nn.BatchNorm2d, factor: Tensor, mean: Tensor, variance: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    """Gain and offset of ``BN(factor ⊙ x)`` with batch statistics, which are counted in.

    The batch is that of all processes.

    Args:
        norm: in training, with running statistics.
        factor, mean, variance: (N, C), the last two of ``x``.
        pixels: of an image of ``x``.

    Returns:
        (C,) each.
    """
    means = factor * mean
    center = means.mean(0)
    spread = (factor.square() * variance).mean(0) + (means - center).square().mean(0)
    center, spread, count = global_moments(center, spread, len(mean) * pixels)
    _count(norm)
    with torch.no_grad():
        _update(norm, center, spread, count)
    gain = norm.weight * torch.rsqrt(spread + norm.eps)
    return gain, norm.bias - center * gain


def fold_batch_norm(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The affine form of a batch normalization with its running statistics: ``norm(x) = gain · x + offset``.

    With a batch's own statistics: :func:`affine_form`.

    Args:
        norm: with running statistics.
        dtype: to compute in; that of the parameters by default.

    Returns:
        gain and offset, (C,) each.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias, mean, variance = (tensor if dtype is None else tensor.to(dtype) for tensor in tensors)
    gain = weight * torch.rsqrt(variance + norm.eps)
    return gain, bias - mean * gain


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``factor ⊙ x``: (N, C, H, W) times (N, C) or (1, C)."""
    return apply(nativefused.Scale if usable(x) else _Scale, x, factor)


def _count(norm: nn.BatchNorm2d) -> None:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)


def _update(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: float | Tensor) -> None:
    """Let the running statistics follow the moments (C,) of a batch of so many values per channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    # No momentum means the plain average of all batches, as in torch.
    momentum = norm.num_batches_tracked.float().reciprocal() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * correction(count)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def _prelu_values(x: Tensor, slope: Tensor) -> Tensor:
    factor = spread(slope, x)
    if factor.shape[2:].numel() == 1:
        return F.prelu(x, slope.to(x.dtype))
    return x.clamp_min(0).addcmul_(x.clamp_max(0), factor)


class _ShiftedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        shifted = x + spread(bias.flatten(), x)
        ctx.save_for_backward(shifted)
        ctx.bias_type = bias.dtype
        return sign(shifted) if zero_is_positive else torch.sign(shifted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (shifted,) = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0], shifted, -ACTIVATION_CLIP, ACTIVATION_CLIP)
        bias = channel_sums(grad, ctx.bias_type)[None, :, None, None] if ctx.needs_input_grad[1] else None
        return grad, bias, None


def _prelu_gradients(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    out, grad_slope = torch.empty_like(grad), torch.zeros_like(slope)
    factor = spread(slope, grad)
    for some in portions(grad):
        positive = torch.ops.aten.threshold_backward.grad_input(grad[some], x[some], 0, grad_input=out[some])
        negative = grad[some] - positive
        grad_slope += torch.linalg.vecdot(negative.flatten(2), x[some].flatten(2)).sum(0, dtype=slope.dtype)
        if grad.dtype in HALF and factor.shape[-1] != grad.shape[-1]:
            positive.add_(negative.mul_(factor))
        else:
            positive.addcmul_(negative, factor)
    return out, grad_slope


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        with without_autocast(x):  # which would leave the type of ``x``
            return _prelu_values(x, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _prelu_gradients(grads[0], *ctx.saved_tensors)


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
        return _prelu_values(normed, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, slope, normed, mean, invstd = ctx.saved_tensors
        grad, grad_slope = _prelu_gradients(grads[0], normed, slope)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias, grad_slope, None, None, None, None


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
