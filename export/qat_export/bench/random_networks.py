"""Networks filled at random, to be measured or tested where no trained one is at hand.

A network fresh from its constructor will not do: the running statistics of its batch normalizations belong to
no data, and after thirty layers every logit is a constant. Here they are those of random images, layer by
layer, so that activations keep their magnitude and the logits depend on the image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn

from qat.models.bnext import Architecture, BNext, set_temperature
from qat.nn.layers import LearnableBias, SqueezeExcitation
from qat.nn.sub_block import SubBlock
from qat.quantize.calibration import calibrate
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import IMAGENET_MEAN, IMAGENET_STD, prepare
from qat.recipe.schema import Quantization

#: Below 1e-7: weights are exactly ±1.
_TEMPERATURE: Final = 1e-8
#: Pixels of all images of a batch together: four images of 224×224, sixteen of 112×112 and less.
_BATCH_PIXELS: Final = 4 * 224**2


def random_images(
    seed: int,
    count: int,
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Normalized images (count, 3, size, size) whose low frequencies are strong, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    image = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    image = (0.7 * image + 0.3 * torch.rand(count, 3, size, size, generator=generator)).mul(255).round() / 255
    means, stds = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (image - means) / stds


def fill_at_random(model: BNext, images: Tensor) -> None:
    """Give a float-rest network random parameters and the batch statistics of ``images``, in place.

    Its binary weights are exactly ±1 from then on, and it is in evaluation mode. What a constructor draws
    (weights of convolutions, of attention and classifier) stays. torch's default generator is used.

    Args:
        model: float-rest.
        images: normalized, (N, 3, H, W); all statistics are theirs.
    """
    set_temperature(model, _TEMPERATURE)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[::5] *= -1
            norm.bias.normal_(0, 0.3)
        for module in model.modules():
            if isinstance(module, LearnableBias):
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.2, 0.6)
            elif isinstance(module, SqueezeExcitation):
                for index in (1, 3):
                    cast(Tensor, module.se[index].bias).normal_(0, 0.3)
            if isinstance(module, SubBlock) and module.infor_recoupling:
                module.scale.uniform_(-0.2, 1.2)
        # With a momentum of 1 the running statistics become those of the next batch.
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    model.eval()


def random_network(
    architecture: Architecture,
    *,
    seed: int = 0,
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> BNext:
    """A float-rest network with random parameters whose logits depend on images of ``image_size`` pixels.

    The same arguments give the same network; torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BNext.from_architecture(architecture)
        fill_at_random(model, random_images(seed, statistics_batch(image_size), image_size, mean, std))
    return model


def quantized(
    model: BNext,
    *,
    seed: int = 0,
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> BNext:
    """``model`` prepared with every group at 8 bits, and calibrated on random images; in evaluation mode.

    Args:
        model: float-rest; it stays so. The result shares its parameters, which the largest network would
            otherwise hold twice.
        seed: of the calibration images, which are others than :func:`random_network`'s of the same seed.
        image_size: side of the calibration images in pixels.
        mean, std: the normalization the images go through.
    """
    tensors = (*model.parameters(), *model.buffers())
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    prepare(shared, Quantization(), image_grid(mean, std))
    images = random_images(seed + 1, statistics_batch(image_size), image_size, mean, std)
    calibrate(shared, lambda: shared(images))
    return shared.eval()


def statistics_batch(image_size: int) -> int:
    """How many images to take statistics of: up to 16, at least 2 (the last layers see few pixels each)."""
    return max(2, min(16, _BATCH_PIXELS // image_size**2))
