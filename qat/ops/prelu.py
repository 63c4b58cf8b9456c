"""PReLU with one slope per channel, in float or on a grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.grid import Grid
from qat.native import passes
from qat.native.bindings import usable
from qat.ops.planes import HALF, apply, portions, spread, without_autocast
from qat.ops.points import IN_FLOAT, QuantizationPoint


def prelu(x: Tensor, slope: Tensor, point: QuantizationPoint = IN_FLOAT) -> Tensor:
    """``[PReLU(x)]``: ``max(x, 0) + slope · min(x, 0)``, put on the grid of ``point``.

    torch's own gradient takes several times as long.

    Args:
        x: (N, C, H, W).
        slope: (C,).
        point: the default leaves the result in float.

    Returns:
        (N, C, H, W).
    """
    if not usable(x):
        return point.requantize(apply(_PReLU, x, slope), overwrite=True)
    grid = point.fixed_grid()
    values = apply(_NativePReLU, x, slope, grid)
    return values if grid is not None else point.requantize(values, overwrite=True)


def prelu_values(x: Tensor, slope: Tensor) -> Tensor:
    """(N, C, H, W) of ``x`` and slopes (C,), without a gradient."""
    factor = spread(slope, x)
    if factor.shape[2:].numel() == 1:
        return F.prelu(x, slope.to(x.dtype))
    return x.clamp_min(0).addcmul_(x.clamp_max(0), factor)


def prelu_gradients(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """By ``x`` and the slopes: (N, C, H, W) and (C,)."""
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
            return prelu_values(x, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return prelu_gradients(grads[0], *ctx.saved_tensors)


class _NativePReLU(torch.autograd.Function):
    """``PReLU(x)``, slopes (C,); with a grid the result is put on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, grid: Grid | None = None) -> Tensor:
        ctx.save_for_backward(x, slope)
        ctx.grid = grid
        return passes.prelu(x, slope, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, slope = ctx.saved_tensors
        grad, sums = passes.prelu_gradient(grads[0], x, slope, ctx.grid)
        return grad, sums.sum(0).to(slope.dtype), None
