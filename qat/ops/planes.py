"""Element-wise operations and sums over (N, C, H, W) that are fast for images of any size.

torch vectorizes runs of neighbouring pixels, and a tiny image has too few of them.

What the other operations are written with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

#: Bytes of a tensor that stays in the cache of a core. Its memory is used again; a larger one's is given back
#: to the system and asked for anew, page by page.
PORTION: Final = 2**21
#: Bytes of a vector register (AVX-512).
REGISTER: Final = 64
HALF: Final = (torch.bfloat16, torch.float16)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """What ``function`` gives for ``arguments``, with its gradient."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it without types
    return result


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which operators keep the type of their input, on the device of ``x``."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


def spread(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,), (1, C) or (N, C) in the type of ``x``, and in a shape that goes with it (N, C, H, W).

    With one value for all pixels of a plane torch vectorizes along the plane. A plane of a few pixels doesn't
    fill a register: there a value for each pixel is several times as fast, though it takes memory.
    """
    pixels = x.shape[2:].numel()
    shaped = values.to(x.dtype)[..., None, None].view(-1, x.shape[1], 1, 1)
    if x.device.type == "cpu" and pixels > 1 and pixels * x.itemsize < REGISTER:
        return shaped.expand(-1, -1, *x.shape[2:]).contiguous()
    return shaped


def multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``base + x · factor`` with a factor from :func:`spread`."""
    if x.dtype in HALF and factor.shape[-1] != x.shape[-1]:  # where torch's fused form is slow
        return (x * factor).add_(base)
    return torch.addcmul(base, x, factor)


def portions(x: Tensor) -> list[slice]:
    """Slices of the batch of about :data:`PORTION` bytes each, at least one; on accelerators all of it."""
    count = len(x)
    if x.device.type == "cpu":
        count = max(1, PORTION * count // max(x.nbytes, 1))
    return [slice(start, start + count) for start in range(0, max(len(x), 1), max(count, 1))]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over height and width, (N, C) in the type of sums."""
    sums = [torch.linalg.vecdot(a[some].flatten(2), b[some].flatten(2)) for some in portions(a)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def channel_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over images, height and width, (C,) in ``dtype``."""
    if x.shape[2:].numel() * x.itemsize < REGISTER:  # too few pixels to sum up at once: images first
        return x.sum(0, dtype=dtype).sum((1, 2))
    return x.sum((2, 3)).sum(0, dtype=dtype)
