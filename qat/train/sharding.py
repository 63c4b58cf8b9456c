"""One network in parts (FSDP): each of several processes keeps its part of every weight, gradient and moment.

A parameter is then a DTensor, cut along its first axis. torch gathers the weights of a block before the
block computes, and drops them afterwards. Code that looks at parameters outside of a forward pass uses the
functions below: for its own part, for the whole, or for its part of a whole. One process alone has plain
tensors, which these functions return unchanged, and doesn't load torch's FSDP.
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
from qat.system.collectives import elementwise_maximum, world
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

    Stem and blocks are gathered one by one as they compute, the head with the network itself. An optimizer,
    and anything else that refers to the parameters, has to be made afterwards.
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
    """What this process has of a tensor: its part, or all of it; in the same memory, without a gradient."""
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

    ``value`` is returned unchanged where it has another shape than ``like``, or ``like`` is not in parts.
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
    """Clamp parts to the bounds that layers clamp their parameters to at the start of a training pass.

    A layer of a network in parts clamps the gathered copy, which is dropped after the pass.
    """
    for parameter, lowest, highest in bounded(model):
        own_part(parameter).clamp_(lowest, highest)


def copy_of(model: BNext) -> BNext:
    """A copy with tensors of its own; of a network in parts, this process's part."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    return _made_of(model, lambda value: value.detach().clone())


def whole_network(model: BNext) -> BNext:
    """A whole copy of a network in parts; all processes call this alike. A whole network is returned itself.

    The copy shares the buffers of ``model``: batch-norm statistics that are re-estimated in one change in the
    other. Its parameters need no gradient.
    """
    return _made_of(model, whole) if is_sharded(model) else model


def first_with_nan(model: nn.Module) -> str | None:
    """Name of the first tensor of ``model`` that holds NaN; of one in parts, in whichever process.

    All processes call this alike.
    """
    tensors = model.state_dict()
    first = next((place for place, value in enumerate(tensors.values()) if _has_nan(value)), len(tensors))
    if is_sharded(model):
        first = -round(float(elementwise_maximum(torch.tensor([-float(first)]))))
    return None if first == len(tensors) else list(tensors)[first]


def _has_nan(value: Tensor) -> bool:
    value = own_part(value)
    return value.is_floating_point() and bool(value.isnan().any())


def _made_of(model: BNext, of: Callable[[Tensor], Tensor]) -> BNext:
    with torch.device("meta"):  # without memory, and without a random number
        made = BNext.from_architecture(model.architecture)
    made.load_state_dict({key: of(value) for key, value in model.state_dict().items()}, assign=True)
    return made.requires_grad_(False).train(model.training)


def _is_part(value: Tensor) -> bool:
    # isinstance() would need the class, whose import takes time.
    return hasattr(value, "full_tensor")


def _distributed(value: Tensor) -> Any:
    return value
