"""Batch-norm re-estimation: statistics are averaged over training images after the weights are final.

The running statistics of a training are a moving average over its last steps, in which weights and grids
still changed. :mod:`qat.quantize.folding` says how statistics are folded into the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.quantize.activation_quantizers import activation_quantizers


def reestimate_batch_norm(model: nn.Module, forward: Callable[[], None]) -> None:
    """Replace all running statistics by their mean over the batches that ``forward`` runs through ``model``.

    While ``forward`` runs, each layer normalizes by the statistics of its batch, as in training. Weights,
    grids and the modes of all modules are the same afterwards. If ``forward`` raises an exception, the
    statistics are unchanged, too.

    Args:
        model: a network with a float rest, or a prepared and calibrated one.
        forward: runs some batches through ``model``.

    Raises:
        QuantizationError: a grid is not calibrated, no batch reached a batch normalization, or its statistics
            are not finite.
    """
    points = dict(activation_quantizers(model))
    if unknown := [name for name, point in points.items() if not point.has_grid]:
        raise QuantizationError(f"{unknown[0]}: not calibrated ({len(unknown)} points): calibrate first")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    modes = {module: module.training for module in model.modules()}
    observing = {name: point.observing for name, point in points.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    # In training mode, layers clamp latent weights and mix scales in place, so the values are restored below.
    before = [(parameter.data, parameter.detach().clone()) for parameter in model.parameters()]
    before += [(_batch_count(norm), _batch_count(norm).clone()) for norm in norms.values()]
    statistics = [(tensor, tensor.clone()) for norm in norms.values() for tensor in _statistics(norm)]
    succeeded = False
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
        succeeded = True
    finally:
        with torch.no_grad():
            for tensor, values in before if succeeded else before + statistics:
                tensor.copy_(values)
        for module, training in modes.items():
            module.training = training
        for name, point in points.items():
            point.observing = observing[name]
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _batch_count(norm: nn.BatchNorm2d) -> Tensor:
    return norm.get_buffer("num_batches_tracked")


def _statistics(norm: nn.BatchNorm2d) -> list[Tensor]:
    return [norm.get_buffer(name) for name in ("running_mean", "running_var")]


def _check(norm: nn.BatchNorm2d, name: str) -> None:
    """Raise ``QuantizationError`` if ``norm`` saw no batch, or if its statistics are not finite."""
    if not int(_batch_count(norm)):
        raise QuantizationError(f"{name}: no batch reached it: its statistics can't be averaged anew")
    for statistic in _statistics(norm):
        if not bool(statistic.isfinite().all()):
            raise QuantizationError(f"{name}: its statistics over these batches are not finite")
