"""Networks with random parameters, for measurements and tests without a trained network.

A network as its constructor makes it is not suitable. The running statistics of its batch normalizations
don't fit its activations, and after thirty layers every logit is constant. So the statistics are set to those
of random images, layer by layer. Then activations keep their magnitude, and logits depend on the image.
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

#: Temperature of the binary weights: below 1e-7, so that they are exactly ±1.
_TEMPERATURE: Final = 1e-8
#: Pixels of all images of a batch together: those of four images of 224×224.
_BATCH_PIXELS: Final = 4 * 224**2


def random_images(
    seed: int,
    count: int,
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Random normalized images (count, 3, size, size) with strong low frequencies, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    image = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    image = (0.7 * image + 0.3 * torch.rand(count, 3, size, size, generator=generator)).mul(255).round() / 255
    means, stds = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (image - means) / stds


def fill_at_random(model: BNext, images: Tensor) -> None:
    """Give a float-rest network random parameters and the batch statistics of ``images``, in place.

    Afterwards its binary weights are exactly ±1, and it is in evaluation mode. The weights of convolutions,
    attention and classifier, which the constructor draws at random, are kept. Random numbers are from torch's
    default generator.

    Args:
        model: float-rest network.
        images: normalized images (N, 3, H, W), of which the statistics are taken.
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
        # With a momentum of 1, the next batch replaces the running statistics.
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

    The same arguments give the same network. The state of torch's default generator is unchanged.
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
    """A copy of ``model`` that is quantized with 8 bits and calibrated on random images, in evaluation mode.

    Args:
        model: float-rest network; it is not changed. The copy shares its parameters, to save memory.
        seed: seed of the calibration images; they differ from those of :func:`random_network` with this seed.
        image_size: side of the calibration images in pixels.
        mean, std: normalization of the images, per channel.
    """
    tensors = (*model.parameters(), *model.buffers())
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    prepare(shared, Quantization(), image_grid(mean, std))
    images = random_images(seed + 1, statistics_batch(image_size), image_size, mean, std)
    calibrate(shared, lambda: shared(images))
    return shared.eval()


def statistics_batch(image_size: int) -> int:
    """Number of images for batch statistics: from 2 to 16, fewer for larger images.

    One is not enough, since the last layers have few pixels per image.
    """
    return max(2, min(16, _BATCH_PIXELS // image_size**2))
