"""Captures the state of a training for a state file, and restores it."""

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
from qat.train.sharding import full_tensor, part_like, shards
from qat.train.state_file import Record, State
from qat.train.weight_average import WeightAverage


@dataclass(frozen=True)
class Parts:
    """The objects whose state is captured and restored."""

    model: BNext
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    average: WeightAverage
    scaler: torch.amp.GradScaler

    @cached_property
    def names(self) -> list[str]:
        """Name of each parameter, in the order in which the optimizer numbers them."""
        known = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [known[id(parameter)] for group in groups for parameter in group["params"]]


def first_record(recipe: Recipe, provenance: Mapping[str, str], device: torch.device) -> Record:
    """The record of a run before its first step.

    Threads and the number of processes are those of this process.

    Args:
        recipe: the recipe as checkpoints store it, with paths as they were given.
        provenance: see :func:`qat.train.provenance.provenance_of`.
        device: device of the network.
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
    """Capture everything that the rest of the training depends on.

    A sharded network is gathered, so that all processes must call this alike.

    Returns:
        Tensors on the CPU by key, and values for fields of :class:`qat.train.state_file.Record`. The tensors
        may share memory with those in use, and so must be written before training goes on. Processes other
        than the first get no tensors.
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
        gathered = full_tensor(value)
        if not is_main():
            continue
        kept = gathered.cpu().contiguous()
        # safetensors refuses tensors that share a storage, so such tensors are copied.
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
    """Restore what :func:`capture` returned. It empties ``state.tensors`` to free their memory.

    Raises:
        CheckpointError: the state belongs to another network or optimizer.
    """
    record = state.record
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "random": {}}
    parameters = dict(parts.model.named_parameters())
    for key, value in state.tensors.items():
        kind, _, name = key.partition("/")
        if kind != "random":
            of = name.partition("/")[2] if kind == "optimizer" else name
            # Tensors are moved to the device here, because torch's observers keep a loaded tensor where it
            # lies.
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
