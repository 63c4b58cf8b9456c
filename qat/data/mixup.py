"""Mixup and cutmix: images of a batch mixed in pairs, and labels in the same shares."""

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
    """Mixes each batch with itself in another order; the share is drawn once per batch from Beta(α, α).

    Mixup overlays the two images (Zhang et al. 2017, arXiv 1710.09412), cutmix puts a rectangle of one into
    the other (Yun et al. 2019, arXiv 1905.04899). Where both are on, a fair coin decides per batch. The
    result depends on the batch, the seed, the epoch and the step, and on nothing else: several processes mix
    across their parts of it, each sending the images that others ask for.
    """

    def __init__(self, augment: Augment, num_classes: int, seed: int) -> None:
        """Take the recipe's ``augment`` section, the number of classes and the run's seed."""
        self._alphas = {"mixup": augment.mixup, "cutmix": augment.cutmix}
        self._classes = num_classes
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images: float32 (N, 3, H, W).
            labels: int64 (N,) on the same device.
            epoch: counts from 1.
            step: of the batch within the epoch.

        Returns:
            The images, and shares of the classes (N, classes) float32; both as they are where nothing is on.
        """
        kinds = [kind for kind, alpha in self._alphas.items() if alpha]
        if not kinds:
            return images, labels
        # Its own generator: what is drawn here doesn't depend on what the augmentation before has drawn.
        # NumPy's, because torch has no Beta that holds for small alphas.
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
    """``images`` with a rectangle of ``others`` of the area ``1 − share``, cut at the edge; what is left."""
    height, width = images.shape[-2:]
    side = math.sqrt(1.0 - share)
    middle = random.random(2).tolist()
    top, bottom = _span(middle[0], side, height)
    left, right = _span(middle[1], side, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)


def _span(middle: float, side: float, length: int) -> tuple[int, int]:
    """First pixel of ``side · length`` around ``middle · length``, and the one after the last."""
    half = int(side * length) // 2
    centre = int(middle * length)
    return max(centre - half, 0), min(centre + half, length)
