from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import BNext, binary_convolutions, set_temperature
from qat.nn.sub_block import SubBlock
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer
from qat.quantize.calibration import freeze_observers
from qat.quantize.preparation import prepare, quantization_map
from qat.quantize.stem_and_head import FakeQuantStem
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup
from qat.report.layer_statistics import LayerStatistics, measure
from tests.helpers.cases import combinations

#: What a recipe may leave in float.
PARTS = {
    "everything": Quantization(),
    "as in the paper": Quantization(trunk=TrunkGroup(enabled=False)),
    "trunk alone": Quantization(
        stem=StemGroup(enabled=False), se=Group(enabled=False), classifier=Group(enabled=False)
    ),
    "without one block": Quantization(exclude=["feature.2.*"]),
}
EVERYTHING_AT_4_BITS = Quantization(
    stem=StemGroup(weight_bits=4),
    se=Group(weight_bits=4, activation_bits=4),
    classifier=Group(weight_bits=4, activation_bits=4),
    trunk=TrunkGroup(activation_bits=4),
)


def by_name(model: BNext, *batches: Tensor, start: BNext | None = None) -> dict[str, LayerStatistics]:
    return {found.name: found for found in measure(model, batches, start)}


def values_of(found: LayerStatistics) -> list[float]:
    """The numbers that are there, those of a binary convolution too."""
    optional = (found.clipped, found.sqnr, found.exact, found.flipped, found.positive)
    return [found.low, found.high, *(value for value in optional if value is not None)]


def sqnr(x: Tensor, q: Tensor) -> float:
    x, q = x.detach().double(), q.detach().double()
    return float(10 * torch.log10(x.square().sum() / (x - q).square().sum()))


# --- the numbers ---------------------------------------------------------------------------------------


def test_known_values_give_known_statistics(toy: BNext) -> None:
    image = toy.get_submodule("feature.0.image")
    assert isinstance(image, FixedQuantizer)
    step, zero = float(image.scale), int(image.zero_point)
    # A quarter of a step off the grid, but for two pixels: 10 steps above its end, and a third of a step.
    steps = torch.full((2, 3, 4, 4), 20.25)
    steps[0, 0, 0, 0], steps[1, 2, 3, 3] = 255 - zero + 10.0, 255 - zero + 1 / 3
    found = by_name(toy, steps * step)["feature.0.image"]
    assert (found.group, found.type, found.bits, found.weights) == ("stem", "uint8", 8, False)
    assert (found.scale_min, found.scale_max) == (step, step)
    assert (found.count, found.clipped) == (96, 1 / 96)
    assert (found.low, found.high) == pytest.approx((20.25 * step, (265 - zero) * step))
    signal = 94 * 20.25**2 + (265 - zero) ** 2 + (255 - zero + 1 / 3) ** 2
    assert found.sqnr == pytest.approx(10 * math.log10(signal / (94 / 16 + 100 + 1 / 9)), abs=1e-4)


def test_values_on_the_grid_are_exact(toy: BNext) -> None:
    image = toy.get_submodule("feature.0.image")
    assert isinstance(image, FixedQuantizer)
    steps = torch.arange(256.0).repeat(3).view(1, 3, 16, 16) - image.zero_point
    found = by_name(toy, steps * image.scale)["feature.0.image"]
    assert (found.sqnr, found.clipped) == (math.inf, 0.0)


def test_a_point_of_the_trunk_agrees_with_a_direct_computation(toy: BNext, images: Tensor) -> None:
    stem, trunk = toy.feature[0], toy.get_submodule("feature.0.trunk")
    assert isinstance(stem, FakeQuantStem)
    assert isinstance(trunk, ActivationQuantizer)
    trunk.scale.mul_(0.5)  # so that something is clipped
    weights, scales = stem.weight_quantizer.integers(stem.conv1.weight)
    convolved = F.conv2d(
        stem.image.steps(images) * stem.image.scale,
        (weights * scales.view(-1, 1, 1, 1)).float(),
        stride=stem.conv1.stride,
        padding=1,
    )
    with torch.no_grad():
        x = stem.bn1(convolved)
    q = torch.round(x / trunk.scale).clamp(-128, 127) * trunk.scale
    found = by_name(toy, images[:5], images[5:6], images[6:])["feature.0.trunk"]
    assert found.count == x.numel()
    assert (found.low, found.high) == pytest.approx((float(x.min()), float(x.max())), rel=1e-5)
    assert found.sqnr == pytest.approx(sqnr(x, q), abs=0.01)
    clipped = float(((x < -128.5 * trunk.scale) | (x > 127.5 * trunk.scale)).double().mean())
    assert clipped > 0
    assert found.clipped == pytest.approx(clipped, abs=2 / x.numel())


