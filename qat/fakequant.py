"""The one adapter to ``torch.ao.quantization``: quantizers that observe a range and simulate integers.

Nothing else in the project imports ``torch.ao``. A second backend offers the same two kinds of quantizer, for
activations and for weights, as subclasses in a file beside this one, and a line in :data:`BACKENDS`.

An activation quantizer is in one of three states: *uncalibrated* (passes values through), *observing*
(tracks the range; while training it also quantizes), *frozen* (quantizes on a fixed grid). Outside of
training and calibration nothing is ever observed, so evaluation depends on the input and the state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qat.integers import saturate
from qat.recipe import TrunkGroup

Observer = Literal["moving_average", "minmax", "histogram"]
#: Clipping points that the histogram's search compares.
_CANDIDATES: Final = 200


class _LeastSquaredErrorObserver(HistogramObserver):
    """torch's histogram with a search of its own: the range of least squared error.

    torch's search moves both ends independently, for a grid of any zero point. A symmetric grid spans the
    farther end on both sides, and at few bits its error is then several times the least one.
    """

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        width = (self.max_val - self.min_val) / self.bins
        x = self.min_val + width * (torch.arange(self.bins, device=self.histogram.device) + 0.5)
        farthest = torch.maximum(self.max_val, -self.min_val)
        low, high = float(self.quant_min), float(self.quant_max)
        errors = []
        for share in range(1, _CANDIDATES + 1):
            steps = (high - low) / (2 if low else 1)
            scale = (farthest * share / _CANDIDATES / steps).clamp_min(self.eps)
            error = (x / scale).round().clamp(low, high) * scale - x
            errors.append((self.histogram * error.square()).sum())
        clip = farthest * (int(torch.stack(errors).argmin()) + 1) / _CANDIDATES
        return (-clip if low else torch.zeros_like(clip)), clip


_OBSERVERS: Final[dict[str, Any]] = {
    "moving_average": MovingAverageMinMaxObserver,
    "minmax": MinMaxObserver,
    "histogram": _LeastSquaredErrorObserver,
}


class Quantizer(nn.Module):
    """Interface of a quantization point; this base class is a point left in float.

    ``forward`` observes (if in that state) and quantizes; ``requantize`` puts further values on the grid
    already chosen, observing nothing.
    """

    enabled = False

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Any shape → same shape; ``observed`` is looked at for the range in place of ``x``."""
        return x

    def requantize(self, x: Tensor) -> Tensor:
        """Any shape → same shape, on the grid of this point."""
        return x

    @property
    def has_grid(self) -> bool:
        """Whether values can be put on a known grid right now."""
        return False

    def describe(self) -> dict[str, object]:
        """The point's line in the quantization map."""
        return {"type": "float"}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A float-rest checkpoint has no key of this point. It loads strictly all the same: the point
        # keeps what it has. A checkpoint with some of the keys is held to all of them.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # A scale in bfloat16 would move the grid by up to 0.4%, so `.to(dtype)` moves these buffers to the
        # new device and leaves their values and types.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for name, old in before.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            new = getattr(module, leaf)
            if new.dtype != old.dtype:
                setattr(module, leaf, old.to(new.device))
        return self


