"""BNext: its sizes and options, and which of them are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qat.errors import QuantizationError
from qat.models.bnext import WIDTHS, Architecture, BNext, binary_convolutions, is_binary, set_temperature
from qat.nn.layers import BinaryConv2d
from tests.helpers.cases import combinations, exhaustive, slow
from tests.helpers.toy_networks import ABLATIONS

FULL = ABLATIONS[0]


@pytest.mark.parametrize(
    ("size", "binary", "other"),
    [
        ("tiny", 28_253_184, 2_609_052),
        ("small", 63_569_664, 5_024_950),
        ("middle", 126_238_464, 8_263_510),
        ("large", 308_310_016, 18_236_624),
    ],
)
def test_a_published_size_has_its_published_parameter_counts(size: str, binary: int, other: int) -> None:
    with torch.device("meta"):
        model = BNext(size=size)
    convolutions = binary_convolutions(model)
    counted = sum(convolution.weight.numel() for convolution in convolutions.values())
    assert counted == binary
    assert sum(parameter.numel() for parameter in model.parameters()) - counted == other


@pytest.mark.parametrize(
    ("size", "ablation"),
    [
        # Each size, and each ablation of the smallest; the others are slow or exhaustive.
        (pytest.param if size == "tiny" else slow if ablation == FULL else exhaustive)(size, ablation)
        for size in WIDTHS
        for ablation in ABLATIONS
    ],
    ids=str,
)
def test_every_size_and_ablation_computes_logits(size: str, ablation: dict[str, bool]) -> None:
    with torch.device("meta"):
        model = BNext(7, size, **ablation)
        images = torch.empty(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.temperature = torch.ones(1)  # its value decides the branch, so it has to have one
    assert model(images).shape == (2, 7)


def block_kinds(model: BNext) -> list[tuple[str, str]]:
    """(name of the 3×3 sub-block, its kind) of each block."""
    return [
        (block.spatial_name, block.get_submodule(block.spatial_name).kind)
        for block in list(model.feature)[1:]
    ]


def test_the_3x3_sub_blocks_alternate_between_bias_and_scale(make_float_toy: Callable[..., BNext]) -> None:
    model = make_float_toy()
    assert block_kinds(model) == [("Attention", "bias"), ("Attention", "scale")] * 2


def test_without_elm_attention_every_3x3_sub_block_is_of_the_bias_kind(
    make_float_toy: Callable[..., BNext],
) -> None:
    model = make_float_toy(elm_attention=False)
    assert block_kinds(model) == [("FFN_3x3", "bias")] * 4


def test_without_recoupling_there_is_no_attention_and_no_mix_scale(
    make_float_toy: Callable[..., BNext],
) -> None:
    with_it, without = make_float_toy().state_dict(), make_float_toy(infor_recoupling=False).state_dict()
    gone = with_it.keys() - without.keys()
    assert without.keys() <= with_it.keys()
    assert gone == {key for key in with_it if ".se." in key or key.endswith(".scale")}
    assert gone


def test_a_block_doubles_by_two_pointwise_sub_blocks_on_one_input(float_toy: BNext, images: Tensor) -> None:
    x = float_toy.feature[0](images)
    x = float_toy.feature[1](x)
    block = float_toy.feature[2]
    assert block.pointwise_names == ("FFN_1", "FFN_2")
    middle = block.Attention(x)
    expected = torch.cat([block.FFN_1(middle), block.FFN_2(middle)], 1)
    assert torch.equal(block(x), expected)
    assert float_toy.feature[1].pointwise_names == ("FFN",)


@pytest.mark.parametrize(
    ("num_classes", "stem_stride", "expected"), [(1000, None, 2), (10, None, 1), (1000, 1, 1), (10, 2, 2)]
)
def test_the_stem_has_stride_2_at_1000_classes_unless_told(
    num_classes: int, stem_stride: int | None, expected: int
) -> None:
    model = BNext(num_classes, widths=(4, 4), stem_stride=stem_stride)
    assert model.architecture.stem_stride == expected
    assert model.feature[0](torch.randn(2, 3, 12, 12)).shape == (2, 4, 12 // expected, 12 // expected)


@combinations({"quantized": [False, True], "side": [(1, 1), (7, 7), (15, 13), (9, 16), (33, 31)]})
def test_odd_and_oblong_images_have_logits(
    side: tuple[int, int], quantized: bool, float_toy: BNext, toy: BNext
) -> None:
    logits = (toy if quantized else float_toy)(torch.randn(2, 3, *side))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("widths", [(4, 4), (4, 8), (4, 8, 8, 16)])
def test_widths_that_stay_or_double_are_accepted(widths: tuple[int, ...]) -> None:
    assert Architecture.of(widths=widths).widths == widths


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 12), "12 after 4"),
        ((8, 4), "4 after 8"),
        ((4, 8, 9), "9 after 8"),
        ((4,), "at least two"),
        ((), "at least two"),
        ((0, 0), "positive"),
        ((-4, -8), "positive"),
    ],
)
def test_other_widths_are_refused(widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BNext(10, widths=widths)


@pytest.mark.parametrize(("size", "meant"), [("tini", "tiny"), ("Large", "large"), ("midle", "middle")])
def test_an_unknown_size_names_the_nearest_one(size: str, meant: str) -> None:
    with pytest.raises(QuantizationError, match=f"did you mean '{meant}'"):
        BNext(10, size)


def test_a_size_like_none_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(QuantizationError, match=r"tiny, small, middle, large$"):
        Architecture.of("xyzzy")


def test_a_network_needs_a_class() -> None:
    assert Architecture.of(num_classes=1).num_classes == 1
    with pytest.raises(QuantizationError, match="num_classes 0"):
        Architecture.of(num_classes=0)


def test_an_architecture_knows_its_size_and_rebuilds_its_network(float_toy: BNext, images: Tensor) -> None:
    assert Architecture.of("small").size == "small"
    assert float_toy.architecture.size == "custom"
    copy = BNext.from_architecture(float_toy.architecture).eval()
    copy.load_state_dict(float_toy.state_dict())
    assert torch.equal(copy(images), float_toy(images))


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_an_ablated_architecture_rebuilds_its_network(ablation: dict[str, bool]) -> None:
    model = BNext(10, widths=(4, 8), stem_stride=2, **ablation)
    copy = BNext.from_architecture(model.architecture)
    assert copy.architecture == model.architecture
    assert copy.state_dict().keys() == model.state_dict().keys()


def test_one_warm_convolution_makes_a_network_not_binary(float_toy: BNext) -> None:
    assert is_binary(float_toy)
    next(iter(binary_convolutions(float_toy).values())).temperature.fill_(0.5)
    assert not is_binary(float_toy)
    set_temperature(float_toy, 1e-8)
    assert is_binary(float_toy)