def test_weights_agree_with_a_direct_computation(make_toy: Callable[..., BNext], images: Tensor) -> None:
    toy = make_toy(Quantization(se=Group(weight_bits=4)))
    state = toy.state_dict()
    found = by_name(toy, images[:8], images[8:])
    for name, layers, bits, group in (
        ("feature.0", ["conv1"], 8, "stem"),
        ("fc", [""], 8, "classifier"),
        ("feature.3.Attention.se", ["se.1", "se.3"], 4, "se"),
    ):
        keys = [".".join(filter(None, (name, layer, "weight"))) for layer in layers]
        rows = [row for key in keys for row in state[key].flatten(1)]
        largest = 2 ** (bits - 1) - 1
        scales = [float(row.abs().max()) / largest for row in rows]
        rounded = [torch.round(row / scale) * scale for row, scale in zip(rows, scales, strict=True)]
        line = found[f"{name}.weight_quantizer"]
        assert line.weights
        assert (line.type, line.bits, line.group, line.clipped) == (f"int{bits}", bits, group, 0.0)
        assert (line.scale_min, line.scale_max) == pytest.approx((min(scales), max(scales)))
        # Counted once, however many batches there are.
        assert line.count == sum(row.numel() for row in rows)
        assert line.sqnr == pytest.approx(sqnr(torch.cat(rows), torch.cat(rounded)), abs=0.01)


def test_batches_of_any_size_give_the_same(toy: BNext, images: Tensor) -> None:
    together, apart = by_name(toy, images), by_name(toy, *(images[i : i + 3] for i in range(0, 16, 3)))
    assert together.keys() == apart.keys()
    for name, line in together.items():
        assert line.count == apart[name].count
        # A convolution of another batch size sums in another order, which may tip a value to the next step.
        assert values_of(line) == pytest.approx(values_of(apart[name]), rel=0.02, abs=1e-3)


