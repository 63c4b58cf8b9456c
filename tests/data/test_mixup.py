"""Mixup and cutmix: which images are mixed, and in which shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.mixup import Mixer
from qat.recipe.schema import Augment

LABELS = torch.arange(8) % 5


def flat() -> Tensor:
    """Images (8, 3, 10, 10) of one value each, all different."""
    return (torch.arange(8.0) / 8).view(8, 1, 1, 1).expand(8, 3, 10, 10).contiguous()


def mix(step: int = 0, epoch: int = 1, seed: int = 0, **alphas: float) -> tuple[Tensor, Tensor]:
    return Mixer(Augment(**alphas), 5, seed)(flat(), LABELS, epoch, step)


def test_nothing_configured_returns_images_and_labels_themselves() -> None:
    images = flat()
    mixed, targets = Mixer(Augment(), 5, 0)(images, LABELS, 1, 0)
    assert mixed is images
    assert targets is LABELS


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_seed_epoch_and_step_alone_decide_the_mixture(alphas: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    first = mix(3, 2, 1, **alphas)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(4)
    assert all(torch.equal(a, b) for a, b in zip(mix(3, 2, 1, **alphas), first, strict=True))
    for other in [(4, 2, 1), (3, 1, 1), (3, 2, 2)]:
        assert not torch.equal(mix(*other, **alphas)[0], first[0])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_one_partner_and_one_share_explain_pixels_and_label_of_each_image(kind: str) -> None:
    values, classes = flat()[:, 0, 0, 0], F.one_hot(LABELS, 5).float()
    shares = []
    for step in range(30):
        images, targets = mix(step, **{kind: 1.0})
        found = []
        for image, target, value, own in zip(images, targets, values, classes, strict=True):
            assert len(image.unique()) <= (1 if kind == "mixup" else 2)
            found += [
                share
                for partner, other in zip(values, classes, strict=True)
                if partner != value
                for share in [float((image.mean() - partner) / (value - partner))]
                if torch.allclose(target, share * own + (1 - share) * other, atol=1e-5)
            ]
        # The share is the same for the whole batch, so one share must explain all images with their partners.
        shares.append(max(found, key=lambda share: sum(abs(share - one) < 1e-4 for one in found)))
        assert -1e-5 <= shares[-1] <= 1 + 1e-5
    assert min(shares) < 0.4
    assert max(shares) > 0.8


def test_a_fair_coin_decides_between_mixup_and_cutmix() -> None:
    cut = 0
    for step in range(200):
        images, _ = mix(step, mixup=1.0, cutmix=1.0)
        cut += any(len(image.unique()) > 1 for image in images)
    assert 70 <= cut <= 120


def test_a_small_alpha_leaves_nearly_all_of_one_image() -> None:
    for step in range(20):
        images, targets = mix(step, mixup=1e-4)
        assert images.isfinite().all()
        assert targets.max(1).values.min() > 0.99
