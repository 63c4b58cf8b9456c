"""The fake-quantized twins: their constants, and their integers against float64 and the training path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_images
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    MEAN,
    STD,
    float_network,
    lowered,
    make_extreme,
    on_grid,
    pixels,
    placed,
    quantization,
    torch_problems,
    trunk_outputs,
)
from networks import toy as random_toy
from rounding_bounds import assert_within, sum_bound
from torch import Tensor, nn

from qat.bnext import BNext, set_temperature
from qat.data import image_grid
from qat.dyadic import LARGEST_SHIFT
from qat.fakequant import ActivationQuantizer, activation_quantizers, freeze_observers
from qat.folding import (
    folded_constants,
    gain_scale,
    largest_gain_step,
    product_scale,
    quantized_slope,
    slope_scale,
)
from qat.fused import fold_batch_norm
from qat.layers import pool2x2
from qat.precision import autocast
from qat.prepare import prepare
from qat.recipe import Group, Quantization, StemGroup, TrunkGroup
from qat.twins import FakeQuantSubBlock

POSITIVE = st.floats(2.0**-13, 2.0**13, width=32)
#: As wide as real networks begin: at 8 channels one product is worth so many steps of ``y`` that the integer
#: bias, a multiple of 1/64 product, misses the offset by up to a quarter of a step.
WIDE = (64, 64, 128)
ABLATIONS = [
    {"elm_attention": elm, "infor_recoupling": recoupling}
    for elm in (True, False)
    for recoupling in (True, False)
]


def sub_blocks(model: nn.Module) -> dict[str, FakeQuantSubBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantSubBlock)}


# --- the integers against float64 ------------------------------------------------------------------------


def put(values: Tensor, point: nn.Module, scale: Tensor | None = None) -> Tensor:
    """float64 values on the grid of ``point`` (or with its integers and another ``scale``)."""
    step = (point.scale if scale is None else scale).double()
    return torch.clamp(torch.round(values / step), point.quant_min, point.quant_max) * step


def affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, norm.running_mean.double(), norm.running_var.double(), norm.weight.double(), norm.bias.double(),
        eps=norm.eps,
    )  # fmt: skip


def attention_formula(module: nn.Module, m: Tensor) -> Tensor:
    def linear(x: Tensor, layer: nn.Conv2d) -> Tensor:
        weight = layer.weight.double()
        step = (weight.abs().amax((1, 2, 3), keepdim=True) / module.weight_quantizer.quant_max).clamp_min(
            1e-30
        )
        return F.conv2d(x, torch.round(weight / step) * step, layer.bias.double())

    hidden = put(linear(put(m, module.pooled), module.se[1]), module.hidden)
    return put(torch.sigmoid(put(linear(hidden, module.se[3]), module.logits)), module.attention)


def sub_block_formula(block: FakeQuantSubBlock, x: Tensor) -> Tensor:
    """The formulas of the module's docstring, in float64."""
    source, target = block.source.quantizer, block.target.quantizer
    slopes = [quantized_slope(prelu.weight).double() for prelu in (block.activation1, block.activation2)]
    signs = torch.where(x + block.move.bias.double() >= 0, 1.0, -1.0).double()
    weight = torch.where(block.binary_conv.weight >= 0, 1.0, -1.0).double()
    acc = F.conv2d(signs, weight, stride=block.stride, padding=block.kernel_size // 2)
    y = put(F.prelu(put(affine(block.norm1, acc), block.y), slopes[1]), block.y)
    residual = put(F.prelu(x, slopes[0]), source) if block.kind == "scale" else x
    even = x
    if block.stride == 2:
        even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
        # In steps: a quarter of the means lies between two integers, and scaling would round those anyhow.
        steps = torch.round(residual / source.scale.double())
        residual = torch.round(pool2x2(steps)) * source.scale.double()
    if not block.has_branch:
        return put(y + residual, target)
    gain, _ = folded_constants(block.norm2)
    offset = (block.norm2.bias.double() - gain * block.norm2.running_mean.double()).view(1, -1, 1, 1)
    attention = torch.ones(1, 1, 1, 1).double()
    if block.infor_recoupling:
        mix = block.scale.double().clamp(0, 1)
        m = mix * even.mean((2, 3), keepdim=True) + (1 - mix) * y.mean((2, 3), keepdim=True)
        attention = attention_formula(block.se, m)
    step = block.gain_step(gain).double()
    g = torch.clamp(torch.round(attention * gain.view(1, -1, 1, 1) / step), -128, 127) * step
    t = g * y
    if block.kind == "scale":
        t = put(t, block.product, block.product_step()) * residual
    branch = put(put(t, block.branch) + put(offset, block.branch), block.branch)
    return put(branch + residual, target)


def assert_nearly_equal(
    found: Tensor, expected: Tensor, step: Tensor, what: str, most: int = 8, share: float = 0.95
) -> None:
    """At least ``share`` equal, all but two in a thousand at most 3 steps apart, never more than ``most``.

    One step of the pooled vector may be several of the attention, and so of what it multiplies.
    """
    apart = ((found.double() - expected.double()) / step.double()).abs().round()
    assert (apart == 0).double().mean() >= share, what
    assert (apart > 3).double().mean() <= 2e-3, what
    assert apart.max() <= most, what


def inputs(model: BNext, side: int = 7, count: int = 8) -> dict[str, Tensor]:
    """Input of each sub-block that random images give: on the trunk's grid."""
    found: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, args, _o, name=name: found.__setitem__(name, args[0]))
        for name, block in sub_blocks(model).items()
    ]
    with torch.no_grad():
        model(pixels(11, count, 2 * side))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("trunk", [4, 8])
