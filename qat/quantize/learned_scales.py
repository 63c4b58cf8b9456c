"""The backend ``brevitas``: quantizers whose scales are parameters that are trained with the network.

Learned step size quantization (LSQ; Esser et al. 2020, arXiv 1902.08153). With step ``s`` and integers from
``Qn`` to ``Qp``, forward ``v = round(clamp(x / s, Qn, Qp)) · s``; gradients::

    ∂v/∂x = 1 inside of the range, 0 beyond
    ∂v/∂s = round(x / s) − x / s   inside,   Qn or Qp beyond
    ∂L/∂s is multiplied by 1 / √(N · Qp)

where N values share the step (for activations, the values of one image). brevitas' ``IntQuant`` supplies the
integers and the gradient through rounding; its value restrictions make steps positive or powers of two.

A step is ``start · 2**log_scale``. ``start`` is what the observers of :mod:`qat.quantize.observers` found in
calibration, or the range of the weights. ``log_scale`` is the parameter, 0 at first. So a step can't reach 0,
an optimizer changes it by a factor that does not depend on its size, and a network that has only been
calibrated has exactly the grids of the backend ``torch_ao``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from brevitas.core.function_wrapper import CeilSte, Identity
from brevitas.core.quant.int_base import IntQuant
from brevitas.core.restrict_val import LogFloatRestrictValue, PowerOfTwoRestrictValue
from torch import Tensor, nn

from qat.grid import Grid
from qat.ops.fake_quantize import Extremes
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.observers import channel_scales
from qat.quantize.weight_quantizers import WeightQuantizer


@cache
def _int_quant(signed: bool, narrow: bool) -> Any:
    """brevitas' rounding to integers. It has no state, so one instance is enough for all quantizers."""
    return IntQuant(narrow_range=narrow, signed=signed, input_view_impl=Identity())


@cache
def _restriction(power_of_two: bool) -> Any:
    """brevitas' map from the logarithm of a step to the step, which may round up to a power of two."""
    return PowerOfTwoRestrictValue(CeilSte()) if power_of_two else LogFloatRestrictValue()


def learned_step(start: Tensor, log_scale: Tensor, power_of_two: bool) -> Tensor:
    """The step ``start · 2**log_scale``, or the smallest power of two that is at least as large.

    The gradient with respect to ``log_scale`` passes the rounding up as if it weren't there. The step is
    computed in float64 and rounded once, so that processor and accelerator have the same one.

    Args:
        start: positive, float32.
        log_scale: same shape.
        power_of_two: whether to round up to a power of two.

    Returns:
        float32, same shape.
    """
    exponent = log_scale.double()
    if power_of_two:
        # Less 2^-30, so that a rounding error of the logarithm can't double a step that is a power of two.
        step: Tensor = _restriction(True)(exponent + start.double().log2() - 2.0**-30)
    else:
        step = _restriction(False)(exponent) * start.double()
    return step.to(start.dtype)


def quantize(
    x: Tensor, step: Tensor, bits: int, *, signed: bool, narrow: bool = False, shared: int = 1
) -> Tensor:
    """``x`` rounded to the grid of ``step``, with the gradients that the module's docstring gives.

    Args:
        x: any shape.
        step: float32, broadcasts against ``x``.
        bits: bits of the integers.
        signed: whether the integers can be negative.
        narrow: whether the smallest integer is minus the largest one.
        shared: N, the number of values of one example that share a step.
    """
    high = 2 ** (bits - signed) - 1
    low = -high - (not narrow) if signed else 0
    if step.requires_grad:
        factor = 1.0 / math.sqrt(max(shared, 1) * high)
        step.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    exact = x if x.dtype == torch.float64 else x.float()
    # Multiplied by the inverse, as torch's fake quantization does, so that both round ties alike. Clamped
    # before rounding as well. This changes no result, but values less than half a step beyond the range,
    # which round into it, get the gradients of values outside.
    steps = (exact * step.reciprocal()).clamp(low, high)
    unit, zero, width = torch.ones_like(step), torch.zeros_like(step), step.new_full((), bits)
    integers: Tensor = _int_quant(signed, narrow)(unit.detach(), zero.detach(), width.detach(), steps)
    return (integers.to(step.dtype) * step).to(x.dtype)


