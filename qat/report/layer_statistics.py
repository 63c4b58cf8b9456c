"""What quantization does to each layer of a prepared network, measured on images.

A prepared network has two ways to compute. In training, every quantization point is given float values and
rounds them. In evaluation, the network computes integers and calls no quantizer. The statistics need the
values before rounding, so the network is put on the first way while it is measured. Grids and batch
statistics stay fixed meanwhile, nothing is learned, and afterwards the network is unchanged.

A point's statistics count the values that the point itself is given. Values that only share its grid (the
result of a PReLU, BN2's offset) are not counted.
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
        name: module name; except for binary convolutions, it is a key of
            :func:`qat.quantize.preparation.quantization_map`.
        group: ``stem``, ``se``, ``classifier``, ``trunk`` or ``binary``.
        weights: whether the values are weights, not activations. ``False`` for a binary convolution: its
            ``low``, ``high``, ``count`` and ``positive`` describe its input.
        type: type of the integers, such as ``int8``, ``uint8`` or ``1 bit``.
        bits: bits of the integers.
        scale_min, scale_max: smallest and largest scale. They differ only for weights, which have a scale per
            output channel.
        low, high: smallest and largest value before rounding; for a binary convolution, of the values whose
            sign it takes.
        count: number of values, over all images.
        clipped: share of the values, 0 to 1, that round to an integer outside of the grid; ``None`` for a
            binary convolution.
        sqnr: signal-to-quantization-noise ratio ``10 · log10(Σ x² / Σ (x − Q(x))²)`` in dB; ``inf`` if Q
            changes nothing, ``nan`` if a value is not finite, ``None`` for a binary convolution.
        exact: share of the weights in use, 0 to 1, that are exactly ±1; binary convolutions only.
        flipped: share of the weights, 0 to 1, whose sign differs from that in the network that fine-tuning
            started from; binary convolutions only, ``None`` without that network.
        positive: share of the input's signs, 0 to 1, that are +1; binary convolutions only.
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
    """Measure every quantization point and binary convolution, in the order of the network's modules.

    Memory does not grow with the number of batches.

    Args:
        quantized: prepared and calibrated network. It is unchanged afterwards, even after an exception.
        images: batches of normalized images (N, 3, H, W).
        start: network that fine-tuning started from, or its state dict, of which only the weights of the
            binary convolutions are used.

    Raises:
        QuantizationError: a point is not calibrated, there are no images, or ``start`` has no weight of the
            same name and shape for a binary convolution.
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
            weights.close()  # remove the hooks of weights, which are the same in every batch
    if not all(sums.count for _, sums in points.values()):
        raise QuantizationError("no images to measure the layers on")
    return [_statistics(name, *point, flipped.get(name)) for name, point in points.items()]


@dataclass
class _Sums:
    """Sums over the values that one point was given so far.

    ``signal`` and ``noise`` are sums of squares. ``unrounded`` is the point's input while it computes.
    """

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
        """Extend the range to hold ``x``, and count its values."""
        low, high = (float(end) for end in x.aminmax())
        # Once NaN, the range stays NaN: `min` and `max` return their first argument if that is NaN.
        self.low, self.high = (nan, nan) if isnan(low) else (min(self.low, low), max(self.high, high))
        self.count += x.numel()

    def add(self, x: Tensor, q: Tensor, scale: Tensor, limits: tuple[int, int]) -> None:
        """Add values ``x`` with their rounded values ``q``.

        Args:
            x, q: tensors of one shape.
            scale: scale of the grid, broadcasts against ``x``.
            limits: smallest and largest integer of the grid, less the zero point.
        """
        self.extend(x)
        self.scale_min = min(self.scale_min, float(scale.min()))
        self.scale_max = max(self.scale_max, float(scale.max()))
        exact = x.double()
        steps = torch.round(exact / scale.double())
        self.clipped += int(((steps < limits[0]) | (steps > limits[1])).sum())
        self.signal += float(exact.square().sum())
        self.noise += float((exact - q.double()).square_().sum())


#: Number of values that are added to the sums at once. A whole batch in float64 takes more memory and time.
_CHUNK: Final = 2**18


def _keep_values(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Hook before a quantization point: copy its input, which the point may overwrite with its result."""
    sums.unrounded = inputs[0].clone()


def _see_values(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Hook after a quantization point: add its input and its result to the sums."""
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
    """Hook after a weight quantizer. One quantizer serves both layers of a channel attention, in turn."""
    assert isinstance(module, WeightQuantizer)
    (weight,) = inputs
    scale = module.scale(weight).view(-1, *[1] * (weight.ndim - 1))
    sums.add(weight, output, scale, (-module.quant_max, module.quant_max))


def _see_signs(sums: _Sums, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Hook before a sub-block: add the values whose sign it takes, its input plus the learned bias.

    They are computed here, since no module inside the sub-block has them as its input or result.
    """
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
    """Share of the weights whose sign differs from that in ``start``, by name of the binary convolution."""
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
    """Make ``model`` quantize float values as in training, without observing or updating, in the block."""
    modes = [(module, module.training) for module in model.modules()]
    # In training mode the mix scales are clamped in place: copy them, to restore them afterwards.
    kept = [
        (block.scale, block.scale.detach().clone())
        for block in model.modules()
        if isinstance(block, SubBlock) and block.infor_recoupling
    ]
    try:
        model.eval()
        for module in model.modules():
            if isinstance(module, _INTEGER_IN_EVALUATION):
                # Not train(), which would also set the quantizers and batch normalizations inside.
                module.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for scale, before in kept:
                scale.copy_(before)


#: Modules that compute integers in evaluation mode, and round float values in training mode.
_INTEGER_IN_EVALUATION: Final = (
    FakeQuantStem,
    FakeQuantSubBlock,
    FakeQuantPReLU,
    FakeQuantPool,
    FakeQuantLinear,
)
