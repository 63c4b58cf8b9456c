"""The network that is evaluated and kept: an exponential moving average of the weights, or the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.train.sharding import copy_of, own_part


class WeightAverage(Protocol):
    """Makes a network of the weights that another has while it trains.

    Attributes:
        network: what is evaluated and kept. Of a network in parts, the same parts.
    """

    network: BNext

    def update(self, model: BNext, step: int) -> None:
        """Take in the weights of ``model`` after step number ``step``, counted from 1 over all epochs."""

    def follow(self, model: BNext) -> None:
        """Copy all of ``model`` that is no parameter: buffers, and the state of its quantizers."""

    def weights(self) -> dict[str, Tensor]:
        """What a saved state has to hold beside the network that trains, by parameter name."""

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state: ``state`` has the tensors of ``model``, overlaid by :meth:`weights`."""


class ExponentialMovingAverage:
    """``a ← d · a + (1 − d) · w`` for every parameter after each step.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` steps, so that the random start is soon forgotten.
    Latent weights are averaged and the average is binarized: a weight's sign is that of its recent mean.
    Buffers are copied: temperatures, batch-norm statistics, quantization grids. See :class:`WeightAverage`.

    Attributes:
        network: holds the averages; its parameters need no gradient.
    """

    def __init__(self, model: BNext, decay: float) -> None:
        """Start from the weights of ``model`` as they are; ``decay`` lies between 0 and 1."""
        self.network = copy_of(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: BNext, step: int) -> None:
        """Average the weights of ``model`` into ``network``, and copy the rest."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = [own_part(value) for value in self.network.parameters()]
        weights: list[Tensor] = [own_part(value) for value in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: BNext) -> None:
        """Copy the buffers of ``model``, and which of its quantizers are calibrated and observe."""
        for mine, its in zip(self.network.buffers(), model.buffers(), strict=True):
            # An observer's buffers get their shape from the first batch that it sees.
            if mine.shape != its.shape:
                mine.resize_(its.shape)
            mine.copy_(its)
        points = dict(activation_quantizers(model))
        for name, point in activation_quantizers(self.network):
            point.calibrated, point.observing = points[name].calibrated, points[name].observing

    def weights(self) -> dict[str, Tensor]:
        """The averages; buffers are those of the network that trains."""
        return dict(self.network.named_parameters())

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Load ``state`` into ``network``.

        Raises:
            RuntimeError: it is of another network.
        """
        self.network.load_state_dict(state, strict=True)
        self.follow(model)


class LatestWeights:
    """No average: the network that trains is evaluated and kept itself. See :class:`WeightAverage`."""

    def __init__(self, model: BNext) -> None:
        self.network = model

    def update(self, model: BNext, step: int) -> None:
        """Nothing to do."""

    def follow(self, model: BNext) -> None:
        """Nothing to do."""

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""


def average_of(model: BNext, decay: float | None) -> WeightAverage:
    """The average that a recipe's ``schedule.ema`` asks for; ``None`` asks for none."""
    return LatestWeights(model) if decay is None else ExponentialMovingAverage(model, decay)
