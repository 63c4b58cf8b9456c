"""Binary convolutions of a training step by XNOR and popcount (``qat/native/src/training/signs.cpp``)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qat.native.bindings import library, usable

#: Sides of a kernel that the library knows.
KERNELS: Final = (1, 3)
#: Products whose sum it holds, in 1/64 and in int32.
MOST_PRODUCTS: Final = 2**31 // 64 - 1


def can_sum(signs: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether :func:`sign_sums` takes tensors of these sizes, types and devices."""
    fits = weight.ndim == 4 == signs.ndim and weight.shape[1] == signs.shape[1] and stride > 0
    square = weight.shape[-1] in KERNELS and weight.shape[-1] == weight.shape[-2]
    holds = weight.shape[1:].numel() <= MOST_PRODUCTS
    return fits and square and holds and usable(signs) and usable(weight)


def sign_sums(signs: Tensor, weight: Tensor, stride: int) -> Tensor | None:
    """Convolution of -1 and +1 with padding of half the kernel, whose sums are exact.

    Args:
        signs: (N, C, H, W), float32, float64 or bfloat16, which alone rounds the sums.
        weight: (O, C, k, k) of one of these types; :func:`can_sum` must hold.
        stride: of both axes.

    Returns:
        (N, O, ⌈H/stride⌉, ⌈W/stride⌉) in the type of ``signs``; ``None`` where anything but -1 and +1, such
        as a sign that is 0, is among the signs or the weights.
    """
    native = library()
    assert native is not None
    images, inputs, height, width = signs.shape
    out = signs.new_empty(images, len(weight), -(-height // stride), -(-width // stride))
    arguments = {
        "images": images,
        "inputs": inputs,
        "height": height,
        "width": width,
        "channels": len(weight),
        "kernel": weight.shape[-1],
        "stride": stride,
        "x": signs,
        "weight": weight,
        "out": out,
        "x_type": native.types[signs.dtype],
        "weight_type": native.types[weight.dtype],
    }
    work = native.sign_sums_arguments.filled(arguments)
    status = native.sign_statuses[native.sign_sums(work, native.parallel, torch.get_num_threads())]
    if status == "no_memory":
        raise MemoryError("no memory for the signs of a convolution")
    return out if status == "summed" else None
