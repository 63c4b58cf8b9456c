from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import WIDTHS, Architecture, BNext, binary_convolutions, is_binary, set_temperature
from qat.nn.layers import (
    BinaryActivation,
    BinaryConv2d,
    LearnableBias,
    SqueezeExcitation,
    Stem,
    pool2x2,
    spatial_mean,
)
from qat.nn.sub_block import SubBlock
from tests.helpers import golden_numbers as golden

GOLDEN = golden.load()
TRAINED = [case for case in GOLDEN.cases if "train_loss" in case]
#: Agreement with the authors' code in float64, relative.
TOLERANCE = 1e-9

ABLATIONS = [
    {"elm_attention": elm, "infor_recoupling": recoupling}
    for elm in (True, False)
    for recoupling in (True, False)
]
FULL = ABLATIONS[0]


@pytest.fixture(scope="module")
def known() -> dict[Any, Tensor]:
    """Values drawn so far, shared by the networks of this file."""
    return {}


def filled(case: dict[str, Any], known: dict[Any, Tensor]) -> BNext:
    with torch.device("meta"):
        model = BNext(case["num_classes"])
    model = model.to_empty(device="cpu").double()
    golden.fill(model, case["temperature"], known)
    return model


def assert_close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=TOLERANCE, atol=1e-11
    )


# --- agreement with the authors' network ---------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda c: f"{c['num_classes']}-{c['temperature']}")
def test_evaluation_logits_equal_the_authors(case: dict[str, Any], known: dict[Any, Tensor]) -> None:
    model = filled(case, known).eval()
    with torch.no_grad():
        logits = model(golden.images(case["num_classes"]))
    assert logits.shape == (2, case["num_classes"])
    assert_close(logits[:, : len(case["eval_logits"][0])], case["eval_logits"])


@pytest.mark.parametrize("case", TRAINED, ids=lambda c: str(c["temperature"]))
def test_a_training_step_equals_the_authors_in_every_gradient(
    case: dict[str, Any], known: dict[Any, Tensor]
) -> None:
    model = filled(case, known).train()
    logits = model(golden.images(case["num_classes"]))
    loss = logits.square().mean()
    loss.backward()

    assert_close(logits, case["train_logits"])
    assert_close(loss, case["train_loss"])
    expected = GOLDEN.gradients[case["temperature"]]
    found = {
        name: None if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
    }
    assert found.keys() == expected.keys()
    wrong = {
        name: (norm, expected[name])
        for name, norm in found.items()
        if (norm is None) != (expected[name] is None)
        or (norm is not None and not math.isclose(norm, expected[name], rel_tol=TOLERANCE))
    }
    assert wrong == {}


def test_the_golden_file_holds_gradients_and_parameters_without_one() -> None:
    for norms in GOLDEN.gradients.values():
        missing = [name for name, norm in norms.items() if norm is None]
        assert len(norms) == 410
        assert "feature.0.prelu.weight" in missing
        assert all(name.rsplit(".", 2)[1] in ("prelu", "activation1") for name in missing)
        assert all(norm > 0 for norm in norms.values() if norm is not None)


def test_tiny_has_the_authors_state_dict() -> None:
    with torch.device("meta"):
        model = BNext()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == GOLDEN.shapes
    assert len(GOLDEN.shapes) == 661


def test_another_class_count_changes_the_classifier_alone() -> None:
    with torch.device("meta"):
        state = BNext(10).state_dict()
    differ = {key for key, value in state.items() if tuple(value.shape) != GOLDEN.shapes[key]}
    assert state.keys() == GOLDEN.shapes.keys()
    assert differ == {"fc.weight", "fc.bias"}


# --- sizes and options ---------------------------------------------------------------------------------


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
        # Each size, and each ablation of the smallest.
        pytest.param(
            size, ablation, marks=[] if size == "tiny" or ablation == FULL else pytest.mark.exhaustive
        )
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


@pytest.mark.parametrize("side", [(1, 1), (7, 7), (15, 13), (9, 16), (33, 31)])
@pytest.mark.parametrize("quantized", [False, True])
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
    twin = BNext.from_architecture(float_toy.architecture).eval()
    twin.load_state_dict(float_toy.state_dict())
    assert torch.equal(twin(images), float_toy(images))


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_an_ablated_architecture_rebuilds_its_network(ablation: dict[str, bool]) -> None:
    model = BNext(10, widths=(4, 8), stem_stride=2, **ablation)
    twin = BNext.from_architecture(model.architecture)
    assert twin.architecture == model.architecture
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_one_warm_convolution_makes_a_network_not_binary(float_toy: BNext) -> None:
    assert is_binary(float_toy)
    next(iter(binary_convolutions(float_toy).values())).temperature.fill_(0.5)
    assert not is_binary(float_toy)
    set_temperature(float_toy, 1e-8)
    assert is_binary(float_toy)


# --- layers --------------------------------------------------------------------------------------------


def test_pooling_is_the_plain_2x2_mean_on_even_sides() -> None:
    x = torch.randn(2, 3, 6, 8)
    assert torch.equal(pool2x2(x), F.avg_pool2d(x, 2))


