"""Quantizers of activations: modules that put values on one grid per tensor, straight-through in training.

These belong to the backend ``torch_ao``, whose ranges are observed (:mod:`qat.quantize.observers`). The other
backend learns its scales (:mod:`qat.quantize.learned_scales`). :mod:`qat.quantize.backends` chooses by the
recipe.

An :class:`ActivationQuantizer` is in one of three states. *Uncalibrated*, it passes values through.
*Observing*, it tracks their range, and in training it also quantizes. *Frozen*, it quantizes on a fixed grid.
Outside of training and calibration it never observes, so that an evaluation depends on nothing but its input
and the saved state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.grid import Grid
from qat.ops.fake_quantize import Extremes, fake_quantize
from qat.quantize.integers import saturate
from qat.quantize.observers import MOVING, Observer, observed_grid
from qat.quantize.quantizer_base import Quantizer, power_of_two_above


class FixedQuantizer(Quantizer):
    """Fake quantization on a grid that is known beforehand, as for the image and the attention.

    Args:
        scale: distance between neighbouring values of the grid.
        zero_point: the integer that stands for 0.
        bits: width of the unsigned integers, 2 to 8.
    """

    enabled = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, bits: int = 8) -> None:
        """Store the grid."""
        super().__init__()
        self.bits, self.quant_min, self.quant_max = bits, 0, 2**bits - 1
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def forward(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Put values of any shape on the grid; the shape stays."""
        return self.requantize(x)

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Put values of any shape on the grid; the shape stays."""
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )

    @property
    def has_grid(self) -> bool:
        """True, since the grid is fixed."""
        return True

    def steps(self, x: Tensor) -> Tensor:
        """The integers of ``x`` minus the zero point, in float32; any shape."""
        q = torch.round(x.float() / self.scale) + self.zero_point
        return q.clamp_(self.quant_min, self.quant_max) - self.zero_point

    def describe(self) -> dict[str, object]:
        """The entry in the quantization map: type, scale and zero point."""
        return {
            "type": f"uint{self.bits}",
            "scale": float(self.scale),
            "zero_point": int(self.zero_point),
            "range": "fixed",
        }


class ActivationQuantizer(Quantizer):
    """Fake quantization of an activation on one grid per tensor, whose range is observed.

    ``scale · clamp(round(x / scale), quant_min, quant_max)``, with a straight-through gradient; values
    outside of the range get no gradient. The zero point is 0. Signed grids use all ``2**bits`` integers.
    Unsigned grids, for values that are never negative, start at 0.

    Args:
        bits: width of the integers, 2 to 8. Up to 16 bits can be simulated, but not exported.
        signed: whether values can be negative.
        observer: how the range is found, see :mod:`qat.quantize.observers`. Observers that clip observe only
            during calibration; the others also in training, until they are frozen.
        averaging: weight of the newest batch in the moving average.
        percentile: percent of the magnitudes that the ``percentile`` observer keeps in range.
        clip: largest magnitude that the range may span; ``None`` leaves it to the observer.
        power_of_two: whether the scale is rounded up to a power of two.
    """

    enabled = True

    def __init__(
        self,
        bits: int = 8,
        signed: bool = True,
        observer: Observer = "moving_average",
        averaging: float = 0.05,
        percentile: float = 99.99,
        clip: float | None = None,
        power_of_two: bool = False,
    ) -> None:
        """Start uncalibrated and observing."""
        super().__init__()
        self.bits, self.signed, self.observer = bits, signed, observer
        self.clip, self.power_of_two = clip, power_of_two
        self.fake: Any = observed_grid(bits, signed, observer, averaging=averaging, percentile=percentile)
        self.quant_min = -(2 ** (bits - 1)) if signed else 0
        self.quant_max = 2 ** (bits - signed) - 1
        self.calibrated = False
        self.calibrating = False
        self.observing = True

    @property
    def scale(self) -> Tensor:
        """Distance between neighbouring values of the grid, float32 (1,)."""
        scale: Tensor = self.fake.scale
        return power_of_two_above(scale) if self.power_of_two else scale

    def forward(self, x: Tensor, observed: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Observe and quantize ``x``, see :meth:`Quantizer.forward`. Without a grid ``x`` is returned.

        Warns in training if there is no range and the observer doesn't observe in training either.
        """
        extremes = None
        if self.observes:
            found = self._observe(x if observed is None else observed)
            extremes = found if observed is None else None
        if not self.has_grid:
            if self.training and not self.observes:
                warnings.warn(
                    f"a quantization point has no range, and its values stay float: {self.observer!r} looks "
                    "at values in calibration alone, which comes before training "
                    "(qat.quantize.calibration.calibrate)",
                    stacklevel=2,
                )
            return x
        return self._on_grid(x, extremes, overwrite)

    def requantize(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Put values of any shape on the grid; without a grid they are returned unchanged."""
        return self._on_grid(x, None, overwrite) if self.has_grid else x

    def _on_grid(self, x: Tensor, extremes: Extremes | None, overwrite: bool) -> Tensor:
        return fake_quantize(x, self.scale, self.bits, self.signed, extremes, overwrite)

    @property
    def observes(self) -> bool:
        """True in calibration, and in training with an observer that doesn't clip; false once frozen."""
        return self.observing and (self.calibrating or (self.training and self.observer in MOVING))

    @property
    def has_grid(self) -> bool:
        """Whether a range was found, and no calibration is running."""
        return self.calibrated and not self.calibrating

    def fixed_grid(self) -> Grid | None:
        """The grid, if it is known and doesn't change, and no hook of torch watches this point."""
        watched = self._forward_hooks or self._forward_pre_hooks
        if watched or self.observes or not self.has_grid:
            return None
        return Grid(float(self.scale), self.bits, self.signed)

    def saturate(self, steps: Tensor) -> Tensor:
        """Round half to even and clamp to the grid's integers; any shape, same type."""
        return saturate(steps, self.quant_min, self.quant_max)

    def steps(self, x: Tensor) -> Tensor:
        """The integers of ``x``, in float32; any shape. They are exact for values on the grid."""
        return self.saturate(x.float() / self.scale)

    def values(self, steps: Tensor) -> Tensor:
        """The values of integers, which are rounded and clamped to the grid first; any shape, float32."""
        return self.saturate(steps) * self.scale

    @property
    def looks_at_extremes(self) -> bool:  # type: ignore[override]  # of the base class it is a constant
        """False in calibration, when observers that clip look at every value."""
        return not self.calibrating

    def _observe(self, x: Tensor) -> Extremes | None:
        """Observe ``x``, and return its minimum and maximum if they were computed."""
        if self.observer not in MOVING:
            self.fake.activation_post_process(x.detach().float())
            return None
        # These observers use nothing but the extremes, which are computed here because `fake_quantize` needs
        # them, too.
        extremes = torch.aminmax(x.detach()) if x.numel() else None
        # A process without values calls the observer, too, which gets the extremes of the other processes.
        seen = x.detach() if extremes is None else torch.stack(extremes)
        self.fake.activation_post_process(seen.float())
        if not self.calibrating:
            self._update_grid()
        return extremes

    def _update_grid(self) -> None:
        """Compute the grid from the observed range."""
        scale, zero_point = self.fake.activation_post_process.calculate_qparams()
        if self.clip is not None:
            scale = scale.clamp_max(self.clip / ((self.quant_max - self.quant_min) / (1 + self.signed)))
        self.fake.scale.copy_(scale)
        self.fake.zero_point.copy_(zero_point)
        self.calibrated = True

    def start_calibration(self) -> None:
        """Observe without quantizing until :meth:`finish_calibration`."""
        self.calibrating = True

    def finish_calibration(self) -> None:
        """Compute the grid from the observed range. A point that observed nothing stays uncalibrated."""
        self.calibrating = False
        if bool(torch.isfinite(self.fake.activation_post_process.min_val).all()):
            self._update_grid()

    def freeze(self) -> None:
        """Fix the grid from here on."""
        self.observing = False

    def describe(self) -> dict[str, object]:
        """The entry in the quantization map: type, scale and how the range was found."""
        kind = f"{'int' if self.signed else 'uint'}{self.bits}"
        scale = float(self.scale) if self.calibrated else None
        return {"type": kind, "scale": scale, "zero_point": 0, "range": self.observer}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        known = self.calibrated
        super()._load_from_state_dict(state_dict, prefix, *args)
        low = state_dict.get(f"{prefix}fake.activation_post_process.min_val")
        self.calibrated = known if low is None else bool(torch.isfinite(low).all())


def fake_quantize_symmetric(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Fake-quantize ``x``, any shape, on one signed grid with zero point 0.

    Args:
        x: the values.
        scale: scalar tensor, which gets no gradient.
        bits: width of the integers.
    """
    return fake_quantize(x, scale.detach().float().reshape(1), bits, signed=True)


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield the module name and the quantizer of each observed quantization point, in definition order."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield name, module
