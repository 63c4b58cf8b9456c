"""Networks filled at random are alive, binary, and the same every time."""

from __future__ import annotations

import functools

import pytest
import torch
from qat_export.bench.random_networks import quantized, random_images, random_network, statistics_batch
from qat_export.lowering.network import lower
from torch import Tensor, nn

from qat.models.bnext import Architecture, BNext, binary_convolutions, is_binary
from qat.nn.sub_block import SubBlock
from qat.quantize.preparation import IMAGENET_MEAN, IMAGENET_STD, model_is_prepared, quantization_map

#: As deep as the published tiny network, and an eighth as wide.
DEEP = Architecture.of(widths=(4, 8, *[16] * 2, *[32] * 2, *[64] * 6, *[128] * 2))
SIZE = 64


@functools.cache
def deep() -> tuple[BNext, BNext]:
    """A float-rest network and its quantized form: not to be changed."""
    model = random_network(DEEP, seed=1, image_size=SIZE)
    return model, quantized(model, seed=1, image_size=SIZE)


def logits(model: BNext, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def fresh() -> Tensor:
    """Images that neither filling nor calibration has seen."""
    return random_images(99, 8, SIZE)


def test_the_weights_in_use_are_exactly_binary() -> None:
    model, _ = deep()
    assert is_binary(model)
    for conv in binary_convolutions(model).values():
        assert set(conv.effective_weight().unique().tolist()) == {-1.0, 1.0}


def test_activations_keep_their_size_through_all_layers() -> None:
    model, _ = deep()
    spreads: dict[str, float] = {}

    def note(name: str, out: Tensor) -> None:
        spreads[name] = float(out.std((0, 2, 3)).median())  # of one channel, over images and pixels

    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: note(name, out))
        for name, module in model.named_modules()
        if isinstance(module, SubBlock | nn.BatchNorm2d)
    ]
    logits(model, fresh())
    for handle in handles:
        handle.remove()
    assert len(spreads) > 90
    assert all(0.1 < spread < 10 for spread in spreads.values()), spreads


@pytest.mark.parametrize("index", [0, 1], ids=["float", "quantized"])
def test_logits_depend_on_the_image_and_on_the_class(index: int) -> None:
    found = logits(deep()[index], fresh())
    assert bool(torch.isfinite(found).all())
    assert float(found.std(0).mean()) > 0.1
    assert float(found.std(1).mean()) > 0.1


def test_a_network_as_constructed_would_not_do() -> None:
    """Else this module had no reason to be."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BNext.from_architecture(DEEP).eval()
    dead = logits(model, fresh()).std(0).mean()
    assert float(dead) < 0.2 * float(logits(deep()[0], fresh()).std(0).mean())


def test_the_quantized_network_follows_the_float_one() -> None:
    both = torch.stack([logits(model, fresh()).flatten() for model in deep()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.7  # 0.96 at the published width


def test_the_seed_alone_decides_the_network() -> None:
    states = []
    for ambient, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(ambient)
        before = torch.random.get_rng_state()
        model = random_network(Architecture.of(widths=(8, 16), num_classes=10), seed=seed, image_size=16)
        assert torch.equal(before, torch.random.get_rng_state())
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert not torch.equal(first["feature.0.bn1.running_mean"], other["feature.0.bn1.running_mean"])


def test_it_can_be_trained_like_any_other() -> None:
    model = random_network(Architecture.of(widths=(8, 16), num_classes=10), image_size=16)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {nn.BatchNorm2d(1).momentum}
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_quantizing_leaves_the_network_as_it_was_and_shares_its_parameters() -> None:
    model = random_network(Architecture.of(widths=(8, 16), num_classes=10), image_size=16)
    images, state = random_images(3, 2, 16), {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model, images)
    fake_quantized = quantized(model, image_size=16)
    assert not model_is_prepared(model)
    assert model_is_prepared(fake_quantized)
    assert torch.equal(logits(model, images), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    theirs = dict(fake_quantized.named_parameters())
    assert all(theirs[key] is value for key, value in model.named_parameters())


def test_every_group_has_8_bits_and_can_be_lowered() -> None:
    _, fake_quantized = deep()
    types = {str(line["type"]) for line in quantization_map(fake_quantized).values()}
    assert types == {"int8", "uint8"}
    network = lower(fake_quantized, image_size=SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert len(network.blocks) == len(DEEP.widths) - 1


def test_images_are_normalized_8_bit_pixels() -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    images = random_images(0, 3, 16, mean, std)
    shape = (1, 3, 1, 1)
    pixels = (images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)) * 255
    assert images.shape == (3, 3, 16, 16)
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)
    assert float(pixels.min()) > -0.01
    assert float(pixels.max()) < 255.01
    assert not torch.equal(images, random_images(1, 3, 16, mean, std))


def test_large_images_are_fewer() -> None:
    assert [statistics_batch(size) for size in (8, 112, 224, 384, 2048)] == [16, 16, 4, 2, 2]