def test_a_sub_block_s_integers_follow_its_formula_in_float64(options: dict[str, bool], trunk: int) -> None:
    model = random_toy(1, quantization(trunk=trunk), widths=WIDE, **options)
    seen = inputs(model)
    kinds = set()
    for name, block in sub_blocks(model).items():
        out = block(seen[name])
        expected = sub_block_formula(block, seen[name].double())
        assert_nearly_equal(out, expected, block.target.quantizer.scale, name)
        kinds.add((block.kind, block.kernel_size, block.stride))
    assert {("bias", 1, 1), ("bias", 3, 1)} <= kinds
    assert any(stride == 2 for _, _, stride in kinds)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_stem_s_integers_follow_its_formula_in_float64(stride: int, bits: int) -> None:
    stem = random_toy(2, quantization(stem_weight=bits), stem_stride=stride).feature[0]
    images = pixels(3, 8, 15)
    weight = stem.conv1.weight.double()
    step = weight.abs().amax((1, 2, 3), keepdim=True) / stem.weight_quantizer.quant_max
    image, zero = stem.image.scale.double(), stem.image.zero_point
    x = (torch.clamp(torch.round(images.double() / image) + zero, 0, 255) - zero) * image
    acc = F.conv2d(x, torch.round(weight / step) * step, stride=stride, padding=1)
    expected = put(affine(stem.bn1, acc), stem.trunk)
    assert_nearly_equal(stem(images), expected, stem.trunk.scale, "stem", most=1)
    assert len((expected / stem.trunk.scale).round().unique()) > 100


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_s_integers_follow_its_formula_in_float64(bits: int) -> None:
    model = random_toy(3, quantization(classifier=bits, fc_weight=bits))
    point = model.feature[-1].trunk_out
    x = model.feature(pixels(1, 16, 16))
    curved = put(F.prelu(x.double(), quantized_slope(model.prelu.weight).double()), point)
    assert_nearly_equal(model.prelu(x), curved, point.scale, "prelu", most=1)
    pooled = put(curved.mean((2, 3)), model.fc.input)
    assert_nearly_equal(model.pool(model.prelu(x)), pooled, model.fc.input.scale, "pool", most=1)
    weight = model.fc.weight.double()
    step = weight.abs().amax(1, keepdim=True) / model.fc.weight_quantizer.quant_max
    logits = F.linear(pooled, torch.round(weight / step) * step, model.fc.bias.double())
    # The bias is an integer of the accumulator: half a unit of it may be missing. Behind the exact sums there
    # is one product, with a factor of two scales, one of which is a quotient.
    half = step.flatten() * model.fc.input.scale / 2
    assert_within(model.fc(pooled.float()), logits, half + sum_bound(logits.abs() + half, 4, torch.float32))


# --- the integers against the training path --------------------------------------------------------------


