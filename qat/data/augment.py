"""From uint8 batches to network inputs: augmentation and normalization.

kornia computes most of the changes. Shifts by whole pixels are computed here: one gather for the whole batch
takes half the time of kornia's crop, which loops over the images.
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

#: Number of parts into which a batch is divided for RandAugment. Each part gets changes of its own.
_DRAWS: Final = 8


class Augmenter:
    """Random changes to a batch: resized crop, shift, flip, affine, RandAugment, jitter, erasing.

    Changes that the recipe doesn't ask for are left out; without any, a call only divides by 255. The result
    depends on the images, the seed, the epoch and the step, and on nothing else. In particular no random
    state is kept between steps, so that a resumed run sees the images that it would have seen.
    """

    def __init__(self, augment: Augment, image_size: int, seed: int) -> None:
        """Take the recipe's ``augment`` section, the side of the result in pixels and the run's seed."""
        self.image_size = image_size
        self.seed = seed
        self._crops = augment.crop is not None
        self._stages = _stages(augment, image_size)

    def __call__(self, images: Tensor, epoch: int, step: int, share: Share = WHOLE) -> Tensor:
        """Augment one batch, or a share of it.

        A share gets the values that its images would get in the whole batch. The global random state is the
        same before and after.

        Args:
            images: uint8 (N, 3, H, W) on any device.
            epoch: number of the epoch.
            step: number of the batch within the epoch.
            share: which part of the batch ``images`` are; all parts have the same N.

        Returns:
            float32 (N, 3, image_size, image_size) in 0 to 1 on the same device. Pixels that come from outside
            of an image are black.

        Raises:
            ValueError: the images have another type, or, without a random crop, another size than
                ``image_size``.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images, got {images.dtype}")
        side = (self.image_size, self.image_size)
        if not self._crops and tuple(images.shape[-2:]) != side:
            raise ValueError(f"expected {side} images, got {tuple(images.shape[-2:])} and no random crop")
        result = images.float() / 255
        if not self._stages:
            return result
        # kornia draws its parameters from the CPU generator on any device. So the changes are the same on a
        # CPU and a GPU, and only that generator is forked. It is seeded alone, too, because torch.manual_seed
        # would also seed the generators of all GPUs, which this fork doesn't restore.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, step))
            for stage in self._stages:
                result = stage(result) if share == WHOLE else applied_to_share(stage, result, share)
        return result.clamp(0, 1)  # interpolation can exceed 1 by a rounding error


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(v − mean) / std`` for each channel, computed in float32 on the images' device.

    Args:
        images: (N, 3, H, W), either uint8, which are divided by 255 first, or float in 0 to 1.
        mean: one number per channel, for values in 0 to 1.
        std: one number per channel, for values in 0 to 1.
        dtype: type of the result.

    Returns:
        (N, 3, H, W).
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
    """Shift each image by a random whole number of pixels per axis; uncovered pixels become 0.

    Shifts are drawn from the CPU's global generator for the whole batch, of which the images are a share.

    Args:
        images: (N, C, H, W).
        pixels: largest shift in each direction.
        share: which part of the batch ``images`` are; all parts have the same N.

    Returns:
        (N, C, H, W).
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
    """Applies kornia's RandAugment to parts of a batch, since it draws the same changes for a whole call."""

    def __init__(self, settings: RandAugment) -> None:
        from kornia.augmentation.auto import RandAugment as KorniaRandAugment

        # kornia's magnitudes end at 30, those of the recipe at 10.
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
    """Apply ``stage`` to a share of a batch, with the random parameters that it gets in the whole batch.

    Args:
        stage: one of kornia's augmentations, or one of this module's stages.
        images: (N, C, H, W), with the same N for each share.
        share: which part of the batch (N · share.size, C, H, W) they are.

    Returns:
        The changed images, (N, C, H', W').
    """
    if isinstance(stage, _Shift | _RandAugment):
        return stage(images, share)
    kornia_stage: Any = stage
    whole = len(images) * share.size
    drawn = kornia_stage.forward_parameters(torch.Size((whole, *images.shape[1:])))
    result: Tensor = kornia_stage(images, params=_rows(drawn, share.of(whole)))
    return result


#: Parameters of kornia's augmentations that hold for a whole batch, and not one value per image.
_OF_THE_BATCH: Final = ("order", "forward_input_shape")


def _rows(drawn: Any, rows: slice) -> Any:
    """kornia's parameters for the images ``rows`` of a batch, taken from those for the whole batch."""
    if isinstance(drawn, list):  # the parameters of several changes in a row
        return [item._replace(data=_rows(item.data, rows)) for item in drawn]
    chosen = drawn["batch_prob"] > 0.5
    result = {}
    for key, values in drawn.items():
        if key in _OF_THE_BATCH or not isinstance(values, Tensor):
            result[key] = values
        elif len(values) == len(chosen):
            result[key] = values[rows]
        else:  # older versions of kornia only have parameters for the images that are changed
            first, last = int(chosen[: rows.start].sum()), int(chosen[: rows.stop].sum())
            result[key] = values[first:last]
    return result


def mixed_seed(seed: int, epoch: int, step: int) -> int:
    """A seed of 63 bits for each (seed, epoch, step), by a hash, so that neighbouring steps are unrelated."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
