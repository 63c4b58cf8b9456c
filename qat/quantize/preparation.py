"""Turn a float-rest BNext into a fake-quantized one, in place.

Modules are replaced by their fake-quantized forms (stem and head in :mod:`qat.quantize.stem_and_head`,
sub-blocks in :mod:`qat.quantize.sub_block`). These take over the parameters under the same names, so that the
state dict of the prepared network contains that of the float network.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Final, Protocol, cast

from torch import nn

from qat.errors import QuantizationError
from qat.nn.block import Block
from qat.nn.layers import GlobalAveragePool, Stem
from qat.nn.sub_block import SubBlock
from qat.quantize.attention import FakeQuantSqueezeExcitation
from qat.quantize.backends import Backend, backend_of
from qat.quantize.image_grid import image_grid
from qat.quantize.overrides import GroupName, check_glob, check_overrides, group_of, settings_of
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.stem_and_head import FakeQuantLinear, FakeQuantPool, FakeQuantPReLU, FakeQuantStem
from qat.quantize.sub_block import FakeQuantSubBlock
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.recipe.schema import Quantization, TrunkGroup

#: Normalization assumed where none is given: ImageNet's mean and standard deviation per channel.
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


class _Network(Protocol):
    """The attributes of a network that :func:`prepare` uses."""

    feature: nn.Sequential
    prelu: nn.PReLU
    pool: GlobalAveragePool
    fc: nn.Linear


def prepare(
    model: nn.Module, quantization: Quantization, image: tuple[float, int] | None = None
) -> nn.Module:
    """Insert fake quantization into a float-rest BNext, in place.

    Args:
        model: a float-rest :class:`qat.models.bnext.BNext`; its parameters are kept.
        quantization: the recipe's section: groups, bits, observers, and globs that choose modules.
        image: scale and zero point of the uint8 grid of the image, from
            :func:`qat.quantize.image_grid.image_grid`; ``None`` takes those of ImageNet's normalization.

    Returns:
        ``model``, with ``model.quantization`` set.

    Raises:
        QuantizationError: the network is prepared already, a glob matches nothing, an override has no effect,
            or the backend is not installed.
    """
    if model_is_prepared(model):
        raise QuantizationError("the network is prepared already: prepare a float-rest network")
    network = cast(_Network, model)
    stem = cast(Stem, network.feature[0])
    blocks = [cast(Block, block) for block in list(network.feature)[1:]]
    chosen = _Selection(quantization, _point_names(blocks))

    source: Quantizer = chosen.trunk("feature.0.trunk")
    stem.trunk = source
    if chosen("feature.0", quantization.stem.enabled):
        grid = image or image_grid(IMAGENET_MEAN, IMAGENET_STD)
        bits = settings_of(quantization, "feature.0", quantization.stem).weight_bits
        network.feature[0] = FakeQuantStem(stem, bits, grid, chosen.backend)
    for index, block in enumerate(blocks, start=1):
        name = f"feature.{index}"
        middle, output = chosen.trunk(f"{name}.trunk_mid"), chosen.trunk(f"{name}.trunk_out")
        _prepare_sub_block(block, block.spatial_name, name, chosen, source, middle)
        for child in block.pointwise_names:
            _prepare_sub_block(block, child, name, chosen, middle, output)
        block.trunk_mid, block.trunk_out = middle, output
        source = output
    if chosen("prelu", quantization.trunk.enabled):
        network.prelu = FakeQuantPReLU(network.prelu, source)
    if chosen("fc", quantization.classifier.enabled):
        group = settings_of(quantization, "fc", quantization.classifier)
        network.fc = classifier = FakeQuantLinear(network.fc, group, chosen.backend)
        network.pool = FakeQuantPool(source, classifier.input)
    model.quantization = quantization  # type: ignore[assignment]  # neither a tensor nor a module
    model.train(model.training)
    # The new modules were made on the CPU: move them to the device of the parameters.
    return model.to(network.fc.weight.device)


def _prepare_sub_block(
    block: Block, child: str, name: str, chosen: _Selection, source: Quantizer, target: Quantizer
) -> None:
    module, name = cast(SubBlock, block.get_submodule(child)), f"{name}.{child}"
    quantized = FakeQuantSubBlock(module, chosen.trunk_group(name), source, target, chosen.backend)
    if quantized.infor_recoupling and chosen(f"{name}.se", chosen.quantization.se.enabled):
        group = settings_of(chosen.quantization, f"{name}.se", chosen.quantization.se)
        quantized.se = FakeQuantSqueezeExcitation(quantized.se, group, chosen.backend)
    setattr(block, child, quantized)


class _Selection:
    """Tells which modules the include and exclude globs choose. Refuses globs that match nothing."""

    def __init__(self, quantization: Quantization, names: Sequence[str]) -> None:
        self.quantization = quantization
        for key, globs in (("include", quantization.include), ("exclude", quantization.exclude)):
            for glob in globs:
                check_glob(key, glob, names)
        check_overrides(quantization, names)

    @cached_property
    def backend(self) -> Backend:
        """The backend that makes the quantizers."""
        return backend_of(self.quantization)

    def __call__(self, name: str, group_enabled: bool) -> bool:
        included = any(fnmatchcase(name, glob) for glob in self.quantization.include)
        excluded = any(fnmatchcase(name, glob) for glob in self.quantization.exclude)
        return group_enabled and included and not excluded

    def trunk_group(self, name: str) -> TrunkGroup | None:
        """Settings of one module of the trunk; ``None`` if it stays in float."""
        group = self.quantization.trunk
        return settings_of(self.quantization, name, group) if self(name, group.enabled) else None

    def trunk(self, name: str) -> Quantizer:
        """The quantizer of one trunk tensor."""
        return self.backend.point(self.trunk_group(name), signed=True)


def _point_names(blocks: Sequence[Block]) -> list[str]:
    """Names of the modules that a recipe's globs can choose, in forward order."""
    names = ["feature.0", "feature.0.trunk"]
    for index, block in enumerate(blocks, start=1):
        for child in (block.spatial_name, *block.pointwise_names):
            names.append(f"feature.{index}.{child}")
            if cast(SubBlock, block.get_submodule(child)).infor_recoupling:
                names.append(f"feature.{index}.{child}.se")
        names += [f"feature.{index}.trunk_mid", f"feature.{index}.trunk_out"]
    return [*names, "prelu", "fc"]


def quantized_layers(model: nn.Module, quantization: Quantization) -> dict[str, GroupName]:
    """The modules of ``model`` that ``quantization`` quantizes, in forward order, each with its group.

    Raises:
        QuantizationError: a glob matches nothing.
    """
    names = _point_names([cast(Block, block) for block in list(cast(_Network, model).feature)[1:]])
    chosen = _Selection(quantization, names)
    groups = {name: group_of(name) for name in names}
    return {
        name: group for name, group in groups.items() if chosen(name, getattr(quantization, group).enabled)
    }


def model_is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` has been prepared by :func:`prepare`."""
    return any(isinstance(module, FakeQuantSubBlock) for module in model.modules())


def quantization_map(model: nn.Module) -> dict[str, dict[str, object]]:
    """What is quantized, and how: for each quantizer's module name, its type and further settings.

    Empty for a float network.
    """
    lines: dict[str, dict[str, object]] = {}
    for name, module in model.named_modules():
        if isinstance(module, WeightQuantizer) or (isinstance(module, Quantizer) and module.enabled):
            lines[name] = module.describe()
    return lines
