"""The network that is evaluated and kept: with averaged weights (EMA), or the trained network itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.train.sharding import copy_of, local_part


class WeightAverage(Protocol):
    """Averages the weights of a network while it trains.

    Attributes:
        network: the network with averaged weights, which is evaluated and kept. If the trained network is
            sharded, it is sharded alike.
    """

    network: BNext

    def update(self, model: BNext, step: int) -> None:
        """Include the weights of ``model`` after step number ``step``, counted from 1 over all epochs."""

    def follow(self, model: BNext) -> None:
        """Copy everything of ``model`` but its parameters: buffers, and the state of its quantizers."""

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, which a saved state must hold; empty without averaging."""

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Restore the average from a saved state.

        Args:
            model: the network that is trained, restored already.
            state: the tensors of ``model``, in which those of :meth:`weights` replace the ones of the same
                name.
        """


class ExponentialMovingAverage:
    """An exponential moving average of the weights: ``a ← d · a + (1 − d) · w`` for each parameter and step.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` steps, so that the first weights are soon forgotten.
    Latent weights are averaged before they are binarized, so that the sign of a weight is that of its
    average. Buffers are copied: temperatures, batch-norm statistics, quantization grids.

    It has the interface of :class:`WeightAverage`.

    Attributes:
        network: the network with the averages. Its parameters need no gradient.
    """

    def __init__(self, model: BNext, decay: float) -> None:
        """Start from the present weights of ``model``. ``decay`` lies between 0 and 1."""
        self.network = copy_of(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: BNext, step: int) -> None:
        """Average the weights of ``model`` into ``network``, and copy the rest."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = [local_part(value) for value in self.network.parameters()]
        weights: list[Tensor] = [local_part(value) for value in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: BNext) -> None:
        """Copy the buffers of ``model``, and whether each of its quantizers is calibrated and observes."""
        for mine, its in zip(self.network.buffers(), model.buffers(), strict=True):
            # An observer's buffers get their shape from the first batch that it sees.
            if mine.shape != its.shape:
                mine.resize_(its.shape)
            mine.copy_(its)
        points = dict(activation_quantizers(model))
        for name, point in activation_quantizers(self.network):
            point.calibrated, point.observing = points[name].calibrated, points[name].observing

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name. Buffers are those of the trained network."""
        return dict(self.network.named_parameters())

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Load ``state`` into ``network``.

        Raises:
            RuntimeError: ``state`` belongs to another network.
        """
        self.network.load_state_dict(state, strict=True)
        self.follow(model)


class LatestWeights:
    """No average: the trained network itself is kept. It has the interface of :class:`WeightAverage`."""

    def __init__(self, model: BNext) -> None:
        self.network = model

    def update(self, model: BNext, step: int) -> None:
        """Nothing to do."""

    def follow(self, model: BNext) -> None:
        """Nothing to do."""

    def weights(self) -> dict[str, Tensor]:
        """Nothing, since the saved state has the weights of the trained network."""
        return {}

    def load(self, model: BNext, state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""


def make_average(model: BNext, decay: float | None) -> WeightAverage:
    """The average for a recipe's ``schedule.ema``, which is ``decay``; ``None`` means no averaging."""
    return LatestWeights(model) if decay is None else ExponentialMovingAverage(model, decay)
