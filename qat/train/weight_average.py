"""A moving average of a network's weights, which is evaluated and kept in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.quantize.quantizers import activation_quantizers
from qat.train.sharding import copy_of, own_part


class WeightAverage:
    """``a ← d · a + (1 − d) · w`` for every parameter after each step, with the network it makes.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` steps, so that the random start is soon forgotten.
    Latent weights are averaged, and the average is binarized: a weight's sign is that of its recent mean.
    Buffers are copied: temperatures, batch-norm statistics, quantization grids.

    Attributes:
        network: of averaged weights; without gradients. Of a network in parts, the same parts.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the weights of ``model`` as they are; ``decay`` lies between 0 and 1."""
        self.network = copy_of(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of ``model`` after step number ``step``, from 1, of all epochs."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = [own_part(value) for value in self.network.parameters()]
        weights: list[Tensor] = [own_part(value) for value in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Take over all of ``model`` that is no weight, among it how far its quantizers are."""
        for mine, its in zip(self.network.buffers(), model.buffers(), strict=True):
            # Observers change the shape of what they have seen when they see the first batch.
            if mine.shape != its.shape:
                mine.resize_(its.shape)
            mine.copy_(its)
        points = dict(activation_quantizers(model))
        for name, point in activation_quantizers(self.network):
            point.calibrated, point.observing = points[name].calibrated, points[name].observing
