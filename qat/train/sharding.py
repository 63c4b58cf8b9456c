"""One network in parts (FSDP): each of several processes keeps its part of every weight, gradient and moment.

A parameter is then a DTensor, cut along its first axis. torch puts the weights of a block together before the
block computes, and lets them go behind it. Whatever looks at parameters outside of a forward pass comes here:
for its own part, for the whole, or for its part of a whole. One process alone has plain tensors, which these
functions give back as they are, and never loads any of this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.nn.block import bounded
from qat.recipe.schema import Recipe
from qat.system.collectives import world
from qat.system.launch import is_set

#: What ``accelerate launch --use_fsdp`` sets.
ACCELERATE_FSDP: Final = "ACCELERATE_USE_FSDP"


def asked_of_accelerate() -> bool:
    """Whether the launch is configured for FSDP: ``accelerate launch --use_fsdp``."""
    return is_set(ACCELERATE_FSDP)


def shards(recipe: Recipe) -> bool:
    """Whether processes share the network: where there are several, and recipe or launcher ask for it."""
    return world().size > 1 and (recipe.parallel == "fsdp" or asked_of_accelerate())


def shard(model: BNext, device: torch.device) -> None:
    """Leave this process its part of ``model``, which is equal in all of them and lies on ``device``.

    Stem and blocks are gathered one by one as they compute, the head with the network itself. What refers to
    the parameters, an optimizer above all, has to be made afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world().size,))
    for part in (*model.feature, model):
        fully_shard(part, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only parts of the parameters of ``model``."""
    return any(_is_part(parameter) for parameter in model.parameters())


def own_part(value: Tensor) -> Tensor:
    """What this process has of a tensor, without a gradient: its part, in place, or all of it."""
    value = value.detach()
    if not _is_part(value):
        return value
    part: Tensor = _distributed(value).to_local()
    return part


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which processes have parts, without a gradient; all of them call this alike."""
    value = value.detach()
    if not _is_part(value):
        return value
    gathered: Tensor = _distributed(value).full_tensor()
    return gathered


def part_like(value: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole ``value``, cut as ``like`` is, on its device.

    What has another shape than ``like``, or where that is whole, is given back as it is.
    """
    if like is None or not _is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    target = _distributed(like)
    # Each process has the whole and takes its part of it: nothing is sent.
    part = distribute_tensor(value.to(like.device), target.device_mesh, target.placements, src_data_rank=None)
    return part.clone()  # else the whole would stay with it


@torch.no_grad()
def bound_parts(model: nn.Module) -> None:
    """Keep parts within the bounds that layers keep their parameters in, as their training pass begins.

    What a layer changes in a forward pass is the gathered copy, which is thrown away.
    """
    for parameter, lowest, highest in bounded(model):
        own_part(parameter).clamp_(lowest, highest)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy with tensors of its own; of a network in parts, this process's part."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    return _made_of(model, lambda value: value.detach().clone())


def whole_network(model: BNext) -> BNext:
    """A whole copy of a network in parts; all processes call this alike. A whole one is given back as it is.

    The copy's buffers are those of ``model``: statistics averaged anew in one are in the other. Parameters
    need no gradient.
    """
    return _made_of(model, whole) if is_sharded(model) else model


def _made_of(model: nn.Module, of: Callable[[Tensor], Tensor]) -> BNext:
    assert isinstance(model, BNext)
    with torch.device("meta"):  # without memory, and without a random number
        made = BNext.from_architecture(model.architecture)
    made.load_state_dict({key: of(value) for key, value in model.state_dict().items()}, assign=True)
    return made.requires_grad_(False).train(model.training)


def _is_part(value: Tensor) -> bool:
    # Asking for the class would load it.
    return hasattr(value, "full_tensor")


def _distributed(value: Tensor) -> Any:
    return value
