"""What a saved state holds of a training: taken from its parts, and put back into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qat.errors import CheckpointError
from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.recipe.schema import Recipe
from qat.system.collectives import is_main, world
from qat.train.sharding import part_like, shards, whole
from qat.train.state_file import Record, State
from qat.train.weight_average import WeightAverage


@dataclass(frozen=True)
class Parts:
    """What a state is taken of and put back into."""

    model: BNext
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    average: WeightAverage
    scaler: torch.amp.GradScaler

    @cached_property
    def names(self) -> list[str]:
        """Name of each parameter by the optimizer's index."""
        known = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [known[id(parameter)] for group in groups for parameter in group["params"]]


def first_record(recipe: Recipe, provenance: Mapping[str, str], device: torch.device) -> Record:
    """The record of a run that has done no step yet, computed as this process computes.

    Args:
        recipe: as checkpoints repeat it.
        provenance: see :func:`qat.train.provenance.provenance_of`.
        device: where the network lies.
    """
    return Record(
        recipe=recipe.model_dump(mode="json"),
        facts=dict(provenance),
        threads=torch.get_num_threads(),
        processes=world().size,
        sharded=shards(recipe),
        device=device.type,
    )


def capture(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors that training depends on, on the CPU, and the fields of a record about the rest.

    The tensors have to be written before training goes on, since they may be those in use rather than copies.
    A network in parts is gathered: all processes call this, and the first one alone is given the tensors.
    """
    tensors = {f"model/{key}": value for key, value in parts.model.state_dict().items()}
    saved = parts.optimizer.state_dict()
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{parts.names[index]}"] = value
    tensors |= {f"average/{key}": value for key, value in parts.average.weights().items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if parts.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(parts.device)
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        gathered = whole(value)
        if not is_main():
            continue
        kept = gathered.cpu().contiguous()
        # A safetensors file takes no two tensors that share a storage.
        own = kept.untyped_storage().nbytes() == kept.nbytes and kept.data_ptr() not in storages
        copies[key] = kept if own else kept.clone()
        storages.add(kept.data_ptr())
    points = activation_quantizers(parts.model)
    return copies, {
        "scheduler": parts.scheduler.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "learning_rates": [float(group["lr"]) for group in saved["param_groups"]],
        "quantizers": {name: (point.calibrated, point.observing) for name, point in points},
    }


def restore(parts: Parts, state: State) -> None:
    """Put back what :func:`capture` took. It empties ``state.tensors``, to free their memory.

    Raises:
        CheckpointError: it is of another network or optimizer.
    """
    record = state.record
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "random": {}}
    parameters = dict(parts.model.named_parameters())
    for key, value in state.tensors.items():
        kind, _, name = key.partition("/")
        if kind != "random":
            of = name.partition("/")[2] if kind == "optimizer" else name
            # To the device first: torch's observers take over loaded tensors as they are.
            value = part_like(value, parameters.get(of)).to(parts.device)
        kinds[kind][name] = value
    points = dict(activation_quantizers(parts.model))
    groups = parts.optimizer.state_dict()["param_groups"]
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        parts.model.load_state_dict(kinds["model"], strict=True)
        for name, value in kinds["optimizer"].items():
            key, _, parameter = name.partition("/")
            moments.setdefault(parts.names.index(parameter), {})[key] = value
        for group, rate in zip(groups, record.learning_rates, strict=True):
            group["lr"] = rate
        parts.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        parts.scheduler.load_state_dict(record.scheduler)
        for name, (calibrated, observing) in record.quantizers.items():
            points[name].calibrated, points[name].observing = calibrated, observing
        parts.average.load(parts.model, kinds["model"] | kinds["average"])
        parts.scaler.load_state_dict(record.scaler)
        torch.set_rng_state(kinds["random"]["cpu"])
        if parts.device.type == "cuda" and "cuda" in kinds["random"]:
            torch.cuda.set_rng_state(kinds["random"]["cuda"], parts.device)
        state.tensors.clear()
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{state.source}: does not fit the run: {error}") from error