class FixedQuantizer(Quantizer):
    """Fake quantization on a grid known beforehand: the image and the attention.

    Args:
        scale: step of the grid.
        zero_point: integer that stands for 0.
        bits: width of the unsigned integer, 2 to 8.
    """

    enabled = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, bits: int = 8) -> None:
        """Fix the grid."""
        super().__init__()
        self.bits, self.quant_min, self.quant_max = bits, 0, 2**bits - 1
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Any shape → same shape, on the grid."""
        return self.requantize(x)

    def requantize(self, x: Tensor) -> Tensor:
        """Any shape → same shape, on the grid."""
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )

    @property
    def has_grid(self) -> bool:
        """Always."""
        return True

    def steps(self, x: Tensor) -> Tensor:
        """Integers of the grid less the zero point, in float32; any shape."""
        q = torch.round(x.float() / self.scale) + self.zero_point
        return q.clamp_(self.quant_min, self.quant_max) - self.zero_point

    def describe(self) -> dict[str, object]:
        """Type, scale and zero point."""
        return {
            "type": f"uint{self.bits}",
            "scale": float(self.scale),
            "zero_point": int(self.zero_point),
            "range": "fixed",
        }


class ActivationQuantizer(Quantizer):
    """Per-tensor fake quantization of an activation, its range observed.

    Signed points are symmetric with zero point 0 and use all ``2**bits`` integers; unsigned points (of
    values that are never negative) start at 0. Values outside the range saturate, and get no gradient.

    Args:
        bits: 2 to 8.
        signed: whether the values take both signs.
        observer: how the range is found. ``histogram`` (least squared error) observes during calibration
            only, since it is slow; the other two go on while training until frozen.
        averaging: weight of the newest batch in the moving average.
    """

    enabled = True

    def __init__(
        self,
        bits: int = 8,
        signed: bool = True,
        observer: Observer = "moving_average",
        averaging: float = 0.05,
    ) -> None:
        """Start uncalibrated and observing."""
        super().__init__()
        self.bits, self.signed, self.observer = bits, signed, observer
        options: dict[str, object] = {"averaging_constant": averaging} if observer == "moving_average" else {}
        self.fake = FakeQuantize(  # type: ignore[no-untyped-call]  # torch leaves it without types
            observer=_OBSERVERS[observer],
            quant_min=-(2 ** (bits - 1)) if signed else 0,
            quant_max=2 ** (bits - 1) - 1 if signed else 2**bits - 1,
            dtype=torch.qint8 if signed else torch.quint8,
            qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
            **options,
        )
        self.quant_min: int = self.fake.activation_post_process.quant_min
        self.quant_max: int = self.fake.activation_post_process.quant_max
        self.calibrated = False
        self.calibrating = False
        self.observing = True

    @property
    def scale(self) -> Tensor:
        """Step of the grid, (1,) float32."""
        scale: Tensor = self.fake.scale
        return scale

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Any shape → same shape; see the class for when it observes and quantizes."""
        if self.observing and (self.calibrating or self.training):
            self._observe(x if observed is None else observed)
        return self.requantize(x)

    def requantize(self, x: Tensor) -> Tensor:
        """Any shape → same shape, on the grid; unchanged while calibrating or uncalibrated."""
        if self.calibrating or not self.calibrated:
            return x
        return torch.fake_quantize_per_tensor_affine(
            x, self.fake.scale, self.fake.zero_point, self.quant_min, self.quant_max
        )

    @property
    def has_grid(self) -> bool:
        """Calibrated, and not observing for calibration just now."""
        return self.calibrated and not self.calibrating

    def saturate(self, steps: Tensor) -> Tensor:
        """Round half to even, clamp to the grid's integers; any shape, same type."""
        return saturate(steps, self.quant_min, self.quant_max)

    def steps(self, x: Tensor) -> Tensor:
        """Integers of the grid, in float32; any shape. Exact for values on the grid."""
        return self.saturate(x.float() / self.scale)

    def values(self, steps: Tensor) -> Tensor:
        """Values of steps, rounded and clamped to the grid first; any shape, float32."""
        return self.saturate(steps) * self.scale

    def _observe(self, x: Tensor) -> None:
        if self.observer == "histogram" and not self.calibrating:
            return
        self.fake.activation_post_process(x.detach().float())
        if not self.calibrating:
            self._update_grid()

    def _update_grid(self) -> None:
        scale, zero_point = self.fake.activation_post_process.calculate_qparams()
        self.fake.scale.copy_(scale)
        self.fake.zero_point.copy_(zero_point)
        self.calibrated = True

    def start_calibration(self) -> None:
        """Observe without quantizing until :meth:`finish_calibration`."""
        self.calibrating = True

    def finish_calibration(self) -> None:
        """Choose the grid from what was observed. A point that saw nothing stays uncalibrated."""
        self.calibrating = False
        if bool(torch.isfinite(self.fake.activation_post_process.min_val).all()):
            self._update_grid()

    def describe(self) -> dict[str, object]:
        """Type, scale and how the range was found."""
        kind = f"{'int' if self.signed else 'uint'}{self.bits}"
        scale = float(self.scale) if self.calibrated else None
        return {"type": kind, "scale": scale, "zero_point": 0, "range": self.observer}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        known = self.calibrated
        super()._load_from_state_dict(state_dict, prefix, *args)
        low = state_dict.get(f"{prefix}fake.activation_post_process.min_val")
        self.calibrated = known if low is None else bool(torch.isfinite(low).all())


class WeightQuantizer(nn.Module):
    """Symmetric fake quantization of weights, one scale per output channel, taken from the weights.

    The range is the weights' own at every forward, so there is nothing to calibrate and no state. A row of
    zeros keeps a tiny positive scale and stays zero.

    Args:
        bits: 2 to 8; integers lie in ``±(2**(bits - 1) - 1)``.
    """

    def __init__(self, bits: int = 8) -> None:
        """Take the width; there is nothing else to set."""
        super().__init__()
        self.bits, self.quant_max = bits, 2 ** (bits - 1) - 1

    def scale(self, weight: Tensor) -> Tensor:
        """Scale of each output channel of ``weight`` (O, ...): (O,) float32."""
        observer = PerChannelMinMaxObserver(
            ch_axis=0,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            quant_min=-self.quant_max,
            quant_max=self.quant_max,
        ).to(weight.device)
        observer(weight.detach().float())
        scale: Tensor = observer.calculate_qparams()[0]
        return scale

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer weights (O, ...) in float32, and the scale of each output channel (O,) in float64."""
        scale = self.scale(weight).double()
        steps = weight.detach().double() / scale.view(-1, *[1] * (weight.ndim - 1))
        return saturate(steps, -self.quant_max, self.quant_max).float(), scale

    def forward(self, weight: Tensor) -> Tensor:
        """(O, ...) → same shape, on the grid of each output channel."""
        scale = self.scale(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.quant_max, self.quant_max)

    def describe(self) -> dict[str, object]:
        """Type and granularity."""
        return {"type": f"int{self.bits}", "range": "weights", "granularity": "per output channel"}


def fake_quantize_symmetric(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Fake-quantize ``x`` per tensor on the signed grid of ``scale`` (scalar tensor), zero point 0."""
    scale = scale.detach().float().reshape(1)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Every observed quantization point of ``model`` with its module name, in definition order."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield name, module


def freeze_observers(model: nn.Module) -> None:
    """Fix every grid of ``model`` from here on."""
    for _, quantizer in activation_quantizers(model):
        quantizer.observing = False


@dataclass(frozen=True)
class Backend:
    """The quantizers of one library; another one stands beside ``torch_ao`` in :data:`BACKENDS`.

    Attributes:
        activation: class of observed points, called with bits, signed, observer and averaging constant.
        weight: class of weight quantizers, called with bits.
    """

    activation: type[ActivationQuantizer]
    weight: type[WeightQuantizer]

    def point(self, group: TrunkGroup | None, *, signed: bool) -> Quantizer:
        """An observed point as the recipe's ``group`` asks for, or one left in float."""
        if group is None:
            return Quantizer()
        return self.activation(group.activation_bits, signed, group.observer, group.averaging_constant)


#: By the recipe's ``quantization.backend``.
BACKENDS: Final = {"torch_ao": Backend(ActivationQuantizer, WeightQuantizer)}