class LearnedActivationQuantizer(ActivationQuantizer):
    """Fake quantization of an activation with one learned scale per tensor.

    Calibration finds the first scale as it does for
    :class:`qat.quantize.activation_quantizers.ActivationQuantizer`, which has the same arguments. From then
    on the scale is trained until it is frozen, and nothing is observed. ``clip`` bounds the first scale
    alone.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Make a quantizer that is not calibrated yet, and observes."""
        super().__init__(*args, **options)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def _step(self) -> Tensor:
        return learned_step(self.fake.scale, self.log_scale, self.power_of_two)

    @property
    def scale(self) -> Tensor:
        """Scale of the grid, (1,) float32, without a gradient."""
        return self._step().detach()

    def _on_grid(self, x: Tensor, extremes: Extremes | None, overwrite: bool) -> Tensor:
        shared = x.numel() // max(len(x), 1) if x.ndim else 1
        return quantize(x, self._step(), self.bits, signed=self.signed, shared=shared)

    def fixed_grid(self) -> Grid | None:
        """None: the grid is not fixed, since the scale is learned."""
        return None

    @property
    def observes(self) -> bool:
        """Whether values are observed: only until the quantizer is calibrated."""
        return super().observes and (self.calibrating or not self.calibrated)

    def _update_grid(self) -> None:
        super()._update_grid()
        with torch.no_grad():
            self.log_scale.zero_()

    def freeze(self) -> None:
        """Stop training the scale."""
        super().freeze()
        self.log_scale.requires_grad_(False)
        self.log_scale.grad = None

    def describe(self) -> dict[str, object]:
        """Entries for the quantization map: type, scale, and that the scale is learned."""
        return {**super().describe(), "range": "learned"}


class LearnedWeightQuantizer(WeightQuantizer):
    """Symmetric fake quantization of weights with one learned scale per output channel.

    Until training begins, each channel's range is that of its weights. The first training step stores it as
    the start of the scale, which is trained from then on until it is frozen.

    Args:
        bits: 2 to 8; integers lie in ``±(2**(bits - 1) - 1)``.
        power_of_two: whether to round each scale up to a power of two.
        rows: number of output channels of each layer that shares the quantizer. A layer is recognized by this
            number, so layers of the same number would share their scales.
    """

    def __init__(self, bits: int = 8, power_of_two: bool = False, rows: Sequence[int] = ()) -> None:
        """Make a quantizer whose ranges are those of the weights until training begins."""
        super().__init__(bits, power_of_two, rows)
        self.log_scale = nn.ParameterDict({str(count): nn.Parameter(torch.zeros(count)) for count in rows})
        for count in sorted(set(rows)):
            # Largest magnitude of each channel, -1 before training. Stored is the range and not the step, so
            # that it stays right if the state is loaded at another number of bits.
            self.register_buffer(f"range_{count}", torch.full((count,), -1.0))
        self._started: set[int] = set()

    def _step(self, weight: Tensor) -> Tensor:
        count = len(weight)
        found: Tensor = self.get_buffer(f"range_{count}")
        if count not in self._started:
            found = weight.detach().float().reshape(count, -1).abs().amax(1)
            if self.training and torch.is_grad_enabled():
                self.get_buffer(f"range_{count}").copy_(found)
                self._started.add(count)
        start = channel_scales(found.view(-1, 1), self.quant_max)
        return learned_step(start, self.log_scale[str(count)], self.power_of_two)

    def scale(self, weight: Tensor) -> Tensor:
        """Scale of each output channel of ``weight`` (O, ...): (O,) float32, without a gradient."""
        return self._step(weight).detach()

    def forward(self, weight: Tensor) -> Tensor:
        """Weights (O, ...) → the same, rounded to the grid of each output channel."""
        step = self._step(weight).view(-1, *[1] * (weight.ndim - 1))
        shared = weight[0].numel()
        return quantize(weight, step, self.bits, signed=True, narrow=True, shared=shared)

    def freeze(self) -> None:
        """Stop training the scales."""
        for parameter in self.log_scale.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def describe(self) -> dict[str, object]:
        """Entries for the quantization map: type, granularity, and that the scales are learned."""
        return {**super().describe(), "range": "learned"}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in self.named_buffers():
            if f"{prefix}{name}" in state_dict:
                started = self._started.add if bool((value >= 0).all()) else self._started.discard
                started(int(name.removeprefix("range_")))
