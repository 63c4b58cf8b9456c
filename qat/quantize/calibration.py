"""Calibration finds the range of every activation from the values of some batches; freezing fixes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.quantize.activation_quantizers import ActivationQuantizer, activation_quantizers
from qat.quantize.weight_quantizers import WeightQuantizer


def calibrate(model: nn.Module, forward: Callable[[], None]) -> None:
    """Find the range of every quantization point from the float values that it gets while ``forward`` runs.

    Meanwhile values are observed and not quantized, and the network is in evaluation mode. Afterwards it is
    in its former mode.

    Args:
        model: a prepared network.
        forward: runs some batches through ``model``.

    Raises:
        QuantizationError: nothing to calibrate, grids frozen already, ``forward`` reached not all points, or
            some activations are not finite.
    """
    points = dict(activation_quantizers(model))
    if not points:
        raise QuantizationError("no activation is quantized in this network: nothing to calibrate")
    if not all(point.observing for point in points.values()):
        raise QuantizationError("the grids of this network are frozen: prepare its float-rest network anew")
    was_training = model.training
    model.eval()
    for point in points.values():
        point.start_calibration()
    checks = [
        point.register_forward_pre_hook(_finite(name), with_kwargs=True) for name, point in points.items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for check in checks:
            check.remove()
        for point in points.values():
            point.finish_calibration()
        model.train(was_training)
    missed = [name for name, point in points.items() if not point.calibrated]
    if missed:
        raise QuantizationError(f"calibration reached no finite value at {missed[0]} ({len(missed)} points)")


def _finite(name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    """A hook that refuses activations that are not finite, from which no range can be found."""

    def check(_: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        # What is quantized, and what is observed in its stead where that is given.
        seen = (value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
        if not all(bool(torch.isfinite(value).all()) for value in seen):
            raise QuantizationError(
                f"{name}: the activations there are not finite, so they have no range; look at the weights "
                "before it (qat inspect --layers) and at data.mean and data.std"
            )

    return check


def freeze_observers(model: nn.Module) -> None:
    """Fix every grid of ``model`` from here on, whether its range is observed or its scale learned."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.freeze()