def test_values_larger_than_a_chunk_are_all_counted(
    toy: BNext, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(toy, [images])
    monkeypatch.setattr("qat.report.layer_statistics._CHUNK", 1000)
    for line, whole in zip(measure(toy, [images]), expected, strict=True):
        assert (line.count, line.clipped) == (whole.count, whole.clipped)
        assert values_of(line) == pytest.approx(values_of(whole), rel=1e-9)


def test_eight_bits_lose_what_eight_bits_must(make_toy: Callable[..., BNext]) -> None:
    # Those that the toy is calibrated with: but for the image, whose grid is ImageNet's, hardly anything of
    # the trunk is clipped (calibration saw values that no rounding had moved).
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    eight = by_name(make_toy(), images)
    four = by_name(make_toy(EVERYTHING_AT_4_BITS), images)
    lost = []
    for name, line in eight.items():
        other = four[name].sqnr
        if line.sqnr is None or other is None or name == "feature.0.image":
            continue
        # A full-scale sine on 8 bits has 50 dB; the few values of a toy's attention can lie luckily.
        assert 20 < line.sqnr < 65, name
        if name.endswith(".gain"):  # of few values, with 8 bits in both
            assert line.clipped is not None
            assert line.clipped < 0.02, name
            continue
        lost.append(line.sqnr - other)
        if line.group == "trunk":
            assert line.clipped is not None
            assert line.clipped < 0.001, name
    assert min(lost) > 4
    # 6.02 dB for each bit.
    assert sum(lost) / len(lost) == pytest.approx(24.1, abs=2.5)


def test_a_scale_far_too_small_clips_at_that_layer(toy: BNext, images: Tensor) -> None:
    before = by_name(toy, images)
    point = toy.get_submodule("feature.2.Attention.y")
    assert isinstance(point, ActivationQuantizer)
    point.scale.mul_(0.05)
    after = by_name(toy, images)
    points = [line for line in after.values() if line.sqnr is not None]
    worst = min(points, key=lambda line: line.sqnr or 0.0)
    most_clipped = max(points, key=lambda line: line.clipped or 0.0)
    assert worst.name == most_clipped.name == "feature.2.Attention.y"
    assert most_clipped.clipped is not None
    assert most_clipped.clipped > 0.5
    # What lies before it saw the same values.
    upstream = [name for name in before if name.startswith(("feature.0.", "feature.1."))]
    assert upstream
    assert all(after[name] == before[name] for name in upstream)


def test_what_is_not_finite_is_shown_as_such(toy: BNext, images: Tensor) -> None:
    broken = images.clone()
    broken[0, 0, 0, 0] = math.nan
    found = by_name(toy, broken, images)["feature.0.image"]
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.sqnr is not None
    assert math.isnan(found.sqnr)
    assert found.count == 2 * images.numel()


# --- binary convolutions -------------------------------------------------------------------------------


def test_flipped_signs_are_counted_at_their_convolution(toy: BNext, float_toy: BNext, images: Tensor) -> None:
    assert all(line.flipped in (0.0, None) for line in by_name(toy, images, start=float_toy).values())
    name = "feature.2.FFN_1.binary_conv"
    weight = binary_convolutions(toy)[name].weight
    with torch.no_grad():
        weight.view(-1)[:5].neg_()
    for start in (float_toy, float_toy.state_dict()):
        found = {line.name: line.flipped for line in measure(toy, [images], start)}
        assert found.pop(name) == 5 / weight.numel()
        convolutions = set(binary_convolutions(toy)) - {name}
        assert {other for other, share in found.items() if share is not None} == convolutions
        assert all(found[other] == 0.0 for other in convolutions)


def test_the_sign_of_a_weight_of_zero_is_positive(toy: BNext, float_toy: BNext, images: Tensor) -> None:
    name = "feature.1.FFN.binary_conv"
    for model, value in ((toy, 0.0), (float_toy, 0.25)):
        with torch.no_grad():
            binary_convolutions(model)[name].weight.fill_(value)
    assert by_name(toy, images, start=float_toy)[name].flipped == 0.0


def test_without_a_start_nothing_is_said_about_flips(toy: BNext, images: Tensor) -> None:
    assert all(line.flipped is None for line in measure(toy, [images]))


def test_signs_of_the_input_agree_with_a_direct_computation(toy: BNext, images: Tensor) -> None:
    block = toy.get_submodule("feature.1.Attention")
    assert isinstance(block, SubBlock)
    with torch.no_grad():
        x = toy.feature[0](images) + block.move.bias
    found = by_name(toy, images)["feature.1.Attention.binary_conv"]
    assert (found.group, found.type, found.bits, found.weights) == ("binary", "1 bit", 1, False)
    assert (found.clipped, found.sqnr) == (None, None)
    assert found.count == x.numel()
    assert (found.low, found.high) == pytest.approx((float(x.min()), float(x.max())), abs=0.1)
    assert found.positive == pytest.approx(float((x >= 0).double().mean()), abs=0.01)
    with torch.no_grad():
        block.move.bias.fill_(1e6)
    assert by_name(toy, images)["feature.1.Attention.binary_conv"].positive == 1.0


def test_weights_that_are_not_yet_binary_are_found(toy: BNext, images: Tensor) -> None:
    name = "feature.2.Attention.binary_conv"
    assert by_name(toy, images)[name].exact == 1.0
    set_temperature(toy, 0.05)
    weight = binary_convolutions(toy)[name].weight
    expected = float((weight.abs() >= 0.05).double().mean())
    assert 0 < expected < 1
    assert by_name(toy, images)[name].exact == pytest.approx(expected)


# --- what is listed ------------------------------------------------------------------------------------


@combinations({"recoupling": [True, False], "part": list(PARTS)})
def test_every_line_of_the_quantization_map_is_measured(
    make_toy: Callable[..., BNext], images: Tensor, part: str, recoupling: bool
) -> None:
    model = make_toy(PARTS[part], infor_recoupling=recoupling)
    found = measure(model, [images])
    lines = quantization_map(model)
    assert [line.name for line in found if line.group != "binary"] == list(lines)
    assert all(line.type == lines[line.name]["type"] for line in found if line.group != "binary")
    assert [line.name for line in found if line.group == "binary"] == list(binary_convolutions(model))
    groups = {line.group for line in found}
    assert ("trunk" in groups) == PARTS[part].trunk.enabled
    assert ("stem" in groups) == PARTS[part].stem.enabled
    assert ("classifier" in groups) == PARTS[part].classifier.enabled
    assert ("se" in groups) == (recoupling and PARTS[part].se.enabled)
    assert all(line.count > 0 for line in found)


def test_a_float_network_has_binary_convolutions_alone(float_toy: BNext, images: Tensor) -> None:
    assert [line.name for line in measure(float_toy, [images])] == list(binary_convolutions(float_toy))


# --- the network is left as it was ---------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_network_is_left_as_it_was(toy: BNext, images: Tensor, frozen: bool, fails: bool) -> None:
    if frozen:
        freeze_observers(toy)
    toy.train()
    toy.feature[1].eval()
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.mul_(3.0)  # mix scales and latent weights beyond what training keeps them in
    modes = [module.training for module in toy.modules()]
    observing = [m.observing for m in toy.modules() if isinstance(m, ActivationQuantizer)]
    state = copy.deepcopy(toy.state_dict())

    def batches() -> Iterator[Tensor]:
        yield images
        if fails:
            raise KeyboardInterrupt
        yield images

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure(toy, batches())
    else:
        measure(toy, batches())
    after = toy.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], value) for key, value in after.items())
    assert [module.training for module in toy.modules()] == modes
    assert [m.observing for m in toy.modules() if isinstance(m, ActivationQuantizer)] == observing
    assert hooks(toy) == 0
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_an_error_inside_the_network_leaves_it_as_it_was(toy: BNext, images: Tensor) -> None:
    expected = toy(images)
    with pytest.raises(RuntimeError):
        measure(toy, [images, torch.zeros(1, 5, 16, 16)])
    assert hooks(toy) == 0
    assert not any(module.training for module in toy.modules())
    assert torch.equal(toy(images), expected)


