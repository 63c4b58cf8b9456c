"""The steps of a sub-block's training as few passes over large tensors as torch's operators allow.

Each function equals the plain formula, forward and backward, to rounding. What runs over (N, C, H, W) has its
gradient written out; what runs over vectors (N, C) is left to autograd.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.binary import ACTIVATION_CLIP
from qat.distributed import world
from qat.syncednorm import correction, global_moments, synced_batch_norm

#: A tensor of this many bytes stays in a core's reach, and its memory is used again where a larger one's is
#: given back to the system and asked for anew, page by page.
PORTION: Final = 2**21
#: Bytes that the processor computes with at once.
REGISTER: Final = 64
#: Pixels of a row of which pooling is a product of matrices; of wider ones most products would be with 0.
NARROW: Final = 32
HALF: Final = (torch.bfloat16, torch.float16)


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
        return prelu(synced_batch_norm(x, norm), activation.weight)
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


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``PReLU(x)``: (N, C, H, W), slopes (C,); torch's own gradient takes several times as long."""
    return _apply(_PReLU, x, slope)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (without correction) over height and width: (N, C, H, W) → (N, C) each."""
    mean, variance = _Moments.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return mean, variance


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over height and width, (N, C, H, W) → (N, C), whose gradient is divided before it is spread."""
    return _apply(_Mean, x)


def pool2x2(x: Tensor) -> Tensor:
    """2×2 average pooling with stride 2 of even sides: (N, C, H, W) → (N, C, H/2, W/2).

    Two rows of a narrow image lie one behind the other, and a matrix with four quarters in each column takes
    their means at once: two to five times as fast as torch's pooling, ten times in bfloat16. An infinity
    makes the other means of its two rows NaN.
    """
    even = x.shape[-2] % 2 == 0 == x.shape[-1] % 2
    if x.device.type == "cpu" and even and x.shape[-1] <= NARROW:
        return _apply(_Pool, x)
    return F.avg_pool2d(x, 2)


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
    return _apply(_ScaleAndAdd, x, factor * gain, offset, residual)


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
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        # No momentum means the plain average of all batches, as in torch.
        momentum = norm.num_batches_tracked.float().reciprocal() if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(center.to(norm.running_mean.dtype), momentum)
        unbiased = spread * correction(count)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    gain = norm.weight * torch.rsqrt(spread + norm.eps)
    return gain, norm.bias - center * gain


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``factor ⊙ x``: (N, C, H, W) times (N, C) or (1, C)."""
    return _apply(_Scale, x, factor)


def _count(norm: nn.BatchNorm2d) -> None:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return result


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,), (1, C) or (N, C) in the type of ``x``, and in a shape that goes with it (N, C, H, W).

    One value for all pixels leaves torch runs of one image to vectorize. Images of a few pixels fill no
    register, so that a value for each pixel is several times as fast, tensor of its own or not.
    """
    pixels = x.shape[2:].numel()
    shaped = values.to(x.dtype)[..., None, None].view(-1, x.shape[1], 1, 1)
    if x.device.type == "cpu" and pixels > 1 and pixels * x.itemsize < REGISTER:
        return shaped.expand(-1, -1, *x.shape[2:]).contiguous()
    return shaped


def _multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``base + x · factor`` with a factor from :func:`_spread`."""
    if x.dtype in HALF and factor.shape[-1] != x.shape[-1]:  # whose fused form is slow then
        return (x * factor).add_(base)
    return torch.addcmul(base, x, factor)


def _prelu_values(x: Tensor, slope: Tensor) -> Tensor:
    factor = _spread(slope, x)
    if factor.shape[2:].numel() == 1:
        return F.prelu(x, slope.to(x.dtype))
    return x.clamp_min(0).addcmul_(x.clamp_max(0), factor)


def _portions(x: Tensor) -> list[slice]:
    """Slices of the batch of about :data:`PORTION` bytes each; on accelerators all of it."""
    count = len(x)
    if x.device.type == "cpu":
        count = max(1, PORTION * count // max(x.nbytes, 1))
    return [slice(start, start + count) for start in range(0, len(x), count)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over height and width, (N, C) in the type of sums."""
    sums = [torch.linalg.vecdot(a[some].flatten(2), b[some].flatten(2)) for some in _portions(a)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over images, height and width, (C,) in ``dtype``."""
    if x.shape[2:].numel() * x.itemsize < REGISTER:  # too few pixels to sum up at once: images first
        return x.sum(0, dtype=dtype).sum((1, 2))
    return x.sum((2, 3)).sum(0, dtype=dtype)


class _ShiftedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        shifted = x + _spread(bias.flatten(), x)
        ctx.save_for_backward(shifted)
        ctx.bias_type = bias.dtype
        if zero_is_positive:  # in passes that torch vectorizes, which `where` is not
            return torch.sign(shifted).add_(0.5).sign_()
        return torch.sign(shifted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (shifted,) = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0], shifted, -ACTIVATION_CLIP, ACTIVATION_CLIP)
        bias = _channel_sums(grad, ctx.bias_type)[None, :, None, None] if ctx.needs_input_grad[1] else None
        return grad, bias, None


def _prelu_gradients(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    out, grad_slope = torch.empty_like(grad), torch.zeros_like(slope)
    factor = _spread(slope, grad)
    for some in _portions(grad):
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
        with _without_autocast(x):  # which would leave the type of ``x``
            return _prelu_values(x, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _prelu_gradients(grads[0], *ctx.saved_tensors)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.new_empty(()).expand(x.shape)  # its shape and type without its memory
        return x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        like = ctx.like
        return _spread(grads[0] / like.shape[2:].numel(), like).expand_as(like)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        *others, height, width = ctx.shape = x.shape
        out = x.new_empty(*others, height // 2, width // 2)
        with _without_autocast(x):
            torch.mm(_rows(x, 2 * width), _quarters(width, x.dtype), out=_rows(out, width // 2))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        width = ctx.shape[-1]
        grad = _rows(grads[0], width // 2) @ _quarters(width, grads[0].dtype).t()
        return grad.view(ctx.shape)


def _rows(x: Tensor, length: int) -> Tensor:
    """All of ``x`` in rows of so many values."""
    return x.reshape(x.numel() // length, length)


@lru_cache
def _quarters(width: int, dtype: torch.dtype) -> Tensor:
    """(2 · width, width / 2): what takes the pixels of two rows to means of four."""
    pairs = torch.eye(width // 2, dtype=dtype, device="cpu").repeat_interleave(2, dim=0)
    return pairs.repeat(2, 1) / 4


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


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        images, channels = x.shape[:2]
        size = x.shape[2:].numel()
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
        return _multiply_add(_spread(by_mean - slope * mean, x), x, _spread(slope, x))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * _spread(factor, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, factor = ctx.saved_tensors
        return grads[0] * _spread(factor, grads[0]), _dot(grads[0], x).sum_to_size(factor.shape)


class _ScaleAndAdd(torch.autograd.Function):
    """``gain ⊙ x + offset + residual``; gain (N, C), offset (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.offset_type = offset.dtype
        out = _multiply_add(residual, x, _spread(gain, x))
        return out.add_(_spread(offset, out))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gain = ctx.saved_tensors
        (grad,) = grads
        return (
            grad * _spread(gain, grad),
            _dot(grad, x).to(gain.dtype),
            _channel_sums(grad, ctx.offset_type),
            grad,
        )
