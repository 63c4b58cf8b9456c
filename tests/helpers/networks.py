"""Small random networks for the tests of `export`, ordinary ones and ones with extreme parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from qat_export.bench.random_networks import fill_at_random, random_images
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork
from qat_export.integer.network import SubBlock as IntegerSubBlock
from qat_export.integer.reference import Interpreter
from qat_export.lowering.network import lower
from qat_export.verify.exactness import check_exactness
from torch import Tensor, nn

from qat.grid import Grid
from qat.models.bnext import BNext
from qat.nn.layers import LearnableBias, SqueezeExcitation
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup

MEAN, STD = (0.45, 0.48, 0.4), (0.25, 0.22, 0.3)
#: All sub-block kinds: bias and scale, stride 1 and 2, one 1×1 and two, equal and doubled widths.
WIDTHS = (8, 16, 16, 32)


def quantization(
    *,
    trunk: int = 8,
    se: int = 8,
    classifier: int = 8,
    se_weight: int = 8,
    stem_weight: int = 8,
    fc_weight: int = 8,
) -> Quantization:
    """A section with every group enabled, these bits, and ranges that are updated in training."""
    return Quantization(
        stem=StemGroup(weight_bits=stem_weight),
        se=Group(weight_bits=se_weight, activation_bits=se),
        classifier=Group(weight_bits=fc_weight, activation_bits=classifier),
        trunk=TrunkGroup(activation_bits=trunk, observer="moving_average"),
    )


def pixels(seed: int, count: int, size: int) -> Tensor:
    """Normalized random images (count, 3, size, size) whose low frequencies are strong, as in photographs."""
    return random_images(seed, count, size, MEAN, STD)


def float_network(seed: int = 0, *, size: int = 16, **options: Any) -> BNext:
    """A float-rest network with random parameters, its weights ±1, its statistics those of random images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BNext(**{"num_classes": 10, "widths": WIDTHS, **options})
        fill_at_random(model, pixels(seed, 16, size))
    return model


def prepared(model: BNext, bits: Quantization | None = None, *, size: int = 16, seed: int = 0) -> BNext:
    """Fake-quantize and calibrate ``model`` in place."""
    prepare(model, bits or quantization(), image_grid(MEAN, STD))
    calibrate(model, lambda: model(pixels(seed + 1, 16, size)))
    return model.eval()


def toy(seed: int = 0, bits: Quantization | None = None, *, size: int = 16, **options: Any) -> BNext:
    """A calibrated, fake-quantized network."""
    return prepared(float_network(seed, size=size, **options), bits, size=size, seed=seed)


def lowered(model: BNext, size: int = 16, **options: Any) -> IntegerNetwork:
    """Lower ``model`` with the normalization of these tests."""
    return lower(model, image_size=size, mean=MEAN, std=STD, **options)


