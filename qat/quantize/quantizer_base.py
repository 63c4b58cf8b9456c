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
    """A module whose state keeps its type, and that a checkpoint may leave out.

    ``.to(dtype)`` leaves its tensors as they are, and a strict load of a state dict without them keeps what
    the module has.
    """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A float-rest checkpoint has no key of this point. It loads strictly all the same: the point
        # keeps what it has. A checkpoint with some of the keys is held to all of them.
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
    """Interface of a quantization point; this base class is a point left in float.

    ``forward`` observes (if in that state) and quantizes; ``requantize`` puts further values on the grid
    already chosen, observing nothing.
    """

    enabled = False
    bits = 32
    #: Whether the smallest and the largest value are all that ``forward`` looks at.
    looks_at_extremes = True

    def forward(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Any shape → same shape; ``observed`` is looked at for the range in place of ``x``.

        With ``overwrite`` the result may take the memory of ``x``, see
        :func:`qat.ops.fake_quantize.fake_quantize`.
        """
        return x

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Any shape → same shape, on the grid of this point."""
        return x

    @property
    def observes(self) -> bool:
        """Whether ``forward`` looks at values for the range right now."""
        return False

    @property
    def has_grid(self) -> bool:
        """Whether values can be put on a known grid right now."""
        return False

    def fixed_grid(self) -> Grid | None:
        """The grid, where an operation may put values on it by itself; see :mod:`qat.ops.points`."""
        return None

    @property
    def is_integer(self) -> bool:
        """Whether integer arithmetic may use this grid now: it is known, and has at most 8 bits."""
        return self.has_grid and self.bits <= LARGEST_BITS

    def describe(self) -> dict[str, object]:
        """The point's line in the quantization map."""
        return {"type": "float"}


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is not less than ``scale`` (positive, float32): same shape and type."""
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    # In float64 and rounded once: some accelerators' float32 powers are off in the last place.
    return torch.ldexp(torch.ones_like(scale, dtype=torch.float64), exponent).to(scale.dtype)
