"""Convolutions of tiny images with fewer products: minimal filtering by Toom, Cook and Winograd.

Taken as polynomials, image and weights have a product that is determined by as many of its values as it has
coefficients. So data and weights are transformed into values, multiplied value by value, and the products
transformed back (Lavin & Gray 2015, arXiv 1509.09308). Along one axis,

    y = R · ((G · w) ⊙ (D · x)),

and for an image the matrices are Kronecker products of both axes' ones. ``D`` leaves out what would multiply
padding: an image of 4×4 pixels takes 36 products instead of 144, one of 2×2 takes 9 instead of 36. Over all
channels each of these products is one of matrices, (images, C) by (C, O). Gradients are the same products
with the matrices transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

#: Bytes of transformed weights that are made at once. Smaller pieces would fit a cache, but matrix products
#: of few rows cost more than memory does.
CHUNK: Final = 2**26

# Of an axis by its length: data (P, length), weights (P, 3), result (length, P).
_MATRICES: Final = {
    # The tap in the middle.
    1: ([[1]], [[0, 1, 0]], [[1]]),
    # y0 = w1 (x0 + x1) + (w2 - w1) x1, y1 = w1 (x0 + x1) + (w0 - w1) x0
    2: ([[1, 1], [0, 1], [1, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]], [[1, 1, 0], [1, 0, 1]]),
    # F(4, 3), the values at 0, ±1, ±2 and infinity.
    4: (
        [[0, -5, 0, 1], [-4, -4, 1, 1], [4, -4, -1, 1], [-2, -1, 2, 1], [2, -1, -2, 1], [4, 0, -5, 0]],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}


class Transforms(NamedTuple):
    """Matrices of images of one size, of which P products are made.

    Attributes:
        data: (P, H · W).
        weights: (P, 9).
        result: (H · W, P).
    """

    data: Tensor
    weights: Tensor
    result: Tensor


def has_transforms(height: int, width: int) -> bool:
    """Whether images of this size can be convolved here."""
    return height in _MATRICES and width in _MATRICES


def are_exact(height: int, width: int) -> bool:
    """Whether the transforms of this size only add and subtract, so that integers stay integers."""
    return max(height, width) <= 2


@lru_cache
def transforms(height: int, width: int, dtype: torch.dtype) -> Transforms:
    """Matrices for images of ``height`` × ``width`` pixels."""
    down, across = (
        [torch.tensor(one, dtype=torch.float64, device="cpu") for one in _MATRICES[side]]
        for side in (height, width)
    )
    return Transforms(*(torch.kron(one, other).to(dtype) for one, other in zip(down, across, strict=True)))


def tiny_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """3×3 convolution with stride 1 and a border of one zero, with a gradient for both.

    Call it outside of autocast, which would round the transformed values.

    Args:
        x: (N, C, H, W), for which :func:`has_transforms` holds. bfloat16 is computed in float32.
        weight: (O, C, 3, 3), of the same type or float32.

    Returns:
        (N, O, H, W).
    """
    result: Tensor = _TinyConv.apply(x, weight)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return result


class _TinyConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = _wide(x)
        matrices = transforms(*x.shape[2:], wide)
        data = _products(matrices.data, x.to(wide))
        out = x.new_empty(len(x), len(weight), *x.shape[2:], dtype=wide)
        weights = weight.new_empty(0)
        chunks = _chunks(weight, matrices)
        for some in chunks:
            weights = _products(matrices.weights, weight[some].to(wide))
            _pixels(matrices.result, torch.bmm(data, weights.mT), out[:, some])
        # If one chunk holds all transformed weights they are kept for the gradient.
        ctx.save_for_backward(x, weight, weights if len(chunks) == 1 and ctx.needs_input_grad[0] else None)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, kept = ctx.saved_tensors
        return tiny_gradients(grads[0], x, weight, ctx.needs_input_grad, kept)


def tiny_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], kept: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`tiny_conv3x3` by images and weights, where ``wanted``.

    Args:
        grad: (N, O, H, W).
        x: (N, C, H, W); without its values where the weights' gradient is not wanted.
        weight: (O, C, 3, 3).
        wanted: of each.
        kept: all weights transformed, if they are still there.
    """
    by_x, by_weight = wanted
    wide = _wide(x)
    matrices = transforms(*x.shape[2:], wide)
    by_product = _products(matrices.result.t(), grad.to(wide))
    data = _products(matrices.data, x.to(wide)) if by_weight else None
    by_data = x.new_zeros(len(by_product), len(x), x.shape[1], dtype=wide) if by_x else None
    grad_weight = _empty(weight, wide) if by_weight else None
    for some in _chunks(weight, matrices):
        part = by_product[..., some]
        if by_data is not None:
            weights = _products(matrices.weights, weight[some].to(wide)) if kept is None else kept
            by_data.baddbmm_(part, weights)
        if data is not None and grad_weight is not None:
            _pixels(matrices.weights.t(), torch.bmm(part.mT, data), grad_weight[some])
    grad_x = None
    if by_data is not None:
        grad_x = _empty(x, wide)
        _pixels(matrices.data.t(), by_data, grad_x)
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        None if grad_weight is None else grad_weight.to(weight.dtype),
    )


def _wide(x: Tensor) -> torch.dtype:
    """The type that ``x`` is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _products(matrix: Tensor, images: Tensor) -> Tensor:
    """Transform (N, C, H, W) by (P, H · W) → (P, N, C)."""
    # Channels last, which makes the transform a batch of products with long rows: several times as fast as
    # one product whose columns are images.
    rows = images.flatten(2).mT.contiguous()
    return torch.bmm(matrix.expand(len(rows), -1, -1), rows).transpose(0, 1)


def _pixels(matrix: Tensor, products: Tensor, to: Tensor) -> None:
    """Write (H · W, P) times products (P, N, C) into images (N, C, H, W)."""
    values = products.transpose(0, 1)
    to.flatten(2).copy_(torch.bmm(matrix.expand(len(values), -1, -1), values).mT)


def _chunks(weight: Tensor, matrices: Transforms) -> list[slice]:
    """Output channels whose weights are transformed together."""
    row = max(len(matrices.weights) * weight.shape[1] * weight.itemsize, 1)
    # A multiple of 16, so that every chunk starts at the same alignment.
    count = max(CHUNK // row // 16, 1) * 16
    return [slice(start, start + count) for start in range(0, len(weight), count)]