def in_training(module: nn.Module, x: Tensor) -> Tensor:
    """What training computes, with frozen grids and running statistics."""
    freeze_observers(module)
    module.train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    out: Tensor = module(x)
    module.eval()
    return out


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.exhaustive), 8])
def test_training_and_integers_agree_to_within_rounding_on_each_sub_block(
    options: dict[str, bool], bits: int
) -> None:
    model = random_toy(5, quantization(trunk=bits, se=bits), widths=WIDE, **options)
    seen = inputs(model)
    for name, block in sub_blocks(model).items():
        target = block.target.quantizer
        trained = target.requantize(in_training(block, seen[name]))
        # Training breaks the ties of a 2×2 mean, one in four, by float32 rounding; integers go to even.
        share = 0.85 if block.stride == 2 else 0.95
        assert_nearly_equal(block(seen[name]), trained, target.scale, name, share=share)


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_on_a_power_of_two_grid_training_and_integers_break_pooling_s_ties_alike(
    options: dict[str, bool],
) -> None:
    model = random_toy(5, widths=WIDE, **options)
    block = next(block for block in sub_blocks(model).values() if block.stride == 2)
    source, target = block.source.quantizer, block.target.quantizer
    source.scale.copy_(torch.exp2(torch.log2(source.scale).round()))
    x = source.requantize(torch.randn(8, block.channels, 7, 6, generator=torch.Generator().manual_seed(0)))
    trained = target.requantize(in_training(block, x))
    assert_nearly_equal(block(x), trained, target.scale, str(options), share=0.97)


@torch.no_grad()
def test_training_and_integers_agree_to_within_rounding_on_stem_and_head() -> None:
    model = random_toy(5)
    images = pixels(4, 16, 16)
    stem = model.feature[0]
    assert_nearly_equal(in_training(stem, images), stem(images), stem.trunk.scale, "stem", most=1)
    x = model.feature(images)
    point = model.feature[-1].trunk_out
    assert_nearly_equal(in_training(model.prelu, x), model.prelu(x), point.scale, "prelu", most=1)
    x = model.prelu(x)
    pooled = model.fc.input.requantize(in_training(model.pool, x))
    assert_nearly_equal(pooled, model.pool(x), model.fc.input.scale, "pool", most=1)
    # Integers lack up to half a unit of the bias; training adds products of rounded weights, and the bias.
    weight, grid = model.fc.weight, model.fc.weight_quantizer
    magnitudes = F.linear(pooled.abs(), grid(weight).abs(), model.fc.bias.abs()).double()
    unit = weight.abs().amax(1).double() / grid.quant_max * model.fc.input.scale
    bound = unit / 2 + sum_bound(magnitudes + unit, weight.shape[1] + 8, torch.float32)
    assert_within(in_training(model.fc, pooled), model.fc(pooled), bound)


# --- when integers are computed --------------------------------------------------------------------------


