"""What quantization does to each layer of a prepared network, measured on images.

Measured on the float-valued path, the one that fine-tuning takes: every quantization point is given float
values there and rounds them. In evaluation mode a prepared network computes integers itself and calls no
quantizer, so it is put on the other path meanwhile: grids and batch statistics stay fixed, nothing is
learned, and network, modes and hooks are afterwards what they were.

Values that are put on a grid chosen elsewhere (the result of a PReLU, BN2's offset) are not counted, only
those that reach the point itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, isnan, log10, nan
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import BNext, binary_convolutions
from qat.nn.layers import BinaryConv2d
from qat.nn.sub_block import SubBlock
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer, activation_quantizers
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.stem_and_head import FakeQuantLinear, FakeQuantPool, FakeQuantPReLU, FakeQuantStem
from qat.quantize.sub_block import FakeQuantSubBlock
from qat.quantize.weight_quantizers import WeightQuantizer

Group = Literal["stem", "se", "classifier", "trunk", "binary"]


@dataclass(frozen=True)
class LayerStatistics:
    """One quantization point, weight quantizer or binary convolution.

    Attributes:
        name: module name; for all but binary convolutions the key of
            :func:`qat.quantize.preparation.quantization_map`.
        group: ``stem``, ``se``, ``classifier``, ``trunk`` or ``binary``.
        weights: whether it quantizes weights (which no image changes) rather than activations; ``False`` for
            a binary convolution, whose range and signs are those of its input.
        type: such as ``int8``, ``uint8``, ``1 bit``.
        bits: width of the integers.
        scale_min, scale_max: step of the grid; they differ for weights, which have one per output channel.
        low, high: smallest and largest value that reached the point; for a binary convolution, the values
            whose sign it takes.
        count: how many values, over all images.
        clipped: share of values, 0 to 1, beyond the outermost integers even after rounding; ``None`` for a
            binary convolution.
        sqnr: ``10 · log10(Σ x² / Σ (x − Q(x))²)`` in dB, ``inf`` where Q changes nothing, ``nan`` where a
            value is not finite; ``None`` for a binary convolution.
        exact: share of the weights in use that are exactly ±1. Binary convolutions only, as the next two.
        flipped: share of sign bits that differ from the network that fine-tuning started from; ``None``
            without one.
        positive: share of input signs that are +1.
    """

    name: str
    group: Group
    weights: bool
    type: str
    bits: int
    scale_min: float
    scale_max: float
    low: float
    high: float
    count: int
    clipped: float | None = None
    sqnr: float | None = None
    exact: float | None = None
    flipped: float | None = None
    positive: float | None = None


def measure(
    quantized: BNext, images: Iterable[Tensor], start: BNext | Mapping[str, Tensor] | None = None
) -> list[LayerStatistics]:
    """Statistics of every quantization point and binary convolution, in definition order.

    Memory does not grow with the number of batches.

    Args:
        quantized: prepared and calibrated; where the recipe left a group in float, its points don't exist.
            Unchanged afterwards, even if an exception passes.
        images: batches of normalized images (N, 3, H, W).
        start: network that fine-tuning started from, or its state dict (float or prepared; other keys than
            the binary convolutions' weights are ignored).

    Raises:
        QuantizationError: a point is not calibrated, there are no images, or ``start`` lacks a binary
            convolution of this shape.
    """
    _check_calibrated(quantized)
    flipped = {} if start is None else _flipped_shares(quantized, start)
    points: dict[str, tuple[nn.Module, _Sums]] = {}
    device = quantized.fc.weight.device
    with _float_path(quantized), ExitStack() as activations, ExitStack() as weights, torch.no_grad():
        for name, module in quantized.named_modules():
            sums, hooks = _Sums(), activations
            if isinstance(module, SubBlock):
                points[f"{name}.binary_conv"] = module.binary_conv, sums
                handle = module.register_forward_pre_hook(partial(_see_signs, sums))
            elif isinstance(module, WeightQuantizer):
                points[name], hooks = (module, sums), weights
                handle = module.register_forward_hook(partial(_see_weights, sums))
            elif isinstance(module, Quantizer) and module.enabled:
                points[name] = module, sums
                hooks.callback(module.register_forward_pre_hook(partial(_keep_values, sums)).remove)
                handle = module.register_forward_hook(partial(_see_values, sums))
            else:
                continue
            hooks.callback(handle.remove)
        for batch in images:
            quantized(batch.to(device))
            weights.close()  # they are the same in every batch
    if not all(sums.count for _, sums in points.values()):
        raise QuantizationError("no images to measure the layers on")
    return [_statistics(name, *point, flipped.get(name)) for name, point in points.items()]


@dataclass
class _Sums:
    """What one point has seen so far. Signal and noise are sums of squares; ``unrounded`` is under way."""

    low: float = inf
    high: float = -inf
    count: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    positive: int = 0
    scale_min: float = inf
    scale_max: float = -inf
    unrounded: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        """Widen the range to ``x`` and count its values."""
        low, high = (float(end) for end in x.aminmax())
        # What is not a number stays: `min` and `max` keep their first argument where nothing compares.
        self.low, self.high = (nan, nan) if isnan(low) else (min(self.low, low), max(self.high, high))
        self.count += x.numel()

    def add(self, x: Tensor, q: Tensor, scale: Tensor, limits: tuple[int, int]) -> None:
        """Values and what became of them, the grid's step and its outermost integers less the zero point."""
        self.extend(x)
        self.scale_min = min(self.scale_min, float(scale.min()))
        self.scale_max = max(self.scale_max, float(scale.max()))
        exact = x.double()
        steps = torch.round(exact / scale.double())
        self.clipped += int(((steps < limits[0]) | (steps > limits[1])).sum())
        self.signal += float(exact.square().sum())
        self.noise += float((exact - q.double()).square_().sum())


#: Values that are looked at together. A whole batch in float64 would be large, and slower too.
_CHUNK: Final = 2**18


def _keep_values(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Hook before a quantization point, whose result may take the memory of its input."""
    sums.unrounded = inputs[0].clone()


def _see_values(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of a quantization point."""
    assert isinstance(module, ActivationQuantizer | FixedQuantizer)
    zero = int(module.zero_point) if isinstance(module, FixedQuantizer) else 0
    limits = (module.quant_min - zero, module.quant_max - zero)
    assert sums.unrounded is not None
    before, after = sums.unrounded.flatten(), output.flatten()
    for start in range(0, len(before), _CHUNK):
        x, q = before[start : start + _CHUNK], after[start : start + _CHUNK]
        sums.add(x, q, module.scale, limits)
    sums.unrounded = None


def _see_weights(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of a weight quantizer; that of a channel attention is called for both layers."""
    assert isinstance(module, WeightQuantizer)
    (weight,) = inputs
    scale = module.scale(weight).view(-1, *[1] * (weight.ndim - 1))
    sums.add(weight, output, scale, (-module.quant_max, module.quant_max))


def _see_signs(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Hook before a sub-block: what its sign is taken of is no module's result where steps are fused."""
    assert isinstance(module, SubBlock)
    moved = module.move(inputs[0])
    sums.extend(moved)
    sums.positive += int((module.binary_activation(moved) > 0).sum())


def _statistics(name: str, module: nn.Module, sums: _Sums, flipped: float | None) -> LayerStatistics:
    if isinstance(module, BinaryConv2d):
        return LayerStatistics(
            name=name,
            group="binary",
            weights=False,
            type="1 bit",
            bits=1,
            scale_min=1.0,
            scale_max=1.0,
            low=sums.low,
            high=sums.high,
            count=sums.count,
            exact=float((module.effective_weight().detach().abs() == 1).double().mean()),
            flipped=flipped,
            positive=sums.positive / sums.count,
        )
    assert isinstance(module, ActivationQuantizer | FixedQuantizer | WeightQuantizer)
    return LayerStatistics(
        name=name,
        group=_group(name),
        weights=isinstance(module, WeightQuantizer),
        type=str(module.describe()["type"]),
        bits=module.bits,
        scale_min=sums.scale_min,
        scale_max=sums.scale_max,
        low=sums.low,
        high=sums.high,
        count=sums.count,
        clipped=sums.clipped / sums.count,
        sqnr=_decibels(sums.signal, sums.noise),
    )


def _decibels(signal: float, noise: float) -> float:
    if not isfinite(signal) or not isfinite(noise):
        return nan
    return 10 * log10(signal / noise) if noise else inf


def _group(name: str) -> Group:
    if ".se." in name:
        return "se"
    if name.startswith("fc."):
        return "classifier"
    return "stem" if name in ("feature.0.image", "feature.0.weight_quantizer") else "trunk"


def _check_calibrated(model: nn.Module) -> None:
    missing = [name for name, point in activation_quantizers(model) if not point.has_grid]
    if missing:
        raise QuantizationError(f"{missing[0]}: not calibrated ({len(missing)} points): calibrate first")


def _flipped_shares(model: BNext, start: BNext | Mapping[str, Tensor]) -> dict[str, float]:
    """Share of sign bits that differ from ``start``, by name of the binary convolution."""
    state: Mapping[str, Tensor] = start.state_dict() if isinstance(start, BNext) else start
    shares = {}
    for name, conv in binary_convolutions(model).items():
        key, weight = f"{name}.weight", conv.weight.detach()
        if key not in state:
            raise QuantizationError(f"{key}: missing in the network to compare signs with")
        if state[key].shape != weight.shape:
            raise QuantizationError(
                f"{key}: shape {list(state[key].shape)} in the network to compare signs with, "
                f"{list(weight.shape)} in this one"
            )
        different = (weight >= 0) != (state[key].to(weight.device) >= 0)
        shares[name] = float(different.double().mean())
    return shares


@contextmanager
def _float_path(model: BNext) -> Iterator[None]:
    """Meanwhile ``model`` quantizes float values as in training, and neither observes nor updates."""
    modes = [(module, module.training) for module in model.modules()]
    # Training mode clamps the mix scales in place.
    kept = [
        (block.scale, block.scale.detach().clone())
        for block in model.modules()
        if isinstance(block, SubBlock) and block.infor_recoupling
    ]
    try:
        model.eval()
        for module in model.modules():
            if isinstance(module, _TWINS):
                module.training = True  # of itself alone: quantizers and batch norms inside keep evaluating
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for scale, before in kept:
                scale.copy_(before)


#: Modules that choose between float values and integers by their mode.
_TWINS: Final = (FakeQuantStem, FakeQuantSubBlock, FakeQuantPReLU, FakeQuantPool, FakeQuantLinear)
