"""Convolutions of training and of signs, by the fastest way for each size, type and processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.native.signs import can_sum, sign_sums
from qat.ops.bfloat16 import is_emulated
from qat.ops.planes import apply, without_autocast
from qat.ops.winograd import are_exact, has_transforms, tiny_conv3x3, tiny_gradients

#: Largest side of an image that is convolved tap by tap in bfloat16.
SMALL_SIDE: Final = 2
#: Largest side of an image whose weights' gradient is a convolution itself in bfloat16.
HALF_SIDE: Final = 4
#: Fewest images and channels for which fewer products are worth transforming weights with fractions.
LEAST_IMAGES: Final = 32
LEAST_WIDTH: Final = 256


def training_conv2d(x: Tensor, weight: Tensor, stride: int, signs: bool = False) -> Tensor:
    """``conv2d`` with zero padding of half the kernel, and gradients that are as fast as its values.

    The last blocks of a network work on small images. At 2×2 pixels 20 of a 3×3 kernel's 36 products are with
    padding, at 4×4 still 44 of 144; 9 and 36 products of transformed images and weights are enough
    (:mod:`qat.ops.winograd`). In bfloat16 transforming costs more than it saves. There, at 2×2, each tap of
    the kernel is one matrix product of the pixels that meet; and at 4×4, where torch's algorithm for the
    weights' gradient takes twice as long as the values, that gradient is computed by its definition: the
    images convolved with the incoming gradients, batch and channels exchanged. All of these give the same
    sums in another order. A processor without instructions for bfloat16 computes in float32, with weights
    that are not rounded; images, and what gradients keep of them, stay in bfloat16.

    Args:
        x: (N, C, H, W).
        weight: (O, C, k, k), k odd.
        stride: of both axes.
        signs: whether ``x`` and ``weight`` hold nothing but -1, 0 and 1. Their sums are exact integers, which
            XNOR and popcount compute several times as fast.

    Returns:
        (N, O, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        half = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(half), weight if is_emulated(x.device, half) else weight.to(half)
    sums = _popcounts(x, weight, stride) if signs else None
    if sums is not None:
        return sums
    with without_autocast(x):
        if x.device.type != "cpu":
            pass
        elif _fewer_products(x, weight, stride, exact=signs):
            return tiny_conv3x3(x, weight)
        elif x.dtype == torch.bfloat16:
            return apply(_Half, x, weight, stride)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def binary_conv2d(signs: Tensor, weight: Tensor, stride: int) -> Tensor:
    """``conv2d`` of -1, 0 and 1 with zero padding of half the kernel: exact integers, by the fastest way.

    On a CPU by XNOR and popcount (:mod:`qat.native.signs`) where no sign is 0, else by sums of transformed
    signs of images up to 2×2, which are exact as well (:mod:`qat.ops.winograd`), else by torch. Sums are
    exact in float32 and float64; under autocast each is rounded once.

    Args:
        signs: (N, C, H, W).
        weight: (O, C, k, k), k odd, of -1, 0 and 1.
        stride: of both axes.

    Returns:
        (N, O, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    sums = _popcounts(signs, weight, stride)
    if sums is not None:  # rounded as autocast would; it leaves float64 alone
        rounds = torch.is_autocast_enabled("cpu") and sums.dtype != torch.float64
        return sums.to(torch.get_autocast_dtype("cpu")) if rounds else sums
    on_cpu = signs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if on_cpu and _has_transforms(signs, weight, stride) and are_exact(*signs.shape[2:]):
        return tiny_conv3x3(signs, weight)
    return F.conv2d(signs, weight, stride=stride, padding=weight.shape[-1] // 2)


def _popcounts(signs: Tensor, weight: Tensor, stride: int) -> Tensor | None:
    """Sums by XNOR and popcount, with gradients; ``None`` where the library can't be used, or a sign is 0."""
    if not can_sum(signs, weight, stride):
        return None
    sums = sign_sums(signs.detach(), weight.detach(), stride)
    # In a list: autograd replaces a tensor that a function takes and returns unchanged by a view of it.
    return None if sums is None else apply(_OfSums, signs, weight, stride, [sums])


def _has_transforms(x: Tensor, weight: Tensor, stride: int) -> bool:
    fits = weight.shape[-1] == 3 and stride == 1
    # In half precision transforming costs more than it saves, if there are instructions for products.
    wide = x.dtype in (torch.float32, torch.float64) or is_emulated(x.device, x.dtype)
    return fits and wide and has_transforms(*x.shape[2:])


def _fewer_products(x: Tensor, weight: Tensor, stride: int, exact: bool) -> bool:
    """Whether transformed products are fast, and exact for signs if that is asked for."""
    if not _has_transforms(x, weight, stride):
        return False
    return are_exact(*x.shape[2:]) or (
        not exact and len(x) >= LEAST_IMAGES and min(weight.shape[:2]) >= LEAST_WIDTH
    )


def _meetings(kernel: int, height: int, width: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Each tap of the kernel that meets a pixel: row, column, and the pixels of output and input it joins.

    Both are indices into (N, H, W, C).
    """
    for i, j in product(range(kernel), repeat=2):
        down, right = i - kernel // 2, j - kernel // 2
        if abs(down) < height and abs(right) < width:
            yield (
                i,
                j,
                (slice(None), _inside(-down, height), _inside(-right, width)),
                (slice(None), _inside(down, height), _inside(right, width)),
            )


def _inside(shift: int, length: int) -> slice:
    """Positions of an axis from which ``position - shift`` still lies on the axis."""
    return slice(max(shift, 0), length + min(shift, 0))


class _OfSums(torch.autograd.Function):
    """A convolution of signs whose sums are known already: it adds their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, sums: list[Tensor]) -> Tensor:
        # With frozen weights no gradient needs the signs: their shape and type are kept, not their memory.
        like = x if ctx.needs_input_grad[1] else x.new_empty(()).expand(x.shape)
        ctx.save_for_backward(like, weight)
        ctx.stride = stride
        return sums.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if x.dtype == torch.bfloat16:
            return *_half_gradients(grads[0], x, weight, ctx.stride, wanted), None, None
        # At 4×4 pixels transforming saves time if both gradients are wanted, not for one alone.
        if _fewer_products(x, weight, ctx.stride, exact=not all(wanted)):
            return *tiny_gradients(grads[0], x, weight, wanted), None, None
        return *_gradients(grads[0], x, weight, ctx.stride, wanted), None, None


class _Half(torch.autograd.Function):
    """Convolution in bfloat16, on processors that have instructions for it and on others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        padding = weight.shape[-1] // 2
        if is_emulated(x.device, x.dtype):
            return F.conv2d(x.float(), weight.float(), stride=stride, padding=padding).to(x.dtype)
        if _tap_by_tap(x, weight, stride):
            return _tap_values(x, weight)
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return *_half_gradients(grads[0], x, weight, ctx.stride, ctx.needs_input_grad[:2]), None


Gradients = tuple[Tensor | None, Tensor | None]


def _half_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]
) -> Gradients:
    """Gradients of a convolution in bfloat16."""
    if is_emulated(x.device, x.dtype):
        if _fewer_products(x, weight, stride, exact=not all(wanted)):
            return tiny_gradients(grad, x, weight, wanted)
        wide = _gradients(grad.float(), x.float(), weight.float(), stride, wanted)
        by_x, by_weight = wide
        return (
            None if by_x is None else by_x.to(x.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )
    if _tap_by_tap(x, weight, stride):
        return _tap_gradients(grad, x, weight, wanted)
    if weight.shape[-1] > 1 and max(x.shape[-2:]) <= HALF_SIDE:
        return _transposed_gradients(grad, x, weight, stride, wanted)
    return _gradients(grad, x, weight, stride, wanted)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]) -> Gradients:
    """torch's own gradients of a convolution by input and weight, where ``wanted``."""
    padding = [weight.shape[-1] // 2] * 2
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, [*wanted, False]
    )
    return by_x, by_weight


def _transposed_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: Sequence[bool]
) -> Gradients:
    """Gradients, the weights' one as a convolution of images with gradients, batch and channels exchanged."""
    kernel = weight.shape[-1]
    by_x = by_weight = None
    if wanted[0]:
        by_x, _ = _gradients(grad, x, weight, stride, [True, False])
    if wanted[1]:
        sums = F.conv2d(x.transpose(0, 1), grad.transpose(0, 1), padding=kernel // 2, dilation=stride)
        by_weight = sums[..., :kernel, :kernel].transpose(0, 1).contiguous()
    return by_x, by_weight


def _tap_by_tap(x: Tensor, weight: Tensor, stride: int) -> bool:
    return weight.shape[-1] > 1 and stride == 1 and max(x.shape[-2:]) <= SMALL_SIDE


def _tap_values(x: Tensor, weight: Tensor) -> Tensor:
    """Each tap as one product of the pixels that meet."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    out = pixels.new_zeros(*pixels.shape[:3], weight.shape[0])
    for i, j, to, of in _meetings(weight.shape[-1], *x.shape[2:]):
        # As matrices: torch's products of four dimensions are many times slower in half precision.
        product_of = pixels[of].flatten(0, 2) @ weight[:, :, i, j].contiguous().t()
        out[to] += product_of.view(out[to].shape)
    return out.permute(0, 3, 1, 2).contiguous()


def _tap_gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
    grad = grad.permute(0, 2, 3, 1).contiguous()
    pixels = x.permute(0, 2, 3, 1).contiguous()
    by_pixels = torch.zeros_like(pixels) if wanted[0] else None
    by_weight = torch.zeros_like(weight) if wanted[1] else None
    for i, j, to, of in _meetings(weight.shape[-1], *x.shape[2:]):
        there = grad[to].flatten(0, 2)
        if by_pixels is not None:
            by_pixels[of] += (there @ weight[:, :, i, j].contiguous()).view(pixels[of].shape)
        if by_weight is not None:
            by_weight[:, :, i, j] = there.t() @ pixels[of].flatten(0, 2)
    return None if by_pixels is None else by_pixels.permute(0, 3, 1, 2).contiguous(), by_weight
