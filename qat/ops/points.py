"""What operations know of a quantization point, so that they can put its steps together with their own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qat.grid import Grid


class QuantizationPoint(Protocol):
    """A place in the network where values are put on a grid; see :mod:`qat.quantize.quantizer_base`."""

    def __call__(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """``Q(x)``: ``x`` on the grid, whose range may be observed on the way, of ``observed`` if given.

        With ``overwrite`` the result may take the memory of ``x``.
        """

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``[x]``: ``x`` on the grid as it is; nothing is observed."""

    def fixed_grid(self) -> Grid | None:
        """The grid, if ``Q`` and ``[·]`` do nothing but put values on it.

        ``None`` if it is observed or learned meanwhile, if a hook waits for values, or if there is none.
        """

    @property
    def observes(self) -> bool:
        """Whether a call looks at values for the range right now."""

    @property
    def looks_at_extremes(self) -> bool:
        """Whether the smallest and the largest value are all that it looks at then."""


class _InFloat:
    """A point whose values stay in float."""

    observes = False
    looks_at_extremes = True

    def __call__(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        return x

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Any shape → as it is."""
        return x

    def fixed_grid(self) -> Grid | None:
        """None."""
        return None


#: For networks without quantization.
IN_FLOAT: QuantizationPoint = _InFloat()
