"""Autocast to bfloat16 on processors that have no instructions for it.

torch takes such products apart, one by one: a convolution takes 14 to 40 times as long as in float32. Here
factors are rounded to bfloat16, as autocast does, multiplied and summed in float32, and the sum is rounded
once: no less precise than with the instructions, which sum in float32, too.
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
#: What the networks here, and teachers of other kinds, multiply with; their first arguments are the factors.
_PRODUCTS: Final = (F.conv2d, F.linear)


def lacks_bfloat16() -> bool:
    """Whether this processor is one of x86 without AVX-512, where torch emulates products of bfloat16."""
    return platform.machine().lower() in _X86 and torch.backends.cpu.get_cpu_capability() != "AVX512"


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` are computed in float32 on ``device``."""
    return dtype == torch.bfloat16 and device.type == "cpu" and lacks_bfloat16()


@contextmanager
def widened_autocast() -> Iterator[None]:
    """``torch.autocast("cpu", torch.bfloat16)`` that computes convolutions and linear layers in float32."""
    with torch.autocast("cpu", torch.bfloat16), _Widened():
        yield


class _Widened(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute ``func`` with wide factors if it is a product of tensors on the CPU."""
        named = dict(kwargs or {})
        if func in _PRODUCTS and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = func(*map(_widened, args), **{name: _widened(one) for name, one in named.items()})
            return wide.to(torch.bfloat16)
        return func(*args, **named)


def _widened(one: Any) -> Any:
    return one.to(torch.bfloat16).float() if isinstance(one, Tensor) else one
