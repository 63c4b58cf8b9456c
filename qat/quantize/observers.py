"""The one adapter to ``torch.ao.quantization``: how the range of a tensor is found.

No other file imports ``torch.ao``. The quantizers are in :mod:`qat.quantize.activation_quantizers`. With
several processes each observer sees what all of them see, so that every process has the same ranges as one
alone.

``moving_average`` follows the extremes of each batch, ``minmax`` keeps the widest of all. The two that clip,
``histogram`` (least squared error) and ``percentile``, are slow and observe during calibration only.
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
#: Observers that go on while training.
MOVING: Final[tuple[Observer, ...]] = ("moving_average", "minmax")
#: Clipping points that the histogram's search compares.
_CANDIDATES: Final = 200


class _SharedExtremes:
    """Mixed into torch's observers of extremes: each process sees the extremes of all processes' images."""

    def forward(self, x_orig: Tensor) -> Tensor:
        seen = x_orig if world().size == 1 else extremes(x_orig)
        super().forward(seen)  # type: ignore[misc]  # of the observer it is mixed in with
        return x_orig


class _MovingAverageObserver(_SharedExtremes, MovingAverageMinMaxObserver):
    """torch's; follows the extremes of each batch."""


class _ExtremesObserver(_SharedExtremes, MinMaxObserver):
    """torch's; keeps the widest extremes of all batches."""


class _LeastSquaredErrorObserver(HistogramObserver):
    """torch's histogram with a search of its own: the range of least squared error.

    torch's search moves both ends independently, for a grid of any zero point. A symmetric grid spans the
    farther end on both sides, and at few bits its error is then several times the least one.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        if world().size == 1:
            result: Tensor = super().forward(x_orig)
            return result
        x = x_orig.detach().flatten()
        x = x[x.isfinite()]  # as torch does it, so that no range is infinite
        low, high = extremes(x)
        if low > high:  # nobody has any
            return x_orig
        known = bool(self.min_val <= self.max_val)
        before = self.min_val.clone(), self.max_val.clone()
        if known:
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        # Bins of one range: what the processes count can be added up.
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
    """The smallest magnitude that ``percentile`` percent of a batch's values don't exceed, mean over batches.

    The percentile is one of the values (nearest rank), so that of few values it is the largest.
    """

    def __init__(self, percentile: float, **options: Any) -> None:
        super().__init__(**options)
        self.percentile, self.batches = percentile, 0

    def forward(self, x_orig: Tensor) -> Tensor:
        values = x_orig.detach().float().abs().flatten()
        if count := round(total([values.numel()])[0]):
            # Counted from the top: few values, which a selection finds faster than a sort.
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
    """torch's fake quantizer with an observer, per tensor: holds ``scale``, ``zero_point`` and what was seen.

    Args:
        bits: 2 to 16; a signed grid is symmetric, an unsigned one starts at 0.
        signed: whether the values take both signs.
        observer: by name.
        averaging: weight of the newest batch (``moving_average``).
        percentile: in percent, above 0 and up to 100 (``percentile``).
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
    """Steps that span each output channel of ``weight`` (O, ...) by integers of ``±quant_max``: (O,) float32.

    A row of zeros gets a tiny positive one.
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
