"""Means and moments over pixels, and 2×2 average pooling, with gradients that are as fast as the values."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native import passes
from qat.native.bindings import usable
from qat.ops.bfloat16 import is_emulated
from qat.ops.planes import apply, multiply_add, spread, without_autocast

#: Widest row that is pooled by a product of matrices; of a wider one most products would be with 0.
NARROW: Final = 32


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (without correction) over height and width: (N, C, H, W) → (N, C) each."""
    function = _NativeMoments if usable(x) else _Moments
    mean, variance = function.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return mean, variance


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over height and width, (N, C, H, W) → (N, C).

    Its gradient is divided by the number of pixels before it is spread over them, not after.
    """
    return apply(_Mean, x)


def pool2x2(x: Tensor) -> Tensor:
    """2×2 average pooling with stride 2 of even sides: (N, C, H, W) → (N, C, H/2, W/2).

    In memory two rows of a narrow image are one vector, and its product with a matrix that has four quarters
    in each column gives their means: two to five times as fast as torch's pooling, ten times in bfloat16. An
    infinity makes the other means of its two rows NaN.
    """
    even = x.shape[-2] % 2 == 0 == x.shape[-1] % 2
    if x.device.type == "cpu" and even and x.shape[-1] <= NARROW:
        return apply(_Pool, x)
    return F.avg_pool2d(x, 2)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.new_empty(()).expand(x.shape)  # its shape and type without its memory
        return x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        like = ctx.like
        return spread(grads[0] / like.shape[2:].numel(), like).expand_as(like)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        *others, height, width = ctx.shape = x.shape
        out = x.new_empty(*others, height // 2, width // 2)
        with without_autocast(x):
            _multiply(_rows(x, 2 * width), _quarters(width, x.dtype), _rows(out, width // 2))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        width = ctx.shape[-1]
        grad = grads[0].new_empty(ctx.shape)
        quarters = _quarters(width, grad.dtype)
        _multiply(_rows(grads[0], width // 2), quarters.t(), _rows(grad, 2 * width))
        return grad


def _multiply(x: Tensor, matrix: Tensor, out: Tensor) -> None:
    if is_emulated(x.device, x.dtype):
        out.copy_(x.float() @ matrix.float())
    else:
        torch.mm(x, matrix, out=out)


def _rows(x: Tensor, length: int) -> Tensor:
    """All of ``x`` in rows of so many values."""
    return x.reshape(x.numel() // length, length)


@lru_cache
def _quarters(width: int, dtype: torch.dtype) -> Tensor:
    """(2 · width, width / 2): what takes the pixels of two rows to means of four."""
    pairs = torch.eye(width // 2, dtype=dtype, device="cpu").repeat_interleave(2, dim=0)
    return pairs.repeat(2, 1) / 4


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        images, channels = x.shape[:2]
        size = x.shape[2:].numel()
        eps = 1e-5
        # Weights of at least float32: the moments have their type.
        ones = x.new_ones(channels, dtype=torch.promote_types(x.dtype, torch.float32))
        _, mean, invstd = torch.native_group_norm(
            x.contiguous(), ones, torch.zeros_like(ones), images, channels, size, channels, eps
        )
        ctx.save_for_backward(x, mean)
        return mean, (invstd.square().reciprocal() - eps).clamp_min_(0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean = ctx.saved_tensors
        by_mean, by_variance = (grad / x.shape[2:].numel() for grad in grads)
        slope = 2.0 * by_variance
        return multiply_add(spread(by_mean - slope * mean, x), x, spread(slope, x))


class _NativeMoments(torch.autograd.Function):
    """Mean and variance over height and width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        mean, variance = passes.moments(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean = ctx.saved_tensors
        by_mean, by_variance = (grad / x.shape[2:].numel() for grad in grads)
        slope = 2.0 * by_variance
        return passes.scale(x, slope, by_mean - slope * mean)