def test_statistics_do_not_depend_on_the_mode_of_the_network(toy: BNext, images: Tensor) -> None:
    expected = measure(toy, [images])
    assert measure(toy.train(), [images]) == expected


def test_hooks_of_others_stay(toy: BNext, images: Tensor) -> None:
    calls = []
    modules = [m for m in toy.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    measure(toy, [images])
    seen = len(calls)
    assert seen >= len(modules)
    assert hooks(toy) == len(handles)


# --- refusals ------------------------------------------------------------------------------------------


def test_a_network_that_is_not_calibrated_is_refused(float_toy: BNext, images: Tensor) -> None:
    prepare(float_toy, Quantization())
    with pytest.raises(QuantizationError, match=r"feature\.0\.trunk: not calibrated \(\d+ points\)"):
        measure(float_toy, [images])


def test_no_images_are_refused(toy: BNext) -> None:
    with pytest.raises(QuantizationError, match="no images"):
        measure(toy, [])


def test_a_start_of_another_network_is_refused(
    toy: BNext, make_float_toy: Callable[..., BNext], images: Tensor
) -> None:
    never = chain([images], iter(lambda: pytest.fail("images were looked at before the start"), None))
    wider = make_float_toy(widths=(16, 16, 32, 32, 64))
    with pytest.raises(QuantizationError, match=r"feature\.1\..*weight: shape \[16, 16, 3, 3\].*\[8, 8"):
        measure(toy, never, wider)
    state = make_float_toy().state_dict()
    del state["feature.2.FFN_2.binary_conv.weight"]
    with pytest.raises(QuantizationError, match=r"feature\.2\.FFN_2\.binary_conv\.weight: missing"):
        measure(toy, never, state)
