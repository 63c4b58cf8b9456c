"""From uint8 batches to network inputs: augmentation, normalization and the fixed input grid.

Most changes are kornia's. Shifts by whole pixels are plain indexing: one gather for the whole batch takes
half the time of kornia's crop, which loops over the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.recipe.schema import Augment, RandAugment
from qat.system.launch import WHOLE, Share

Stage = Callable[[Tensor], Tensor]

#: Parts of a batch for which RandAugment draws anew.
_DRAWS: Final = 8


class Augmenter:
    """Random changes to a whole batch: resized crop, shift, flip, affine, RandAugment, jitter, erasing.

    The result depends on the images, the seed, the epoch and the step, and on nothing else.
    What the recipe leaves out is left out here: with nothing configured a call only divides by 255.
    The pixels of a step do not depend on the steps before it: no random state is carried along.
    """

    def __init__(self, augment: Augment, image_size: int, seed: int) -> None:
        """Take the recipe's ``augment`` section, the side of the result in pixels and the run's seed."""
        self.image_size = image_size
        self.seed = seed
        self._crops = augment.crop is not None
        self._stages = _stages(augment, image_size)

    def __call__(self, images: Tensor, epoch: int, step: int, share: Share = WHOLE) -> Tensor:
        """Augment one batch, or one of the equal parts of a batch: as it would be with the others beside it.

        ``images``: uint8 (N, 3, H, W) on any device. Returns float32 (N, 3, image_size, image_size) in 0..1
        on the same device, black where the affine part looks outside the image. ``step`` counts within
        ``epoch``. The global random state is the same before and after. Raises ``ValueError`` for images
        of another type, or of another size than ``image_size`` when no random crop brings them there.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images, got {images.dtype}")
        side = (self.image_size, self.image_size)
        if not self._crops and tuple(images.shape[-2:]) != side:
            raise ValueError(f"expected {side} images, got {tuple(images.shape[-2:])} and no random crop")
        result = images.float() / 255
        if not self._stages:
            return result
        # kornia draws its parameters from the CPU generator whatever device the images are on, so the crops
        # are the same on a CPU and a GPU, and no GPU generator needs to be forked. Seeding that generator
        # alone matters: torch.manual_seed would also reseed every GPU, which this fork does not restore.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, step))
            for stage in self._stages:
                result = stage(result) if share == WHOLE else applied_to_share(stage, result, share)
        return result.clamp(0, 1)  # interpolation may overshoot by a rounding error; the input grid ends at 1


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(v − mean) / std`` per channel, computed in float32, for images (N, 3, H, W) on their device.

    uint8 images are divided by 255 first; float images are taken as in 0..1 already.
    """
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    channel = (1, -1, 1, 1)
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(channel)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).view(channel)
    return ((values - shift) / spread).to(dtype)


def _stages(augment: Augment, image_size: int) -> list[Stage]:
    moves = bool(augment.translate or augment.rotate or augment.scale)
    colours = bool(augment.randaugment or augment.jitter or augment.erasing)
    if not (augment.crop or augment.pad or augment.flip or moves or colours):
        return []
    import kornia.augmentation as K  # imported here because it takes half a second

    stages: list[Stage] = []
    if augment.crop:
        # "resample" crops the whole batch with one grid sample; "slice", the default, loops over the images.
        stages.append(
            K.RandomResizedCrop(
                (image_size, image_size),
                scale=augment.crop,
                cropping_mode="resample",
                align_corners=False,
            )
        )
    if augment.pad:
        stages.append(_Shift(augment.pad))
    if augment.flip:
        stages.append(K.RandomHorizontalFlip(p=0.5))
    if moves:
        stages.append(
            K.RandomAffine(
                degrees=augment.rotate,
                translate=(augment.translate, augment.translate),
                scale=augment.scale,
                padding_mode="zeros",
                p=1.0,
            )
        )
    if augment.randaugment is not None:
        stages.append(_RandAugment(augment.randaugment))
    if augment.jitter:
        amount = augment.jitter
        stages.append(K.ColorJiggle(amount, amount, amount, p=1.0))
    if augment.erasing:
        stages.append(K.RandomErasing(p=augment.erasing))
    return stages


def shifted(images: Tensor, pixels: int, share: Share = WHOLE) -> Tensor:
    """Each image of (N, C, H, W) moved by its own −pixels to pixels per axis, black where it came from.

    Draws from the CPU's generator, for the whole batch that the images are a ``share`` of.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    whole = count * share.size
    top, left = torch.randint(0, 2 * pixels + 1, (2, whole, 1))[:, share.of(whole)]
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.arange(width)).to(images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[image, :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()


class _Shift:
    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, images: Tensor, share: Share = WHOLE) -> Tensor:
        return shifted(images, self.pixels, share)


class _RandAugment:
    """Kornia's RandAugment draws the changes once per call: a batch is cut up, so that it has several."""

    def __init__(self, settings: RandAugment) -> None:
        from kornia.augmentation.auto import RandAugment as KorniaRandAugment

        # kornia's scale ends at 30
        self.change: Any = KorniaRandAugment(n=settings.count, m=3 * settings.magnitude)

    def __call__(self, images: Tensor, share: Share = WHOLE) -> Tensor:
        whole = len(images) * share.size
        mine = range(whole)[share.of(whole)]
        results = []
        for place in torch.arange(whole).chunk(_DRAWS):
            chunk = range(int(place[0]), int(place[-1]) + 1)
            inside = range(max(chunk.start, mine.start), min(chunk.stop, mine.stop))
            if len(inside) == len(chunk):
                part = images[chunk.start - mine.start : chunk.stop - mine.start]
                results.append(self.change(part).clamp(0, 1))
                continue
            drawn = self.change.forward_parameters(torch.Size((len(chunk), *images.shape[1:])))
            if inside:
                part = images[inside.start - mine.start : inside.stop - mine.start]
                rows = slice(inside.start - chunk.start, inside.stop - chunk.start)
                results.append(self.change(part, params=_rows(drawn, rows)).clamp(0, 1))
        return torch.cat(results)


def applied_to_share(stage: Stage, images: Tensor, share: Share) -> Tensor:
    """What ``stage`` makes of ``images`` as the ``share`` of a batch; what it draws, it draws for all of it.

    Args:
        stage: one of kornia's augmentations, or one of this module's stages.
        images: (N, C, H, W), N the same for each share.
        share: which part of (N · share.size, C, H, W) they are.
    """
    if isinstance(stage, _Shift | _RandAugment):
        return stage(images, share)
    kornia_stage: Any = stage
    whole = len(images) * share.size
    drawn = kornia_stage.forward_parameters(torch.Size((whole, *images.shape[1:])))
    result: Tensor = kornia_stage(images, params=_rows(drawn, share.of(whole)))
    return result


#: Of kornia's parameters those that are not one per image.
_OF_THE_BATCH: Final = ("order", "forward_input_shape")


def _rows(drawn: Any, rows: slice) -> Any:
    """Kornia's parameters for some images of a batch, from those for all."""
    if isinstance(drawn, list):  # of stages in a row
        return [item._replace(data=_rows(item.data, rows)) for item in drawn]
    chosen = drawn["batch_prob"] > 0.5
    result = {}
    for key, values in drawn.items():
        if key in _OF_THE_BATCH or not isinstance(values, Tensor):
            result[key] = values
        elif len(values) == len(chosen):
            result[key] = values[rows]
        else:  # older versions draw for the images alone that are changed
            first, last = int(chosen[: rows.start].sum()), int(chosen[: rows.stop].sum())
            result[key] = values[first:last]
    return result


def mixed_seed(seed: int, epoch: int, step: int) -> int:
    """One generator seed per (seed, epoch, step); a hash, so that neighbours do not share streams."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
