"""bfloat16 emulation: autocast to bfloat16 on processors that have no instructions for it.

There torch's own products of bfloat16 convert each pair of factors for itself: a convolution takes 14 to 40
times as long as in float32 (docs/LOG.md, 2026-11-29). Here the factors are rounded to bfloat16, as autocast
does it, then multiplied and summed in float32, and the sum is rounded once. This is as precise as the
instructions are, which sum in float32, too.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_X86: Final = ("x86_64", "amd64", "i386", "i686")
#: Functions whose factors autocast rounds. There are more, which image networks hardly use: torch computes
#: those its own, slow way.
_PRODUCTS: Final = frozenset(
    (
        *(F.conv1d, F.conv2d, F.linear, F.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    )
)
#: Autocast leaves float64 alone.
_ROUNDED: Final = (torch.float32, torch.bfloat16, torch.float16)


def lacks_bfloat16() -> bool:
    """Whether this processor is one of x86 without AVX-512, where torch emulates products of bfloat16."""
    return platform.machine().lower() in _X86 and torch.backends.cpu.get_cpu_capability() != "AVX512"


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are computed in float32 on ``device``, and rounded."""
    return dtype == torch.bfloat16 and device.type == "cpu" and lacks_bfloat16()


@contextmanager
def emulated_autocast() -> Iterator[None]:
    """``torch.autocast("cpu", torch.bfloat16)`` that multiplies and sums in float32."""
    with torch.autocast("cpu", torch.bfloat16), _Float32Products():
        yield


class _Float32Products(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute ``func`` in float32 if it is a product whose factors autocast would round."""
        named = dict(kwargs or {})
        if func not in _PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **named)
        factors = [one for one in (*args, *named.values()) if _is_factor(one)]
        if not factors or any(one.device.type != "cpu" or one.dtype not in _ROUNDED for one in factors):
            return func(*args, **named)
        with torch.autocast("cpu", enabled=False):
            sums = func(*map(_as_float32, args), **{name: _as_float32(one) for name, one in named.items()})
        return sums.to(torch.bfloat16)


def _is_factor(one: Any) -> bool:
    return isinstance(one, Tensor) and one.is_floating_point()


def _as_float32(one: Any) -> Any:
    return one.to(torch.bfloat16).float() if _is_factor(one) else one
