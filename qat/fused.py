"""The steps of a sub-block's training as few passes over large tensors as torch's operators allow.

Each function equals the plain formula, forward and backward, to rounding. What runs over (N, C, H, W) has its
gradient written out; what runs over vectors (N, C) is left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.binary import ACTIVATION_CLIP, sign
from qat.distributed import world
from qat.syncednorm import correction, global_moments, synced_batch_norm


def shifted_sign(x: Tensor, bias: Tensor, zero_is_positive: bool = False) -> Tensor:
    """``sign(x + bias)`` with the gradient of :func:`qat.binary.binarize_activation`.

    Args:
        x: (N, C, H, W).
        bias: (1, C, 1, 1).
        zero_is_positive: see :func:`qat.binary.binarize_activation`.

    Returns:
        (N, C, H, W).
    """
    return _apply(_ShiftedSign, x, bias, zero_is_positive)


def can_fuse(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` is in training, and its running statistics are moving averages."""
    return norm.training and norm.momentum is not None and norm.track_running_stats and norm.affine


def norm_prelu(x: Tensor, norm: nn.BatchNorm2d, activation: nn.PReLU) -> Tensor:
    """``PReLU(BN(x))`` with batch statistics, for which :func:`can_fuse` must hold; (N, C, H, W)."""
    if world().size > 1:
        return prelu(synced_batch_norm(x, norm), activation)
    _count(norm)
    return _apply(
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


def prelu(x: Tensor, activation: nn.PReLU) -> Tensor:
    """``PReLU(x)``, any shape with channels second; torch's own gradient takes several times as long."""
    return _apply(_PReLU, x, activation.weight)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (without correction) over height and width: (N, C, H, W) → (N, C) each."""
    mean, variance = _Moments.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return mean, variance


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
    means = factor * mean
    center = means.mean(0)
    spread = (factor.square() * variance).mean(0) + (means - center).square().mean(0)
    center, spread, count = global_moments(center, spread, x.numel() // x.shape[1])
    _count(norm)
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.running_mean.lerp_(center.to(norm.running_mean.dtype), norm.momentum)
        unbiased = spread * correction(count)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    gain = norm.weight * torch.rsqrt(spread + norm.eps)
    return _apply(_ScaleAndAdd, x, factor * gain, norm.bias - center * gain, residual)


def _count(norm: nn.BatchNorm2d) -> None:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return result


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(1, -1, 1, 1)


def _multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``base + x · factor`` with a factor per channel or per image and channel."""
    if x.dtype in (torch.bfloat16, torch.float16):  # whose fused form is slow with a factor per channel
        return (x * factor).add_(base)
    return torch.addcmul(base, x, factor)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over height and width, (N, C) in the type of sums."""
    sums: Tensor = torch.linalg.vecdot(a.flatten(2), b.flatten(2))
    return sums


class _ShiftedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        shifted = x + bias.to(x.dtype)
        ctx.save_for_backward(shifted)
        ctx.bias_type = bias.dtype
        return sign(shifted) if zero_is_positive else torch.sign(shifted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (shifted,) = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0], shifted, -ACTIVATION_CLIP, ACTIVATION_CLIP)
        bias = grad.sum((2, 3)).sum(0, keepdim=True, dtype=ctx.bias_type) if ctx.needs_input_grad[1] else None
        return grad, None if bias is None else bias[..., None, None], None


def _prelu_gradients(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    positive = torch.ops.aten.threshold_backward(grad, x, 0)
    negative = grad - positive
    grad_slope = _dot(negative, x).sum(0, dtype=slope.dtype)
    return _multiply_add(positive, negative, _per_channel(slope, negative)), grad_slope


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope.to(x.dtype))

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
        return F.prelu(normed, slope.to(normed.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, slope, normed, mean, invstd = ctx.saved_tensors
        grad, grad_slope = _prelu_gradients(grads[0], normed, slope)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias, grad_slope, None, None, None, None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        images, channels = x.shape[:2]
        size = x[0, 0].numel()
        eps = 1e-5
        # With weights of another type than half precision, so that the moments are too.
        ones = x.new_ones(channels, dtype=torch.promote_types(x.dtype, torch.float32))
        _, mean, invstd = torch.native_group_norm(
            x.contiguous(), ones, torch.zeros_like(ones), images, channels, size, channels, eps
        )
        ctx.save_for_backward(x, mean)
        return mean, (invstd.square().reciprocal() - eps).clamp_min_(0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean = ctx.saved_tensors
        by_mean, by_variance = (grad / x[0, 0].numel() for grad in grads)
        slope = 2.0 * by_variance
        offset = (by_mean - slope * mean).to(x.dtype)
        return _multiply_add(offset[..., None, None], x, slope.to(x.dtype)[..., None, None])


class _ScaleAndAdd(torch.autograd.Function):
    """``gain ⊙ x + offset + residual``; gain (N, C), offset (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.offset_type = offset.dtype
        out = _multiply_add(residual, x, gain.to(x.dtype)[..., None, None])
        return out.add_(_per_channel(offset, out))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain = ctx.saved_tensors
        (grad,) = grads
        return (
            grad * gain.to(grad.dtype)[..., None, None],
            _dot(grad, x).to(gain.dtype),
            grad.sum((2, 3)).sum(0, dtype=ctx.offset_type),
            grad,
        )
