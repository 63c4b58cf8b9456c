"""The optimizer with its parameter groups, the schedules of learning rate and temperature, and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models.bnext import binary_convolutions
from qat.recipe.schema import Optimizer, Temperature


def temperature_at(schedule: Temperature, share: float, epochs: int) -> float:
    """Temperature T of the binary weights, which are used as ``clamp(w / T, −1, 1)``.

    Without ``decay`` it is ``start · (end / start)^(share / schedule.share)`` and then stays at ``end``. With
    ``decay`` it is ``start · decay^e`` after ``e`` whole epochs, as BNext's authors train (arXiv 2211.12933;
    the decay in their script is 0.9), but never below ``end``.

    Args:
        schedule: the recipe's ``schedule.temperature``.
        share: how much of the training is done, from 0 to 1.
        epochs: epochs of the whole training.
    """
    if schedule.decay is not None:
        # `share` is a quotient of steps. The small term keeps its rounding error from hiding the end of an
        # epoch.
        return max(schedule.start * schedule.decay ** math.floor(share * epochs + 1e-9), schedule.end)
    progress = min(share / schedule.share, 1.0)
    return schedule.end if progress == 1.0 else schedule.start * (schedule.end / schedule.start) ** progress


def learning_rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Factor by which the peak learning rate is multiplied: linear warm-up, then a cosine.

    ``(s + 1) / (W + 1)`` at step ``s`` of ``W`` warm-up steps; then ``m + (1 − m) · (1 + cos(π · p)) / 2``,
    with ``m = min_lr`` and ``p`` the share of the other steps that are done.

    Args:
        optimizer: the recipe's ``optimizer`` section.
        step: number of the optimizer step, from 0.
        steps: optimizer steps of the whole training.
    """
    warmup = optimizer.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return optimizer.min_lr + (1.0 - optimizer.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate_factors(
    optimizer: torch.optim.Optimizer, settings: Optimizer, steps: int, head_steps: int = 0
) -> list[Callable[[int], float]]:
    """For each group of ``optimizer`` the factor of its peak learning rate by the step's number.

    During the first ``head_steps`` of all ``steps`` the classifier's group alone moves; the schedule of the
    others begins then.
    """

    def head(step: int) -> float:
        return learning_rate_factor(settings, step, steps)

    def body(step: int) -> float:
        if step < head_steps:
            return 0.0
        return learning_rate_factor(settings, step - head_steps, steps - head_steps)

    return [head if group.get("head") else body for group in optimizer.param_groups]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, averaged over the batch, in nats.

    The factor ``T²`` makes the size of the gradient independent of ``T`` (Hinton et al. 2015, arXiv
    1503.02531).

    Args:
        student: logits (N, classes) of the network that is trained.
        teacher: logits (N, classes) of the teacher.
        temperature: T, above 0.

    Returns:
        A scalar.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def make_optimizer(model: nn.Module, settings: Optimizer, own_head: bool = False) -> torch.optim.Optimizer:
    """The optimizer, with parameter groups for latent weights, other matrices, and vectors.

    Matrices get ``weight_decay``; vectors, which have one entry per channel whatever their shape is, don't.
    Latent weights don't either: only their signs are used, and decay would move all of them towards 0, where
    the sign flips.

    With ``kernel_decay`` weight decay is as in the published script of BNext's authors: every parameter with
    four dimensions, latent weights included, gets ``kernel_decay``, and all others get ``weight_decay``.

    Parameters that need no gradient are left out.

    With ``own_head``, or a ``head_lr``, weight and bias of the classifier (``fc``) are two further groups,
    which have ``head`` set.
    """
    own_head = own_head or settings.head_lr is not None
    head = dict(model.get_submodule("fc").named_parameters()) if own_head else {}
    ids = {id(parameter) for parameter in head.values()}
    binary = {id(conv.weight) for conv in binary_convolutions(model).values()}
    groups: dict[str, list[nn.Parameter]] = {"binary": [], "kernel": [], "matrix": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in ids:
            groups[_group_of(parameter, binary, settings)].append(parameter)
    decay, kernel_decay = settings.weight_decay, settings.kernel_decay
    published = kernel_decay is not None
    options: list[dict[str, Any]] = [
        {
            "params": groups["binary"],
            "lr": settings.binary_lr or settings.lr,
            "weight_decay": kernel_decay or 0.0,
        },
        {"params": groups["kernel"], "lr": settings.lr, "weight_decay": kernel_decay},
        {"params": groups["matrix"], "lr": settings.lr, "weight_decay": decay},
        {"params": groups["vector"], "lr": settings.lr, "weight_decay": decay if published else 0.0},
    ]
    for parameter in (one for one in head.values() if one.requires_grad):
        decays = decay if published or _group_of(parameter, binary, settings) == "matrix" else 0.0
        options.append(
            {
                "params": [parameter],
                "lr": settings.head_lr or settings.lr,
                "weight_decay": decays,
                "head": True,
            }
        )
    options = [group for group in options if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(
            options, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
    return torch.optim.AdamW(options, lr=settings.lr, fused=True)


def _group_of(parameter: nn.Parameter, binary: set[int], settings: Optimizer) -> str:
    """Name of a parameter's group. ``binary`` holds the ``id`` of each latent weight."""
    if id(parameter) in binary:
        return "binary"
    if settings.kernel_decay is not None and parameter.ndim == 4:
        return "kernel"
    matrix = parameter.ndim >= 2 and parameter.shape[1:].numel() > 1 and parameter.shape[0] > 1
    return "matrix" if matrix else "vector"
