"""Fake quantization: values put on a grid of integers while training, in few passes over memory.

With integers ``q = round(x / s)``: the value is ``clamp(q, low, high) · s`` in float32, its gradient 1 where
``q`` lies inside of the range and 0 beyond. Values and gradients are those of
``torch.fake_quantize_per_tensor_affine``, bit for bit. On the CPU that one takes about eight times as long as
the passes here, which torch vectorizes; on accelerators it is a single pass, and is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.grid import Grid
from qat.native import passes
from qat.native.bindings import usable
from qat.ops.planes import apply

#: Smallest and largest value of a tensor, scalars.
Extremes = tuple[Tensor, Tensor]


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    signed: bool,
    extremes: Extremes | None = None,
    overwrite: bool = False,
) -> Tensor:
    """``x`` on the grid, straight-through.

    Args:
        x: any shape.
        scale: (1,) float32, positive; it gets no gradient.
        bits: width of the integers.
        signed: whether they take both signs; unsigned ones start at 0.
        extremes: of ``x``, where they are known.
        overwrite: the result may take the memory of ``x``, which neither the caller nor a gradient needs.

    Returns:
        Same shape and type.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        zero, ends = torch.zeros_like(scale, dtype=torch.int32), Grid(1.0, bits, signed)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, ends.low, ends.high)
    grid = Grid(float(scale), bits, signed)
    overwrite = overwrite and not (x.is_leaf and x.requires_grad)
    if usable(x):
        return apply(_NativeOnGrid, x, grid, overwrite)
    return apply(_OnGrid, x, grid, extremes, overwrite)


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, extremes: Extremes | None, overwrite: bool) -> Tensor:
        scale, inverse, low, high = grid.scale, grid.inverse, grid.low, grid.high
        smallest, largest = torch.aminmax(x) if extremes is None else extremes
        steps = (x.mul_(inverse) if overwrite else x * inverse).round_()
        ends = torch.stack((smallest, largest)).mul_(inverse).round_().tolist()
        inside = None
        # Mostly nothing lies outside, or beyond one end: what is inside needs no look.
        if not (ends[0] >= low and ends[1] <= high):
            if ctx.needs_input_grad[0]:
                inside = steps.le(high)
                if not ends[0] >= low:
                    inside.logical_and_(steps.ge(low))
            steps.clamp_(low, high)
        ctx.save_for_backward(inside)
        if overwrite:
            ctx.mark_dirty(x)
        steps.mul_(scale)
        return steps.copy_(steps.float()) if x.dtype == torch.float64 else steps

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else torch.where(inside, grads[0], 0.0)
        return grad, None, None, None


class _NativeOnGrid(torch.autograd.Function):
    """``x`` on a grid of integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, overwrite: bool) -> Tensor:
        out, inside = passes.fake_quantize(x, grid, overwrite)
        ctx.save_for_backward(inside)
        if overwrite:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else passes.fake_quantize_gradient(grads[0], inside)
        return grad, None, None