def test_pooling_repeats_the_last_row_and_column_of_odd_sides() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    assert pool2x2(x).flatten().tolist() == [1.5, 3.0]


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("kind", ["bias", "scale"])
def test_the_residual_fits_the_convolution_of_stride_2_at_any_side(side: int, kind: Any) -> None:
    out = SubBlock(8, 3, 2, kind).eval()(torch.randn(1, 8, side, side))
    assert out.shape[-2:] == (math.ceil(side / 2), math.ceil(side / 2))


def test_the_binary_convolution_pads_with_zeros_after_the_sign() -> None:
    convolution = BinaryConv2d(1, 3, 1).eval()
    convolution.temperature.fill_(1e-8)
    with torch.no_grad():
        convolution.weight.fill_(0.01)
    sums = convolution(torch.ones(1, 1, 3, 3))
    assert sums.flatten().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]


@pytest.mark.parametrize(("training", "frozen", "largest"), [(1, 0, 1.5), (0, 0, 4.0), (1, 1, 4.0)])
def test_latent_weights_are_clamped_only_while_they_train(
    training: bool, frozen: bool, largest: float
) -> None:
    convolution = BinaryConv2d(2, 1, 1).train(bool(training))
    with torch.no_grad():
        convolution.weight.fill_(-4.0)
    convolution.weight.requires_grad_(not frozen)
    convolution(torch.ones(1, 2, 2, 2))
    assert convolution.weight.abs().max() == largest


def test_the_mix_scale_is_used_in_0_to_1_and_kept_there_while_training() -> None:
    block = SubBlock(8, 1, 1, "bias")
    with torch.no_grad():
        block.scale.fill_(1.7)
    assert block.eval().mix_scale().eq(1).all()
    assert block.scale.eq(block.scale.new_tensor(1.7)).all()
    block.train().mix_scale()
    assert block.scale.eq(1).all()


def test_the_bias_moves_and_the_activation_temperature_does_nothing() -> None:
    move, activation = LearnableBias(2), BinaryActivation()
    with torch.no_grad():
        move.bias[0, 1] = -3.0
    activation.temperature.fill_(0.1)
    assert activation(move(torch.full((1, 2, 1, 1), 2.0))).flatten().tolist() == [1.0, -1.0]


@pytest.mark.parametrize(("channels", "hidden"), [(64, 8), (8, 1), (4, 1)])
def test_channel_attention_reduces_by_eight_to_at_least_one(channels: int, hidden: int) -> None:
    attention = SqueezeExcitation(channels)
    assert attention.se[1].weight.shape == (hidden, channels, 1, 1)
    result = attention(torch.randn(2, channels, 1, 1))
    assert result.shape == (2, channels, 1, 1)
    assert ((result > 0) & (result < 1)).all()


def live(block: SubBlock) -> SubBlock:
    """``block`` in float64 evaluation mode with parameters that all matter."""
    block = block.double().eval()
    with torch.no_grad():
        for index, tensor in enumerate([*block.parameters(), *block.buffers()]):
            if tensor.is_floating_point():
                random = torch.Generator().manual_seed(index)
                tensor.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64) * 0.8 + 0.1)
        block.binary_conv.weight.sub_(0.5)
        block.move.bias.sub_(0.5)
        block.binary_conv.temperature.fill_(1e-8)
    return block


def norm(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["bias", "scale"])
@pytest.mark.parametrize("recoupling", [True, False])
def test_a_sub_block_computes_its_formula(stride: int, kind: Any, recoupling: bool) -> None:
    block = live(SubBlock(8, 3, stride, kind, recoupling))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    pooled = F.avg_pool2d(x, 2) if stride == 2 else x
    weight = torch.sign(block.binary_conv.weight)
    y = F.conv2d(torch.sign(x + block.move.bias), weight, stride=stride, padding=1)
    y = F.prelu(norm(block.norm1, y), block.activation2.weight)
    attention = torch.ones(1, dtype=torch.float64)
    if recoupling:
        mixed = spatial_mean(block.scale * pooled + (1 - block.scale) * y)
        hidden = F.relu(F.conv2d(mixed, block.se.se[1].weight, block.se.se[1].bias))
        attention = torch.sigmoid(F.conv2d(hidden, block.se.se[3].weight, block.se.se[3].bias))
    if kind == "scale":
        residual = F.prelu(x, block.activation1.weight)
        residual = F.avg_pool2d(residual, 2) if stride == 2 else residual
        expected = norm(block.norm2, attention * y * residual) + residual
    elif recoupling:
        expected = norm(block.norm2, attention * y) + pooled
    else:
        expected = y + pooled
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_stem_ignores_its_prelu() -> None:
    stem = Stem(4, 1).eval()
    x = torch.randn(1, 3, 5, 5)
    before = stem(x)
    with torch.no_grad():
        stem.prelu.weight.fill_(9.0)
    assert torch.equal(stem(x), before)
    assert torch.equal(before, stem.bn1(stem.conv1(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "stem_stride 3"),
        ({"stem_stride": 0}, "stem_stride 0"),
        ({"num_classes": 2.5}, "whole numbers"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"widths": [8.0, 16]}, "whole numbers"),
    ],
)
def test_numbers_that_make_no_network_are_refused(options: dict[str, Any], message: str) -> None:
    assert Architecture.of("tiny", 10, stem_stride=2).stem_stride == 2
    with pytest.raises(QuantizationError, match=message):
        BNext(**options)
