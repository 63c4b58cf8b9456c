"""A sharded network (FSDP): each process has a part of every weight, gradient and moment of the optimizer.

A parameter of a sharded network is a DTensor, which is cut along its first axis. torch gathers the weights of
a block before the block computes, and frees them afterwards. Code that reads parameters outside of a forward
pass uses the functions below to get this process's part of a tensor, the full tensor, or a part of a full
tensor. A process that works alone has plain tensors, which these functions return unchanged. It doesn't
import torch's FSDP.
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

#: Environment variable that ``accelerate launch --use_fsdp`` sets.
ACCELERATE_FSDP: Final = "ACCELERATE_USE_FSDP"


def asked_of_accelerate() -> bool:
    """Whether this process was started by ``accelerate launch --use_fsdp``."""
    return is_set(ACCELERATE_FSDP)


def shards(recipe: Recipe) -> bool:
    """Whether the network is to be sharded: with several processes, if recipe or launcher ask for it."""
    return world().size > 1 and (recipe.parallel == "fsdp" or asked_of_accelerate())


def shard(model: BNext, device: torch.device) -> None:
    """Shard ``model`` in place, so that this process has only its part of each parameter.

    The stem and each block are gathered separately when they compute; the head's parameters are gathered for
    the whole forward pass. The optimizer, and everything else that refers to parameters, must be made
    afterwards.

    Args:
        model: the network, with the same weights in each process.
        device: device of the network.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world().size,))
    for part in (*model.feature, model):
        fully_shard(part, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` is sharded, so that this process has only parts of its parameters."""
    return any(_is_part(parameter) for parameter in model.parameters())


def local_part(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or a plain tensor itself, detached, in the same memory."""
    value = value.detach()
    if not _is_part(value):
        return value
    part: Tensor = _distributed(value).to_local()
    return part


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor, gathered from all processes if it is sharded, without a gradient.

    All processes call this alike.
    """
    value = value.detach()
    if not _is_part(value):
        return value
    gathered: Tensor = _distributed(value).full_tensor()
    return gathered


def part_like(value: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of the full tensor ``value``, cut like ``like`` and on the same device.

    If ``like`` is not sharded or has another shape, ``value`` is returned unchanged.
    """
    if like is None or not _is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    target = _distributed(like)
    # Each process has the full tensor and takes its part, so that nothing is sent.
    part = distribute_tensor(value.to(like.device), target.device_mesh, target.placements, src_data_rank=None)
    return part.clone()  # a view of the full tensor would keep that in memory


@torch.no_grad()
def clamp_parts(model: nn.Module) -> None:
    """Clamp this process's parts of parameters to the bounds that layers have for them.

    Layers clamp their parameters at the start of a forward pass in training mode. In a sharded network they
    clamp only the gathered copy, which is freed after the pass.
    """
    for parameter, lowest, highest in bounded(model):
        local_part(parameter).clamp_(lowest, highest)


def copy_of(model: BNext) -> BNext:
    """A copy of ``model`` with its own tensors. If ``model`` is sharded, the copy is sharded alike."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    return _copy_with(model, lambda value: value.detach().clone())


def whole_network(model: BNext) -> BNext:
    """``model`` itself, or if it is sharded, a copy with full parameters. All processes call this alike.

    The copy shares the buffers of ``model``, so that batch-norm statistics which are re-estimated in one
    change in the other. Its parameters need no gradient.
    """
    return _copy_with(model, full_tensor) if is_sharded(model) else model


def first_with_nan(model: nn.Module) -> str | None:
    """Name of the first tensor of ``model`` that holds NaN, or ``None``.

    All processes call this alike. In a sharded network, the parts of all processes are searched.
    """
    tensors = model.state_dict()
    first = next((place for place, value in enumerate(tensors.values()) if _has_nan(value)), len(tensors))
    if is_sharded(model):
        first = -round(float(elementwise_maximum(torch.tensor([-float(first)]))))
    return None if first == len(tensors) else list(tensors)[first]


def _has_nan(value: Tensor) -> bool:
    value = local_part(value)
    return value.is_floating_point() and bool(value.isnan().any())


def _copy_with(model: BNext, copied: Callable[[Tensor], Tensor]) -> BNext:
    """``value`` itself, which is a DTensor, typed so that the type checker knows DTensor's methods."""
    with torch.device("meta"):  # allocates no memory and draws no random numbers
        made = BNext.from_architecture(model.architecture)
    made.load_state_dict({key: copied(value) for key, value in model.state_dict().items()}, assign=True)
    return made.requires_grad_(False).train(model.training)


def _is_part(value: Tensor) -> bool:
    # DTensor is recognized by a method, because its class takes long to import.
    return hasattr(value, "full_tensor")


def _distributed(value: Tensor) -> Any:
    """``value`` itself, which is a DTensor, typed so that the type checker allows DTensor's methods."""
    return value