@functools.cache
def ordinary(seed: int = 0) -> tuple[BNext, IntegerNetwork, onnx.ModelProto]:
    """A network with all kinds of sub-blocks, lowered and emitted. Tests share it and must not change it."""
    model = toy(seed)
    network = lowered(model, metadata={"run": "a test"})
    return model, network, emit_portable(network)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch normalizations."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def make_extreme(model: BNext, seed: int) -> None:
    """Give some channels of every layer parameters that training reaches rarely, in place.

    Gains of zero and of both signs, variances of zero, huge offsets, slopes above 1 and below 0, moves
    beyond every trunk value, rows of zeros in attention and classifier, mix scales outside of [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)

    def chosen(values: Tensor, share: float = 0.2) -> Tensor:
        return torch.rand(values.shape, generator=generator) < share

    def replace(values: Tensor, choices: Sequence[float]) -> None:
        for choice in choices:
            values[chosen(values, 0.5 / len(choices))] = choice

    with torch.no_grad():
        for norm in norms(model):
            replace(norm.weight, (0.0, -0.0, 1e-9, -1e-4, -1.0, 30.0))
            replace(norm.bias, (0.0, 1e4, -1e4, 1e-8))
            assert norm.running_var is not None
            norm.running_var[chosen(norm.running_var)] = 0.0
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                replace(module.weight, _SLOPES[int(torch.randint(len(_SLOPES), (), generator=generator))])
            elif isinstance(module, LearnableBias):
                replace(module.bias, (1e6, -1e6, 0.0))
            elif isinstance(module, SqueezeExcitation):
                for layer in (module.se[1], module.se[3]):
                    layer.weight[chosen(layer.weight[:, 0, 0, 0])] = 0.0
                    replace(layer.bias, (0.0, 50.0, -50.0))
        model.fc.weight[::3] = 0.0
        replace(model.fc.bias, (0.0, 7.0))


#: Slopes that a PReLU mixes; the graph has one form for slopes up to 1 and another beyond.
_SLOPES = ((0.0, 0.25), (0.0, 1.0, -1.0), (-3.0, 0.5), (2.5, 0.0, -1.5), (1.001, 0.01), (200.0, 0.1))


def with_conv(network: IntegerNetwork, name: str, **changes: Any) -> IntegerNetwork:
    """A copy of ``network`` with fields of the binary convolution of the sub-block ``name`` replaced."""

    def changed(sub: IntegerSubBlock) -> IntegerSubBlock:
        return dataclasses.replace(sub, conv=dataclasses.replace(sub.conv, **changes))

    blocks = []
    for block in network.blocks:
        spatial, *pointwise = (
            changed(sub) if sub.name == name else sub for sub in (block.spatial, *block.pointwise)
        )
        blocks.append(dataclasses.replace(block, spatial=spatial, pointwise=tuple(pointwise)))
    return dataclasses.replace(network, blocks=tuple(blocks))


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """Write ``model`` and return the path."""
    path.write_bytes(model.SerializeToString())
    return path


def parity_problems(
    network: IntegerNetwork, model: onnx.ModelProto, images: NDArray[np.float32]
) -> Iterator[str]:
    """Where the portable graph differs from the interpreter in a single element of any tensor."""
    result = check_exactness(model, network, torch.from_numpy(images), batches=(len(images),))
    yield from (f"the graph has no tensor {name}" for name in result.missing)
    for tensor in result.tensors:
        if tensor.different:
            yield (
                f"optimizations {tensor.optimizations}: {tensor.name}: "
                f"{tensor.different} of {tensor.elements} elements differ"
            )


def trunk_outputs(model: BNext, images: Tensor) -> dict[str, Tensor]:
    """Every tensor of ``model`` on ``images`` that has a name in the lowered network: the trunk behind stem
    and sub-blocks, the head's two, and the logits.
    """
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _m, _i, out: found.__setitem__(name, out))

    handles = [keep(model.feature[0], "feature.0/trunk")]
    for index in range(1, len(model.feature)):
        block = model.feature[index]
        handles.append(keep(block.trunk_mid, f"feature.{index}/trunk_mid"))
        handles.append(keep(block.trunk_out, f"feature.{index}/trunk_out"))
    handles += [keep(model.prelu, "head/prelu"), keep(model.pool, "head/input")]
    try:
        with torch.no_grad():
            found["logits"] = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def torch_problems(
    model: BNext, network: IntegerNetwork, images: NDArray[np.float32], *, sub_blocks: bool = False
) -> Iterator[str]:
    """Yield where trunk, head or logits of the torch network differ in a bit from the interpreter's.

    With ``sub_blocks`` each of them is also called alone, on random integers of its input's whole grid.
    """
    interpreter = Interpreter(network)
    expected = interpreter(images)
    found = {name: tensor.numpy() for name, tensor in trunk_outputs(model, torch.from_numpy(images)).items()}
    if found.pop("logits").tobytes() != expected.tobytes():
        yield "torch: logits differ"
    for name, values in found.items():
        grid, reference = network.grids[name], interpreter.tensors[name]
        wrong = int((values != reference.astype(np.float32) * np.float32(grid.scale)).sum())
        if wrong:
            yield f"torch: {name}: {wrong} of {values.size} elements differ"
    if not sub_blocks:
        return
    for sub, source, target in placed(network):
        integers = on_grid(source, (2, sub.conv.channels, 7, 6), seed=3)
        with torch.no_grad():
            out = model.get_submodule(sub.name)(torch.from_numpy(integers * np.float32(source.scale))).numpy()
        reference = interpreter.sub_block(sub, integers, source, target)
        if not np.array_equal(out, reference * np.float32(target.scale)):
            yield f"torch: {sub.name} alone differs"


def placed(network: IntegerNetwork) -> Iterator[tuple[IntegerSubBlock, Grid, Grid]]:
    """Each sub-block between the grids of its input and its output."""
    for block in network.blocks:
        yield block.spatial, block.input_grid, block.middle_grid
        for sub in block.pointwise:
            yield sub, block.middle_grid, block.output_grid


def on_grid(grid: Grid, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.int16]:
    """Random integers of ``grid``, most of them small, every one possible."""
    rng = np.random.default_rng(seed)
    spread = np.where(rng.random(shape) < 0.7, grid.high / 4, grid.high)
    return np.clip(np.rint(rng.normal(0, 1, shape) * spread), grid.low, grid.high).astype(np.int16)


def shrink_grids(model: BNext, factor: float, names: Sequence[str]) -> None:
    """Multiply the scale of the quantization points whose names end so, in place."""
    for name, point in activation_quantizers(model):
        if name.endswith(tuple(names)):
            point.scale.mul_(factor)
