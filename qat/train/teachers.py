"""The teachers of a distillation: the network before quantization, other checkpoints, models of timm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.checkpoints.format import file_hash, load_checkpoint, tensors_hash
from qat.checkpoints.loading import build
from qat.data.augment import normalize
from qat.errors import RecipeError, first_line
from qat.recipe.loading import LoadedRecipe, resolve_teachers
from qat.recipe.schema import TIMM
from qat.train.optimizer import distillation_loss
from qat.train.reporter import Reporter

_KEY: Final = "distillation.teachers"


@dataclass(frozen=True)
class Input:
    """The preprocessing that a network expects: mean and std per channel, image side in pixels."""

    mean: Sequence[float]
    std: Sequence[float]
    side: int


@dataclass(frozen=True)
class Teacher:
    """One network that teaches, with the preprocessing that it expects.

    Attributes:
        network: maps normalized images to logits. It is in evaluation mode and needs no gradients.
        input: the preprocessing that it expects; ``None`` if that is the same as for the run's network.
        weight: weight of its answers in the mean over all teachers.
        sha256: hash of its weights; empty for the network before quantization, whose checkpoint the run's
            provenance has already.
    """

    network: nn.Module
    input: Input | None = None
    weight: float = 1.0
    sha256: str = ""

    def logits(self, pixels: Tensor, images: Tensor) -> Tensor:
        """The teacher's logits, float32 (N, classes).

        Args:
            pixels: images in 0 to 1, (N, 3, H, W).
            images: the same images, normalized for the run's network.
        """
        if self.input is not None:
            size = (self.input.side, self.input.side)
            if tuple(pixels.shape[-2:]) != size:
                pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
            images = normalize(pixels, self.input.mean, self.input.std)
        logits: Tensor = self.network(images)
        return logits.float()


class Teachers:
    """Any number of teachers whose answers are averaged. Without teachers there is no distillation."""

    def __init__(
        self, teachers: Sequence[Teacher] = (), temperature: float = 1.0, share: float = 0.0
    ) -> None:
        """Take the teachers.

        Args:
            teachers: the teachers.
            temperature: T, by which logits are divided before they are averaged and compared.
            share: share of the distillation term in the loss, from 0 to 1.
        """
        self.teachers = list(teachers)
        self.temperature = temperature
        self.share = share

    def blend(self, loss: Tensor, logits: Tensor, pixels: Tensor, images: Tensor) -> Tensor:
        """``(1 − share) · loss + share · distillation_loss``, or without teachers ``loss`` itself.

        Args:
            loss: loss against the labels, a scalar.
            logits: logits of the network that is trained, (N, classes).
            pixels, images: see :meth:`__call__`.

        Returns:
            A scalar.
        """
        if not self.teachers:
            return loss
        with torch.no_grad():
            target = self(pixels, images)
        return torch.lerp(loss, distillation_loss(logits, target, self.temperature), self.share)

    def __call__(self, pixels: Tensor, images: Tensor) -> Tensor:
        """Logits (N, classes) whose softmax at temperature T is the mean of the teachers' probabilities.

        They are ``T · log(Σ wᵢ · softmax(zᵢ / T) / Σ wᵢ)`` for teachers with weights ``wᵢ`` and logits
        ``zᵢ``. A single teacher's logits are returned unchanged.

        Args:
            pixels: float32 images in 0 to 1, (N, 3, H, W).
            images: the same images, normalized for the run's network.
        """
        if len(self.teachers) == 1:
            return self.teachers[0].logits(pixels, images)
        total = sum(teacher.weight for teacher in self.teachers)
        logs = [
            F.log_softmax(teacher.logits(pixels, images) / self.temperature, dim=1)
            + torch.log(torch.tensor(teacher.weight / total))
            for teacher in self.teachers
        ]
        return self.temperature * torch.logsumexp(torch.stack(logs), dim=0)

    @property
    def sha256(self) -> str:
        """SHA-256 over the hashes of all teachers that have one, in hexadecimal digits; empty if none has."""
        known = [teacher.sha256 for teacher in self.teachers if teacher.sha256]
        return hashlib.sha256(" ".join(known).encode()).hexdigest() if known else ""


def load_teachers(
    loaded: LoadedRecipe, class_names: Sequence[str], device: torch.device, reporter: Reporter
) -> Teachers:
    """Load the teachers in ``distillation.teachers``. The global random state stays as it is.

    Args:
        loaded: the recipe.
        class_names: names of the images' classes in label order.
        device: device for the teachers.
        reporter: is warned if a teacher's classes have other names.

    Raises:
        RecipeError: a teacher doesn't exist, or has another number of classes.
        CheckpointError: a teacher's file can't be read.
    """
    distillation = loaded.recipe.distillation
    names = resolve_teachers(loaded)
    weights = distillation.teacher_weights or [1.0] * len(names)
    teachers = []
    for name, weight in zip(names, weights, strict=True):
        make = _from_timm if name.startswith(TIMM) else partial(_from_checkpoint, class_names, reporter)
        teacher, classes = make(name, weight)
        if classes != loaded.recipe.model.num_classes:
            raise RecipeError(
                f"{loaded.path}: {_KEY}: {name}: found {classes} classes, allowed: "
                f"{loaded.recipe.model.num_classes}, those of the network it teaches"
            )
        teacher.network.to(device).eval().requires_grad_(False)
        teachers.append(teacher)
    return Teachers(teachers, distillation.temperature, distillation.weight)


def _from_checkpoint(
    class_names: Sequence[str], reporter: Reporter, name: str, weight: float
) -> tuple[Teacher, int]:
    path = Path(name)
    checkpoint = load_checkpoint(path)
    for note in checkpoint.notes:
        reporter.message(f"{_KEY}: {name}: {note}")
    names = checkpoint.metadata.get("class_names")
    if names is not None and json.loads(names) != list(class_names):
        reporter.warning(f"{_KEY}: {name}: its classes have other names than those of the images")
    data = None if checkpoint.recipe is None else checkpoint.recipe.data
    teacher = Teacher(
        build(checkpoint),
        None if data is None else Input(data.mean, data.std, data.image_size),
        weight,
        file_hash(path),
    )
    return teacher, checkpoint.architecture.num_classes


def _from_timm(name: str, weight: float) -> tuple[Teacher, int]:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(
            f"{_KEY}: {name}: needs timm, which is not installed here; install it with: pip install timm"
        ) from error
    try:
        # timm draws random weights before it loads those of the file, so the random state is forked.
        with torch.random.fork_rng(devices=[]):
            network: Any = timm.create_model(name.removeprefix(TIMM), pretrained=True)
        settings = dict(network.pretrained_cfg)
        mean, std, sides = settings["mean"], settings["std"], settings["input_size"]
        classes = int(network.num_classes)
    # timm and its hub raise different exceptions if the model, its weights or the connection is missing.
    except Exception as error:
        raise RecipeError(f"{_KEY}: {name}: timm cannot give it: {first_line(error)}") from error
    state = {key: value.detach() for key, value in network.state_dict().items()}
    return Teacher(network, Input(mean, std, int(sides[-1])), weight, tensors_hash(state)), classes
