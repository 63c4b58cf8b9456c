"""What training minimizes and by which steps: losses, optimizer groups, schedules."""

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
    """Weight temperature after ``share`` of ``epochs``, never below the schedule's end.

    Without ``decay`` geometric from start to end, then constant. With it ``start · decay^e`` after ``e``
    whole epochs, as BNext's authors train (arXiv 2211.12933; 0.9 in their script).
    """
    if schedule.decay is not None:
        # The share is a ratio of steps: rounding must not move the end of an epoch.
        return max(schedule.start * schedule.decay ** math.floor(share * epochs + 1e-9), schedule.end)
    progress = min(share / schedule.share, 1.0)
    return schedule.end if progress == 1.0 else schedule.start * (schedule.end / schedule.start) ** progress


def learning_rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Factor of the peak learning rate at ``step`` of ``steps``: linear warm-up, then a cosine."""
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
    """``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, mean over the batch, in nats.

    Hinton et al. 2015 (arXiv 1503.02531); the factor keeps the gradient's size independent of ``T``.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def make_optimizer(model: nn.Module, settings: Optimizer, own_head: bool = False) -> torch.optim.Optimizer:
    """Optimizer with groups: binary latent weights, other matrices (decayed), vectors.

    Latent weights are not decayed: only their sign counts, and decay would move all of them towards the
    point where it flips. A vector has one entry per channel, whatever its shape. With ``kernel_decay`` it is
    as in the published script of BNext's authors: that is the decay of every parameter with four dimensions
    (a group of its own), latent weights among them, and ``weight_decay`` that of all others. Parameters that
    need no gradient are left out.

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
    if id(parameter) in binary:
        return "binary"
    if settings.kernel_decay is not None and parameter.ndim == 4:
        return "kernel"
    matrix = parameter.ndim >= 2 and parameter.shape[1:].numel() > 1 and parameter.shape[0] > 1
    return "matrix" if matrix else "vector"