def integer_modules(model: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the modules that asked for their integer constants during one forward pass."""
    asked: set[str] = set()
    with monkeypatch.context() as patch:
        for name, module in model.named_modules():
            attribute = "multiplier" if name == "pool" else "integers"
            method = getattr(module, attribute, None)
            if method is None or name.endswith("weight_quantizer"):
                continue

            def spy(name: str = name, method: Callable[[], Any] = method) -> object:
                asked.add(name)
                return method()

            patch.setattr(module, attribute, spy)
        model(images)
    return asked


def everything(model: BNext) -> set[str]:
    names = set(sub_blocks(model)) | {"feature.0", "pool", "fc"}
    return names | {f"{name}.se" for name in sub_blocks(model)}


def test_evaluation_computes_integers_and_training_does_not(
    toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert integer_modules(toy, images, monkeypatch) == everything(toy)
    assert integer_modules(toy.train(), images, monkeypatch) == set()
    assert integer_modules(toy.eval(), images, monkeypatch) == everything(toy)


def test_an_uncalibrated_network_computes_no_integers_nor_does_calibration(
    float_toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = copy.deepcopy(float_toy)
    model = prepare(float_toy, Quantization(stem=StemGroup(enabled=False)))
    assert integer_modules(model, images, monkeypatch) == set()
    for _, point in activation_quantizers(model):
        point.start_calibration()
    assert integer_modules(model, images, monkeypatch) == set()
    for _, point in activation_quantizers(model):
        point.finish_calibration()
    assert integer_modules(model, images, monkeypatch) == everything(model) - {"feature.0"}
    assert not torch.equal(model(images), reference(images))


#: A point that is not calibrated, and the modules that then don't compute integers.
MISSING = [
    ("feature.0.trunk", {"feature.0", "feature.1.Attention"}),
    ("feature.1.trunk_mid", {"feature.1.Attention", "feature.1.FFN"}),
    ("feature.4.trunk_out", {"feature.4.FFN_1", "feature.4.FFN_2", "pool"}),
    ("feature.2.Attention.y", {"feature.2.Attention"}),
    ("feature.2.Attention.product", {"feature.2.Attention"}),
    ("feature.2.Attention.branch", {"feature.2.Attention"}),
    ("feature.3.FFN.se.pooled", {"feature.3.FFN"}),
    ("feature.3.FFN.se.hidden", {"feature.3.FFN"}),
    ("feature.3.FFN.se.logits", {"feature.3.FFN"}),
    ("fc.input", {"pool", "fc"}),
]


@pytest.mark.parametrize(("point", "modules"), MISSING)
def test_one_unknown_grid_leaves_the_modules_that_need_it_in_float(
    point: str, modules: set[str], toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = toy.get_submodule(point)
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.calibrated = False
    gone = modules | {f"{name}.se" for name in modules & set(sub_blocks(toy))}
    assert integer_modules(toy, images, monkeypatch) == everything(toy) - gone
    assert toy(images).isfinite().all()


def test_weights_that_are_not_binary_yet_leave_their_sub_blocks_in_float(
    toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_temperature(toy, 1e-3)
    assert integer_modules(toy, images, monkeypatch) == {"feature.0", "pool", "fc"}


def test_evaluating_with_gradients_enabled_gives_the_same_numbers_without_a_warning(
    toy: BNext, images: Tensor
) -> None:
    with torch.enable_grad():
        found = toy(images.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(found, toy(images))


# --- networks partly left in float -----------------------------------------------------------------------

PARTLY = [
    Quantization(stem=StemGroup(enabled=False)),
    Quantization(se=Group(enabled=False)),
    Quantization(classifier=Group(enabled=False)),
    Quantization(trunk=TrunkGroup(enabled=False)),
    Quantization(exclude=["feature.2.*"]),
    Quantization(exclude=["*.trunk_mid", "prelu"]),
    Quantization(include=["feature.1.*", "fc"]),
]


@torch.no_grad()
@pytest.mark.parametrize("bits", PARTLY, ids=range(len(PARTLY)))
def test_a_network_partly_left_in_float_evaluates_repeatably_and_from_its_state(bits: Quantization) -> None:
    model = random_toy(6, bits)
    images = pixels(2, 8, 13)
    logits = model(images)
    assert logits.isfinite().all()
    model(3 * images.flip(0))
    assert torch.equal(model(images), logits)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    twin = prepare(float_network(99), bits, image_grid(MEAN, STD)).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images), logits)


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_a_restored_state_gives_equal_outputs_and_equal_integers(options: dict[str, bool]) -> None:
    bits = quantization(trunk=6, se=5)
    model = random_toy(7, bits, **options)
    twin = prepare(float_network(98, **options), bits).eval()
    twin.load_state_dict(model.state_dict())
    images = pixels(2, 8, 17)
    assert torch.equal(twin(images), model(images))
    assert list(torch_problems(twin, lowered(model), images.numpy(), sub_blocks=True)) == []


def test_a_training_step_after_evaluating_sees_no_constant_of_before(toy: BNext, images: Tensor) -> None:
    before = toy(images)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.mul_(1.1)
    after = toy(images)
    assert not torch.equal(after, before)
    assert torch.equal(copy.deepcopy(toy)(images), after)


# --- types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", [False, True])
def test_an_integer_network_gives_the_same_logits_within_autocast(
    toy: BNext, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a teacher that was quantized, in a training in bfloat16."""
    monkeypatch.setattr("qat.widened.lacks_bfloat16", lambda: lacks)
    images = toy_images(2)
    with torch.no_grad():
        alone = toy(images)
        with autocast("bfloat16", torch.device("cpu")):
            assert torch.equal(toy(images), alone)


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("extreme", [False, True])
def test_a_bfloat16_network_computes_the_integers_of_its_parameters_in_float32(
    options: dict[str, bool], extreme: bool
) -> None:
    model = random_toy(8, **options)
    if extreme:
        make_extreme(model, 8)
    half = model.to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    images = pixels(3, 8, 15).bfloat16()
    ours, theirs = trunk_outputs(half, images), trunk_outputs(full, images.float())
    # bfloat16 tells 256 integers of a grid apart: its values are the float32 ones, rounded.
    for name, values in ours.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, theirs[name].bfloat16()), name
    # They are lowered alike, and that is the network in float32.
    assert list(torch_problems(full, lowered(half), images.float().numpy(), sub_blocks=True)) == []


