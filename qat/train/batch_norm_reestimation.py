"""Batch-normalization statistics, averaged anew over training images once the weights are final.

Running statistics follow the training by a moving average, so that they are those of weights a little older,
seen through other grids. :mod:`qat.quantize.folding` says what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.quantize.quantizers import activation_quantizers


def reestimate_batch_norm(model: nn.Module, forward: Callable[[], None]) -> None:
    """Replace all running statistics by their plain average over the batches that ``forward`` shows.

    As in training, each layer sees what the ones before it make of the batch's own statistics. Weights and
    grids stay as they are, and so does the model's mode. Where ``forward`` fails, statistics stay, too.

    Args:
        model: float-rest or prepared; of the latter every grid must be known.
        forward: runs some batches through ``model``, without gradients.

    Raises:
        QuantizationError: a grid is not known yet, or a normalization saw nothing, or values that are not
            finite.
    """
    points = dict(activation_quantizers(model))
    if unknown := [name for name, point in points.items() if not point.has_grid]:
        raise QuantizationError(f"{unknown[0]}: not calibrated ({len(unknown)} points): calibrate first")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    modes = {module: module.training for module in model.modules()}
    observing = {name: point.observing for name, point in points.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    # Training mode clamps latent weights and mix scales in place.
    before = [(parameter.data, parameter.detach().clone()) for parameter in model.parameters()]
    before += [(_count(norm), _count(norm).clone()) for norm in norms.values()]
    statistics = [(tensor, tensor.clone()) for norm in norms.values() for tensor in _statistics(norm)]
    fine = False
    try:
        model.train()
        for point in points.values():
            point.observing = False
        for norm in norms.values():
            norm.momentum = None
            norm.reset_running_stats()
        with torch.no_grad():
            forward()
        for name, norm in norms.items():
            _check(norm, name)
        fine = True
    finally:
        with torch.no_grad():
            for tensor, values in before if fine else before + statistics:
                tensor.copy_(values)
        for module, training in modes.items():
            module.training = training
        for name, point in points.items():
            point.observing = observing[name]
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _count(norm: nn.BatchNorm2d) -> Tensor:
    return cast(Tensor, norm.num_batches_tracked)


def _statistics(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)]


def _check(norm: nn.BatchNorm2d, name: str) -> None:
    if not int(_count(norm)):
        raise QuantizationError(f"{name}: no batch reached it: its statistics can't be averaged anew")
    for statistic in _statistics(norm):
        if not bool(statistic.isfinite().all()):
            raise QuantizationError(f"{name}: its statistics over these batches are not finite")
