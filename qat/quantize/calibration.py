"""Calibration: find the range of every activation from the values of some batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qat.errors import QuantizationError
from qat.quantize.quantizers import activation_quantizers


def calibrate(model: nn.Module, forward: Callable[[], None]) -> None:
    """Find the range of every quantization point of ``model`` from float values.

    While ``forward`` runs, the points observe values and don't round them. The network is in evaluation mode
    meanwhile, and back in its former mode afterwards.

    Args:
        model: prepared network.
        forward: computes ``model`` on some batches.

    Raises:
        QuantizationError: the network has no quantization point, its grids are frozen, or ``forward`` did not
            reach all points.
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
    try:
        with torch.no_grad():
            forward()
    finally:
        for point in points.values():
            point.finish_calibration()
        model.train(was_training)
    missed = [name for name, point in points.items() if not point.calibrated]
    if missed:
        raise QuantizationError(f"calibration reached no finite value at {missed[0]} ({len(missed)} points)")
