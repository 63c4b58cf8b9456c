"""Convolutions of training and of signs: fewer products, or faster ones, where images are small."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.passes import without_autocast
from qat.widened import widens
from qat.winograd import are_exact, has_transforms, tiny_conv3x3

#: Largest side of an image that is convolved tap by tap in bfloat16.
SMALL_SIDE: Final = 2
#: Largest side of an image whose weights' gradient is a convolution itself in bfloat16.
HALF_SIDE: Final = 4
#: Fewest channels for which products of bytes are faster than float32's.
LEAST_CHANNELS: Final = 128
#: Fewest images and channels for which fewer products are worth transforming weights with fractions.
LEAST_IMAGES: Final = 32
LEAST_WIDTH: Final = 256


def training_conv2d(x: Tensor, weight: Tensor, stride: int, signs: bool = False) -> Tensor:
    """``conv2d`` with zero padding of half the kernel, whose gradients are as fast as its values.

    At 2×2 pixels, where the last blocks work on small images, 20 of a 3×3 kernel's 36 products are with
    padding, and at 4×4 still 44 of 144: there 9 and 36 products of transformed images and weights do
    (:mod:`qat.winograd`). In bfloat16 a product costs less than transforming. There, at 2×2, each tap is one
    matrix product of the pixels that meet; at 4×4 the general algorithm for the weights' gradient takes twice
    as long as the values, and it is computed as what it is, a convolution of the images with the gradients,
    batch and channels exchanged. The sums are the same, in another order. A processor without instructions
    for bfloat16 goes the ways of float32, with weights that are not rounded; images and what gradients need
    of them stay in bfloat16.

    Args:
        x: (N, C, H, W).
        weight: (O, C, k, k), k odd.
        stride: of both axes.
        signs: whether ``x`` and ``weight`` hold nothing but -1, 0 and 1. In float32 their sums, exact
            integers either way, then come from products of bytes in about half the time.

    Returns:
        (N, O, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        half = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(half), weight if widens(x.device, half) else weight.to(half)
    side, kernel, result = max(x.shape[-2:]), weight.shape[-1], None
    wide = widens(x.device, x.dtype)
    if x.device.type != "cpu":
        pass
    elif x.dtype == torch.bfloat16 and not wide:
        if kernel > 1 and stride == 1 and side <= SMALL_SIDE:
            result = _TapByTap.apply(x, weight)  # type: ignore[no-untyped-call]  # torch leaves it without types
        elif kernel > 1 and side <= HALF_SIDE:
            result = _Transposed.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    elif _fewer_products(x, weight, stride, signs):
        with without_autocast(x):
            result = tiny_conv3x3(x, weight)
    elif wide:
        result = _Widened.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    elif signs and x.dtype == torch.float32 and _bytes_are_fast(x, weight):
        result = _OfSigns.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return F.conv2d(x, weight, stride=stride, padding=kernel // 2) if result is None else result


def binary_conv2d(signs: Tensor, weight: Tensor, stride: int) -> Tensor:
    """``conv2d`` of -1, 0 and 1 with padding of half the kernel: exact integers, soon where images are tiny.

    Sums of transformed signs of images up to 2×2 are exact as well (:mod:`qat.winograd`), in float32 and
    float64; autocast, which would round each product of them, takes torch's way, and rounds the sum.

    Args:
        signs: (N, C, H, W).
        weight: (O, C, k, k), k odd; -1, 0 and 1, too.
        stride: of both axes.

    Returns:
        (N, O, ⌈H/stride⌉, ⌈W/stride⌉).
    """
    on_cpu = signs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if on_cpu and _has_transforms(signs, weight, stride) and are_exact(*signs.shape[2:]):
        return tiny_conv3x3(signs, weight)
    return F.conv2d(signs, weight, stride=stride, padding=weight.shape[-1] // 2)


def _has_transforms(x: Tensor, weight: Tensor, stride: int) -> bool:
    fits = weight.shape[-1] == 3 and stride == 1
    # In half precision a direct product costs less than transforming, if there are instructions for it.
    wide = x.dtype in (torch.float32, torch.float64) or widens(x.device, x.dtype)
    return fits and wide and has_transforms(*x.shape[2:])


def _fewer_products(x: Tensor, weight: Tensor, stride: int, signs: bool) -> bool:
    """Whether transformed products are as good, and faster."""
    if not _has_transforms(x, weight, stride):
        return False
    return are_exact(*x.shape[2:]) or (
        not signs and len(x) >= LEAST_IMAGES and min(weight.shape[:2]) >= LEAST_WIDTH
    )


def _bytes_are_fast(x: Tensor, weight: Tensor) -> bool:
    """Whether there are instructions for products of bytes, and channels enough to use them."""
    fits = len(x) > 0 and weight.shape[1] >= LEAST_CHANNELS
    return fits and x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _neighbours(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Bytes around each pixel of the result: (N, C, H, W) → (N · ⌈H/stride⌉ · ⌈W/stride⌉, k · k · C)."""
    border = kernel // 2
    pixels = x.permute(0, 2, 3, 1).to(torch.int8)
    padded = F.pad(pixels, (0, 0, border, border, border, border)).contiguous()
    images, height, width, channels = padded.shape
    across, down = stride * channels, stride * width * channels
    rows, columns = (-(-side // stride) for side in x.shape[2:])
    # The k pixels of a row lie one behind the other.
    windows = padded.as_strided(
        (images, rows, columns, kernel, kernel * channels),
        (height * width * channels, down, across, width * channels, 1),
    )
    return windows.reshape(images * rows * columns, kernel * kernel * channels)


def _meetings(kernel: int, height: int, width: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Each tap that meets a pixel: row, column, indices into output and input (N, H, W, C)."""
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
    """Positions that stay inside when they are reached from ``shift`` before them."""
    return slice(max(shift, 0), length + min(shift, 0))


class _OfSigns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        kernel = weight.shape[-1]
        taps = weight.permute(2, 3, 1, 0).to(torch.int8).flatten(0, 2)
        sums = torch._int_mm(_neighbours(x, kernel, stride), taps)
        rows = -(-x.shape[2] // stride)
        return sums.view(len(x), rows, -1, len(weight)).permute(0, 3, 1, 2).to(x.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_weight, _ = _gradients(grads[0], x, weight, ctx.stride, wanted)
        return grad_x, grad_weight, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """torch's own gradients of a convolution by input, weight and bias, where ``wanted``."""
    padding = [weight.shape[-1] // 2] * 2
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, wanted
    )
    return found


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        kernel, stride = weight.shape[-1], ctx.stride
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = _gradients(grad, x, weight, stride, [True, False, False])
        if ctx.needs_input_grad[1]:
            sums = F.conv2d(x.transpose(0, 1), grad.transpose(0, 1), padding=kernel // 2, dilation=stride)
            grad_weight = sums[..., :kernel, :kernel].transpose(0, 1).contiguous()
        return grad_x, grad_weight, None


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        with without_autocast(x):
            out = F.conv2d(x.float(), weight.float(), stride=stride, padding=weight.shape[-1] // 2)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], False]
        found = _gradients(grads[0].float(), x.float(), weight.float(), ctx.stride, wanted)
        grad_x, grad_weight = (
            None if one is None else one.to(like.dtype)
            for one, like in zip(found[:2], (x, weight), strict=True)
        )
        return grad_x, grad_weight, None


class _TapByTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = pixels.new_zeros(*pixels.shape[:3], weight.shape[0])
        for i, j, to, of in _meetings(weight.shape[-1], *x.shape[2:]):
            # Flat, since products of four dimensions take a way many times slower in half precision.
            product_of = pixels[of].flatten(0, 2) @ weight[:, :, i, j].contiguous().t()
            out[to] += product_of.view(out[to].shape)
        return out.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].permute(0, 2, 3, 1).contiguous()
        pixels = x.permute(0, 2, 3, 1).contiguous()
        grad_pixels = torch.zeros_like(pixels) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i, j, to, of in _meetings(weight.shape[-1], *x.shape[2:]):
            there = grad[to].flatten(0, 2)
            if grad_pixels is not None:
                grad_pixels[of] += (there @ weight[:, :, i, j].contiguous()).view(pixels[of].shape)
            if grad_weight is not None:
                grad_weight[:, :, i, j] = there.t() @ pixels[of].flatten(0, 2)
        return (
            None if grad_pixels is None else grad_pixels.permute(0, 3, 1, 2).contiguous(),
            grad_weight,
        )
