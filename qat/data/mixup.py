"""Mixup and cutmix, which mix the images of a batch in pairs, and their labels in the same shares."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.augment import mixed_seed
from qat.recipe.schema import Augment
from qat.system.collectives import permuted_rows, world


class Mixer:
    """Mixes each image of a batch with another one of the batch.

    Mixup overlays the two images (Zhang et al. 2017, arXiv 1710.09412): ``share · x + (1 − share) · other``.
    Cutmix puts a rectangle of the other image, with the area ``1 − share``, into the first (Yun et al. 2019,
    arXiv 1905.04899). The share is drawn once per batch from Beta(α, α). If both are on, a fair coin decides
    between them for each batch.

    The result depends on the batch, the seed, the epoch and the step, and on nothing else. Several processes
    mix images across the whole batch, and send each other the images that they need.
    """

    def __init__(self, augment: Augment, num_classes: int, seed: int) -> None:
        """Take the recipe's ``augment`` section, the number of classes and the run's seed."""
        self._alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
        self._classes = num_classes
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images: float32 (N, 3, H, W), this process's part of the batch.
            labels: int64 (N,) on the same device.
            epoch: number of the epoch, from 1.
            step: number of the batch within the epoch.

        Returns:
            The mixed images, and the share of each class, float32 (N, classes). If neither mixup nor cutmix
            is on, ``images`` and ``labels`` themselves.
        """
        kinds = [kind for kind, alpha in self._alphas.items() if alpha]
        if not kinds:
            return images, labels
        # A generator of its own makes the draws independent of the augmentation before. It is NumPy's,
        # because torch's Beta distribution is inaccurate for small alphas.
        random = np.random.default_rng(mixed_seed(self._seed, epoch, step))
        kind = kinds[random.integers(len(kinds))]
        share = float(random.beta(self._alphas[kind], self._alphas[kind]))
        order = random.permutation(len(images) * world().size).tolist()
        targets = F.one_hot(labels, self._classes).float()
        others, other_targets = permuted_rows(images, order), permuted_rows(targets, order)
        if kind == "mixup":
            images = torch.lerp(others, images, share)
        else:
            images, share = _with_rectangle(images, others, share, random)
        return images, torch.lerp(other_targets, targets, share)


def _with_rectangle(
    images: Tensor, others: Tensor, share: float, random: np.random.Generator
) -> tuple[Tensor, float]:
    """Put a rectangle of ``others`` with the area ``1 − share`` into ``images``.

    Returns:
        The mixed images, and the share of their area that is still from ``images``. The rectangle is cut off
        at the edges, so that this can be more than ``share``.
    """
    height, width = images.shape[-2:]
    side = math.sqrt(1.0 - share)
    middle = random.random(2).tolist()
    top, bottom = _span(middle[0], side, height)
    left, right = _span(middle[1], side, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def _span(middle: float, side: float, length: int) -> tuple[int, int]:
    """Start and end of a span of ``side · length`` pixels around ``middle · length``, within 0 to length."""
    half = int(side * length) // 2
    centre = int(middle * length)
    return max(centre - half, 0), min(centre + half, length)
