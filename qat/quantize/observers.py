"""Observers, which find the range of a tensor: the one adapter to ``torch.ao.quantization``.

No other file imports ``torch.ao``. The quantizers are in :mod:`qat.quantize.activation_quantizers`. With
several processes each observer sees what all of them see, so that every process has the same ranges as one
alone.

The observer ``moving_average`` averages the extremes of batches, ``minmax`` takes the extremes of all values.
``histogram`` (least squared error) and ``percentile`` clip outliers; they are slow, and observe during
calibration only.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

from qat.system.collectives import extremes, rows_of_all, summed, total, world

Observer = Literal["moving_average", "minmax", "histogram", "percentile"]
OBSERVERS: Final[tuple[Observer, ...]] = get_args(Observer)
#: Observers that also observe during training, not only during calibration.
MOVING: Final[tuple[Observer, ...]] = ("moving_average", "minmax")
#: Number of ranges that the search for the least squared error compares.
_CANDIDATES: Final = 200


class _SharedExtremes:
    """Mixin for torch's observers of extremes: observe the extremes of the values of all processes."""

    def forward(self, x_orig: Tensor) -> Tensor:
        seen = x_orig if world().size == 1 else extremes(x_orig)
        super().forward(seen)  # type: ignore[misc]  # of the observer it is mixed in with
        return x_orig


class _MovingAverageObserver(_SharedExtremes, MovingAverageMinMaxObserver):
    """Moving average of the extremes of each batch."""


class _ExtremesObserver(_SharedExtremes, MinMaxObserver):
    """Extremes of the values of all batches."""


class _LeastSquaredErrorObserver(HistogramObserver):
    """torch's histogram of values, with another search for the range: the one of least squared error.

    torch's own search moves both ends of the range independently, as for a grid with any zero point. But a
    symmetric grid has to reach as far on both sides as the farther end. At few bits, the error of the range
    that torch finds is several times the smallest one.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        if world().size == 1:
            result: Tensor = super().forward(x_orig)
            return result
        x = x_orig.detach().flatten()
        x = x[x.isfinite()]  # as torch does, so that no range is infinite
        low, high = extremes(x)
        if low > high:  # no process has a finite value
            return x_orig
        known = bool(self.min_val <= self.max_val)
        before = self.min_val.clone(), self.max_val.clone()
        if known:
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        # All processes have the same bins, so that their counts can be added.
        counts = summed(torch.histc(x, self.bins, min=float(low), max=float(high)))
        if known:
            counts = self._combine_histograms(self.histogram, *before, counts, low, high)
        for kept, new in ((self.histogram, counts), (self.min_val, low), (self.max_val, high)):
            kept.detach_().resize_(new.shape).copy_(new)
        return x_orig

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


class _PercentileObserver(MinMaxObserver):
    """Percentile of the magnitudes in a batch, averaged over the batches.

    It is the smallest magnitude in the batch that ``percentile`` percent of all magnitudes don't exceed
    (nearest rank, without interpolation). So in a small batch it is the largest magnitude.
    """

    def __init__(self, percentile: float, **options: Any) -> None:
        super().__init__(**options)
        self.percentile, self.batches = percentile, 0

    def forward(self, x_orig: Tensor) -> Tensor:
        values = x_orig.detach().float().abs().flatten()
        if count := round(total([values.numel()])[0]):
            # Few values lie above the percentile: selecting these is faster than sorting all.
            above = count - math.ceil(count * (self.percentile / 100))
            highest = values.topk(min(above + 1, values.numel()), sorted=False).values
            if world().size > 1:
                highest = rows_of_all(highest.cpu()).to(values.device)
                highest = highest.topk(above + 1, sorted=False).values
            clip = highest.min() if bool(highest.isfinite().all()) else highest.max()
            self.batches += 1
            mean = clip if self.batches == 1 else self.max_val + (clip - self.max_val) / self.batches
            self.max_val.resize_(()).copy_(mean)
            self.min_val.resize_(()).copy_(-mean if self.quant_min else torch.zeros_like(mean))
        return x_orig


_CLASSES: Final[dict[Observer, Any]] = {
    "moving_average": _MovingAverageObserver,
    "minmax": _ExtremesObserver,
    "histogram": _LeastSquaredErrorObserver,
    "percentile": _PercentileObserver,
}


def observed_grid(
    bits: int, signed: bool, observer: Observer, *, averaging: float, percentile: float
) -> nn.Module:
    """torch's per-tensor fake quantizer with an observer; it holds ``scale``, ``zero_point`` and the range.

    Args:
        bits: 2 to 16.
        signed: whether the grid is signed and symmetric; an unsigned one starts at 0.
        observer: name of the observer.
        averaging: weight of the newest batch in ``moving_average``; other observers ignore it.
        percentile: percent, above 0 and up to 100, for ``percentile``; other observers ignore it.
    """
    options: dict[Observer, dict[str, float]] = {
        "moving_average": {"averaging_constant": averaging},
        "percentile": {"percentile": percentile},
    }
    narrow = torch.qint8 if signed else torch.quint8
    grid: nn.Module = FakeQuantize(  # type: ignore[no-untyped-call]  # torch leaves it without types
        observer=_CLASSES[observer],
        quant_min=-(2 ** (bits - 1)) if signed else 0,
        quant_max=2 ** (bits - 1) - 1 if signed else 2**bits - 1,
        dtype=narrow if bits <= 8 else torch.qint32,
        qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
        **options.get(observer, {}),
    )
    return grid


def channel_scales(weight: Tensor, quant_max: int) -> Tensor:
    """Scales of the output channels of ``weight`` (O, ...): ``max|w| / quant_max``, (O,) float32.

    The scale of a channel of zeros is a tiny positive number.
    """
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-quant_max,
        quant_max=quant_max,
    ).to(weight.device)
    observer(weight.detach().float())
    scale: Tensor = observer.calculate_qparams()[0]
    return scale
