"""What all quantizers share: how their state is loaded and moved, and a quantization point's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat.grid import Grid

#: Bits of the widest integers that an integer network holds. Wider grids are only simulated, in float.
LARGEST_BITS: Final = 8


class QuantizerState(nn.Module):
    """A module whose tensors keep their type, and whose state a checkpoint may leave out.

    ``.to(dtype)`` doesn't change its tensors. When a state dict without any key of this module is loaded
    strictly, the module keeps its state.
    """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The checkpoint of a network with a float rest has no key of this module, and is loaded all the same.
        # If a checkpoint has some of the keys, it must have all of them.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizerState:
        # A scale in bfloat16 would move the grid by up to 0.4%, so `.to(dtype)` moves these tensors to the
        # new device and leaves their values and types.
        before = dict(self.named_buffers())
        learned = {name: parameter.detach() for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for name, old in before.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            new = getattr(module, leaf)
            if new.dtype != old.dtype:
                setattr(module, leaf, old.to(new.device))
        for name, parameter in self.named_parameters():
            if parameter.dtype != learned[name].dtype:
                parameter.data = learned[name].to(parameter.device)
        return self


class Quantizer(QuantizerState):
    """Interface of a quantization point. This base class leaves values in float.

    ``forward`` observes values, while it is to find a range, and quantizes them. ``requantize`` puts further
    values on the same grid without observing them.
    """

    enabled = False
    bits = 32
    #: Whether ``forward`` observes nothing but the smallest and the largest value.
    looks_at_extremes = True

    def forward(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Observe and quantize ``x``.

        Args:
            x: values of any shape.
            observed: values that are observed in place of ``x``.
            overwrite: whether the result may be written to the memory of ``x``, see
                :func:`qat.ops.fake_quantize.fake_quantize`.

        Returns:
            Values of the same shape.
        """
        return x

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Put values of any shape on the grid of this point; the shape stays. Nothing is observed."""
        return x

    @property
    def observes(self) -> bool:
        """Whether ``forward`` observes values in the present state."""
        return False

    @property
    def has_grid(self) -> bool:
        """Whether the grid is known, and ``forward`` puts values on it in the present state."""
        return False

    def fixed_grid(self) -> Grid | None:
        """The grid, if an operation may put values on it without calling this point, else ``None``.

        See :mod:`qat.ops.points`.
        """
        return None

    @property
    def is_integer(self) -> bool:
        """Whether integer arithmetic may use the grid: it is known, and has at most 8 bits."""
        return self.has_grid and self.bits <= LARGEST_BITS

    def describe(self) -> dict[str, object]:
        """The entry of this point in the quantization map."""
        return {"type": "float"}


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below ``scale``, which is positive float32 of any shape."""
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    # The power is computed in float64 and then rounded, because on some accelerators float32 powers are
    # inexact.
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent).to(scale.dtype)