@torch.no_grad()
def test_sub_blocks_give_the_same_integers_for_an_input_in_bfloat16() -> None:
    model = random_toy(9)
    for sub, source, _ in placed(lowered(model)):
        block = sub_blocks(model)[sub.name]
        x = torch.from_numpy(on_grid(source, (2, block.channels, 6, 5))).float() * source.scale
        assert torch.equal(block(x).bfloat16(), block(x.bfloat16()))


# --- folded batch normalization ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 1, 2)])
def test_a_folded_batch_norm_equals_torch_in_values_and_gradients(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(3, generator=random, dtype=torch.float64) + 0.2)
    ours = copy.deepcopy(norm)
    x = (3 * torch.randn(shape, generator=random, dtype=torch.float64) + 1).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    incoming = torch.randn(shape, generator=random, dtype=torch.float64)

    gain, offset = fold_batch_norm(ours)
    assert gain.shape == offset.shape == (3,)
    expected, found = norm(x), gain.view(-1, 1, 1) * twin + offset.view(-1, 1, 1)
    expected.backward(incoming)
    found.backward(incoming)

    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twin.grad, x.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours.weight.grad, norm.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.bias.grad, norm.bias.grad, rtol=1e-9, atol=1e-9)


# --- exact constants -----------------------------------------------------------------------------------


def assert_few_bits(ratio: float) -> None:
    """``ratio``, up to float32 rounding, is a number of at most 10 significant bits."""
    mantissa, _ = math.frexp(ratio)
    assert abs(mantissa * 1024 - round(mantissa * 1024)) < 1024 * 2**-21


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6))
def test_slopes_lie_on_an_8_bit_grid_of_the_smallest_power_of_two(slopes: list[float]) -> None:
    slope = torch.tensor(slopes)
    scale = slope_scale(slope).item()
    assert math.frexp(scale)[0] == 0.5
    assert scale >= 2.0**-14
    assert max(map(abs, slopes)) <= 127 * scale
    assert scale == 2.0**-14 or max(map(abs, slopes)) > 127 * scale / 2 * (1 - 1e-6)
    on_grid = quantized_slope(slope)
    assert torch.equal(on_grid / scale, (on_grid / scale).round())
    assert (on_grid - slope).abs().max() <= scale / 2


def test_slopes_pass_their_gradient_straight_through() -> None:
    slope = torch.tensor([-0.3, 0.0, 0.25, 1.0], requires_grad=True)
    quantized_slope(slope).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert slope.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=4), POSITIVE, POSITIVE)
def test_the_gain_s_grid_holds_it_and_reaches_the_product_in_few_bits(
    gains: list[float], y: float, product: float
) -> None:
    gain = torch.tensor(gains).view(1, -1, 1, 1)
    y_scale, product_step = torch.tensor(y), torch.tensor(product)
    scale = gain_scale(largest_gain_step(gain), y_scale, product_step)
    largest = max(gain.abs().max().item(), 1e-20)
    # By 10 bits, or by one unit of the largest shift where the multiplier is tiny.
    unit = 2.0**-LARGEST_SHIFT * product_step.item() / y_scale.item()
    assert largest / 127 * (1 - 1e-6) <= scale.item() <= (largest / 127 * (1 + 2**-9) + unit) * (1 + 1e-6)
    if largest > 1e-12:
        assert_few_bits(scale.item() * y_scale.item() / product_step.item())


@given(POSITIVE, POSITIVE, POSITIVE)
def test_the_product_s_grid_is_raised_a_little_and_reaches_the_branch_in_few_bits(
    product: float, residual: float, branch: float
) -> None:
    scales = torch.tensor(product), torch.tensor(residual), torch.tensor(branch)
    found = product_scale(*scales).item()
    unit = 2.0**-LARGEST_SHIFT * scales[2].item() / scales[1].item()
    assert scales[0].item() * (1 - 1e-6) <= found <= (scales[0].item() * (1 + 2**-9) + unit) * (1 + 1e-6)
    assert_few_bits(found * scales[1].item() / scales[2].item())


def test_the_multipliers_of_a_calibrated_network_have_few_bits(toy: BNext) -> None:
    for block in sub_blocks(toy).values():
        assert isinstance(block, FakeQuantSubBlock)
        gain, _ = fold_batch_norm(block.norm2)
        step = block.branch.scale
        if block.kind == "scale":
            step = block.product_step()
            assert_few_bits(float(step * block.source.quantizer.scale / block.branch.scale))
        assert_few_bits(float(block.gain_step(gain) * block.y.scale / step))
