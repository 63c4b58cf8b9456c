from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import WIDTHS, Architecture, BNext
from qat.models.operation_count import Operations, operations
from qat.nn.layers import BinaryConv2d
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization

#: Billions of operations at 224 pixels and 1000 classes, as published.
PUBLISHED = {"tiny": 0.077, "small": 0.172, "middle": 0.317, "large": 0.819}
#: Binary weights and other parameters with 1000 classes, counted in the authors' networks.
PARAMETERS = {
    "tiny": (28_253_184, 2_609_052),
    "small": (63_569_664, 5_024_950),
    "middle": (126_238_464, 8_263_510),
    "large": (308_310_016, 18_236_624),
}
TOY = (8, 8, 16, 16, 32)


def executed(model: BNext, image_size: int) -> dict[str, tuple[int, int]]:
    """Output side and multiply-accumulates of each layer of ``model`` as it runs on one image; both layers
    of a channel attention under its name."""
    found: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | BinaryConv2d):
            name = name.partition(".se.se.")[0] + (".se" if ".se.se." in name else "")

            def hook(module: Any, inputs: Any, out: Tensor, name: str = name) -> None:
                side = out.shape[-1] if out.ndim == 4 else 1
                assert out.ndim == 2 or out.shape[-2] == side
                macs = found.get(name, (0, 0))[1] + out[0].numel() * module.weight[0].numel()
                found[name] = side, macs

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    for handle in handles:
        handle.remove()
    return found


def assert_counted_as_executed(counted: Operations, model: BNext, image_size: int) -> None:
    seen = executed(model, image_size)
    assert {layer.name: (layer.side, layer.macs) for layer in counted.layers} == seen
    assert [layer.name for layer in counted.layers] == list(seen)
    binary = {name for name, module in model.named_modules() if isinstance(module, BinaryConv2d)}
    assert {layer.name for layer in counted.layers if layer.binary} == binary
    assert counted.bops == sum(seen[name][1] for name in binary)
    assert counted.int8_macs == sum(macs for name, (_, macs) in seen.items() if name not in binary)


@pytest.mark.parametrize("size", WIDTHS)
def test_operations_of_the_published_sizes_are_the_published_ones(size: str) -> None:
    counted = operations(Architecture.of(size, 1000), 224)
    assert counted.ops == counted.bops / 64 + counted.int8_macs / 8
    # The module's docstring promises 0.1 %.
    assert counted.ops / 1e9 == pytest.approx(PUBLISHED[size], rel=0.001)


@pytest.mark.parametrize("size", WIDTHS)
def test_other_counting_conventions_lie_as_far_away_as_documented(size: str) -> None:
    counted = operations(Architecture.of(size, 1000), 224)
    attention = sum(layer.macs for layer in counted.layers if layer.kind == "se")
    convolutions = [layer for layer in counted.layers if layer.kind in ("stem", "binary")]
    # A normalization behind the stem, two in each sub-block, which keeps its channels.
    normalized = sum((2 if layer.binary else 1) * layer.shape[0] * layer.side**2 for layer in convolutions)
    published = PUBLISHED[size] * 1e9
    assert -0.0035 < (counted.ops - attention / 8) / published - 1 < -0.001
    assert 0.0065 < (counted.ops + normalized / 8) / published - 1 < 0.0155
    assert 0.04 < counted.float_rest_ops / published - 1 < 0.155


@pytest.mark.parametrize("size", WIDTHS)
def test_parameters_of_the_published_sizes_are_the_published_ones(size: str) -> None:
    found = operations(Architecture.of(size, 1000), 224).parameters
    assert (found.binary, found.weights + found.others) == PARAMETERS[size]
    assert found.total == sum(PARAMETERS[size])


def test_bytes_of_tiny_are_the_documented_megabytes() -> None:
    found = operations(Architecture.of("tiny", 1000), 224).parameters
    megabytes = [size / 1e6 for size in (found.float32_bytes, found.packed_bytes(32), found.packed_bytes(8))]
    assert megabytes == pytest.approx([123.449, 13.968, 6.141], abs=5e-4)
    assert found.packed_bytes(8) < found.packed_bytes(8, 32) < found.packed_bytes(32, 32)
    assert found.packed_bytes(32) == found.packed_bytes(32, 32)


def test_bits_are_rounded_up_to_bytes() -> None:
    # Two channels: 36 + 4 binary weights of the block, 3·9·2 + 2·(2·2) + 2·3 others with 8 bits.
    found = operations(Architecture.of(num_classes=3, widths=(2, 2)), 4).parameters
    assert (found.binary, found.weights) == (40, 54 + 8 + 6)
    odd = operations(Architecture.of(num_classes=3, widths=(3, 3)), 4).parameters
    assert odd.binary == 90
    assert odd.packed_bytes(8, 0) == odd.weights + 12


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("image_size", [1, 2, 15, 16, 17, 33])
def test_layers_are_counted_as_torch_runs_them(image_size: int, stem_stride: int) -> None:
    model = BNext(7, widths=TOY, stem_stride=stem_stride)
    assert_counted_as_executed(operations(model.architecture, image_size), model, image_size)


@pytest.mark.parametrize("elm", [True, False])
@pytest.mark.parametrize("recoupling", [True, False])
def test_ablations_are_counted_as_torch_runs_them(elm: bool, recoupling: bool) -> None:
    model = BNext(7, widths=(4, 8, 8), elm_attention=elm, infor_recoupling=recoupling)
    counted = operations(model.architecture, 9)
    assert_counted_as_executed(counted, model, 9)
    assert counted.parameters.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_every_parameter_is_counted_once(size: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = BNext(num_classes, size)
    found = operations(model.architecture, 32).parameters
    modules = dict(model.named_modules())
    binary = sum(module.weight.numel() for module in modules.values() if isinstance(module, BinaryConv2d))
    weights = sum(
        module.weight.numel() for module in modules.values() if isinstance(module, nn.Conv2d | nn.Linear)
    )
    assert (found.binary, found.weights) == (binary, weights)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())


def test_tiny_is_counted_as_torch_runs_it() -> None:
    model = BNext(10, "tiny")
    assert_counted_as_executed(operations(model.architecture, 31), model, 31)


def test_quantizing_changes_what_computes_the_rest_and_not_how_much() -> None:
    model = BNext(7, widths=TOY)
    counted = operations(model.architecture, 16)
    prepare(model, Quantization())
    assert counted.parameters.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.float_macs == counted.int8_macs
    assert counted.float_rest_ops - counted.ops == counted.int8_macs * 7 / 8


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(QuantizationError, match="image_size 0: need at least 1 pixel"):
        operations(Architecture.of("tiny", 10), 0)
