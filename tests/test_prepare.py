from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding_bounds import assert_integers, assert_within, sum_bound
from torch import Tensor, nn

from qat.bnext import BNext
from qat.errors import QuantizationError
from qat.fakequant import (
    ActivationQuantizer,
    FixedQuantizer,
    Quantizer,
    activation_quantizers,
    freeze_observers,
)
from qat.layers import SubBlock
from qat.nativecalls import torch_alone
from qat.prepare import calibrate, model_is_prepared, prepare, quantization_map
from qat.recipe import Group, Quantization, StemGroup, TrunkGroup

ABLATIONS = [
    {"elm_attention": elm, "infor_recoupling": recoupling}
    for elm in (True, False)
    for recoupling in (True, False)
]


def everything_at(bits: int) -> Quantization:
    group = Group(activation_bits=bits, weight_bits=bits)
    return Quantization(trunk=TrunkGroup(activation_bits=bits), se=group, classifier=group)


OFF = {
    "stem": StemGroup(enabled=False),
    "se": Group(enabled=False),
    "classifier": Group(enabled=False),
    "trunk": TrunkGroup(enabled=False),
}


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor | None]:
    """Gradient of each parameter after one training step's backward pass."""
    logits = model.train()(images)
    labels = torch.arange(len(images)) % logits.shape[1]
    nn.functional.cross_entropy(logits.float(), labels.to(logits.device)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sub_blocks(model: nn.Module) -> dict[str, SubBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubBlock)}


def without_gradient(model: BNext) -> set[str]:
    """Parameters that the published network has and never uses."""
    unused = {"feature.0.prelu.weight"}
    for name, block in sub_blocks(model).items():
        if block.kind == "bias":
            unused.add(f"{name}.activation1.weight")
            if not block.infor_recoupling:
                unused |= {f"{name}.norm2.weight", f"{name}.norm2.bias"}
    return unused


def assert_every_used_parameter_learns(model: BNext, images: Tensor) -> None:
    found = gradients(model, images)
    assert {name for name, grad in found.items() if grad is None} == without_gradient(model)
    idle = [name for name, grad in found.items() if grad is not None and not grad.abs().max() > 0]
    assert idle == []
    assert all(grad.isfinite().all() for grad in found.values() if grad is not None)


# --- the two ways in -----------------------------------------------------------------------------------


def test_a_quantized_network_loads_a_float_checkpoint_strictly(float_toy: BNext) -> None:
    model = BNext(10, widths=float_toy.architecture.widths, quant=True)
    state = float_toy.state_dict()
    result = model.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert loaded.keys() > state.keys()

    del state["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        model.load_state_dict(state, strict=True)


def test_the_recipe_path_and_quant_true_give_the_same_network(float_toy: BNext, images: Tensor) -> None:
    fresh = prepare(copy.deepcopy(float_toy), Quantization())
    calibrate(fresh, lambda: fresh(images))
    calibrated_here = BNext(10, widths=float_toy.architecture.widths, quant=True).eval()
    calibrated_here.load_state_dict(fresh.state_dict())
    assert quantization_map(fresh) == quantization_map(calibrated_here)
    assert torch.equal(fresh(images), calibrated_here(images))
    assert not torch.equal(fresh(images), float_toy(images))


def test_the_state_of_a_quantized_network_is_all_that_it_depends_on(toy: BNext, images: Tensor) -> None:
    twin = BNext(10, widths=toy.architecture.widths, quant=True).eval()
    assert not torch.equal(twin(images), toy(images))
    twin.load_state_dict(toy.state_dict())
    assert torch.equal(twin(images), toy(images))


def test_preparing_works_in_place_and_keeps_the_parameters(float_toy: BNext) -> None:
    parameters = dict(float_toy.named_parameters())
    prepared = prepare(float_toy, Quantization())
    assert prepared is float_toy
    after = dict(prepared.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("training", [True, False])
def test_preparing_keeps_the_mode(float_toy: BNext, training: bool) -> None:
    prepare(float_toy.train(training), Quantization())
    assert {module.training for module in float_toy.modules()} == {training}


def test_preparing_twice_is_refused(float_toy: BNext) -> None:
    assert not model_is_prepared(float_toy)
    prepare(float_toy, Quantization())
    assert model_is_prepared(float_toy)
    with pytest.raises(QuantizationError, match="prepared already"):
        prepare(float_toy, Quantization())


def test_a_network_with_every_group_off_counts_as_prepared(float_toy: BNext) -> None:
    prepare(float_toy, Quantization(**OFF))
    with pytest.raises(QuantizationError, match="prepared already"):
        prepare(float_toy, Quantization())


def test_the_image_grid_is_the_one_given(float_toy: BNext) -> None:
    prepare(float_toy, Quantization(), image=(0.25, 7))
    image = quantization_map(float_toy)["feature.0.image"]
    assert (image["type"], image["scale"], image["zero_point"]) == ("uint8", 0.25, 7)


# --- what is chosen ------------------------------------------------------------------------------------


def test_by_default_every_point_of_the_table_is_quantized(toy: BNext) -> None:
    lines = quantization_map(toy)
    for name, block in sub_blocks(toy).items():
        inside = {
            "y",
            "gain",
            "branch",
            "se.pooled",
            "se.hidden",
            "se.logits",
            "se.attention",
            "se.weight_quantizer",
        }
        inside |= {"product"} if block.kind == "scale" else set()
        assert {line.removeprefix(f"{name}.") for line in lines if line.startswith(f"{name}.")} == inside
    trunk = {f"feature.{index}.{end}" for index in range(1, 5) for end in ("trunk_mid", "trunk_out")}
    assert trunk | {"feature.0.trunk", "feature.0.image", "feature.0.weight_quantizer"} <= lines.keys()
    assert {"fc.input", "fc.weight_quantizer"} <= lines.keys()
    assert lines["feature.1.FFN.se.hidden"]["type"] == lines["feature.1.FFN.se.attention"]["type"] == "uint8"
    assert {lines[name]["type"] for name in trunk} == {"int8"}


def test_a_float_network_has_an_empty_map(float_toy: BNext) -> None:
    assert quantization_map(float_toy) == {}


PARTS: dict[str, Callable[[str], bool]] = {
    "stem": lambda name: name in ("feature.0.image", "feature.0.weight_quantizer"),
    "se": lambda name: ".se." in name,
    "classifier": lambda name: name.startswith("fc."),
}
PARTS["trunk"] = lambda name: not any(PARTS[part](name) for part in ("stem", "se", "classifier"))


@pytest.mark.parametrize("group", OFF)
def test_a_group_switched_off_stays_in_float(
    group: str, toy: BNext, make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(**{group: OFF[group]}))
    everything, left = quantization_map(toy).keys(), quantization_map(model).keys()
    assert everything - left == {name for name in everything if PARTS[group](name)}
    assert left < everything
    assert model(images).isfinite().all()
    assert_every_used_parameter_learns(model, images)


def test_bits_reach_their_points(make_toy: Callable[..., BNext]) -> None:
    lines = quantization_map(
        make_toy(
            Quantization(
                stem=StemGroup(weight_bits=7),
                trunk=TrunkGroup(activation_bits=6, observer="minmax"),
                se=Group(weight_bits=4, activation_bits=5),
                classifier=Group(weight_bits=3, activation_bits=2),
            )
        )
    )
    assert lines["feature.0.weight_quantizer"]["type"] == "int7"
    assert lines["feature.0.image"]["type"] == "uint8"
    assert lines["feature.2.Attention.product"]["type"] == lines["feature.3.trunk_mid"]["type"] == "int6"
    assert lines["feature.2.Attention.y"]["range"] == "minmax"
    assert lines["feature.2.Attention.se.weight_quantizer"]["type"] == "int4"
    assert lines["feature.2.Attention.se.pooled"]["type"] == "int5"
    assert lines["feature.2.Attention.se.attention"]["type"] == "uint5"
    assert (lines["fc.weight_quantizer"]["type"], lines["fc.input"]["type"]) == ("int3", "int2")


def test_excluded_modules_stay_in_float(toy: BNext, make_toy: Callable[..., BNext], images: Tensor) -> None:
    model = make_toy(Quantization(exclude=["fc", "feature.2.*.se", "feature.3.FFN"]))
    gone = quantization_map(toy).keys() - quantization_map(model).keys()
    prefixes = ("fc.", "feature.3.FFN.y", "feature.3.FFN.gain", "feature.3.FFN.branch")
    assert gone == {
        name
        for name in quantization_map(toy)
        if name.startswith(prefixes) or (name.startswith("feature.2.") and ".se." in name)
    }
    assert model(images).isfinite().all()


def test_only_included_modules_are_quantized_and_exclude_wins(
    make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(include=["feature.1.*", "fc"], exclude=["feature.1.Attention*"]))
    names = quantization_map(model).keys()
    assert {name.split(".FFN")[0].split(".trunk")[0].split(".")[0] for name in names} == {"feature", "fc"}
    assert all(name.startswith(("feature.1.FFN.", "feature.1.trunk", "fc.")) for name in names)
    assert {"feature.1.FFN.y", "feature.1.FFN.se.pooled", "feature.1.trunk_out", "fc.input"} <= names
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    "choice",
    [
        {"exclude": ["feature.1.trunk_out"]},
        {"exclude": ["*.trunk*"]},
        {"include": ["feature.2.*"]},
        {"include": ["feature.2.Attention"]},
    ],
    ids=str,
)
def test_a_scale_kind_sub_block_works_behind_a_trunk_left_in_float(
    choice: dict[str, list[str]], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(Quantization(**choice))
    assert model(images).isfinite().all()
    assert_every_used_parameter_learns(model, images)


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize(
    ("glob", "meant"), [("feature.2.Atention", "feature.2.Attention"), ("feature.1.FFM", "feature.1.FFN")]
)
def test_a_glob_that_matches_nothing_is_refused(float_toy: BNext, key: str, glob: str, meant: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        prepare(float_toy, Quantization(**{key: ["*", glob] if key == "include" else [glob]}))
    message = str(caught.value)
    assert f"quantization.{key}: '{glob}' matches no module" in message
    assert f"did you mean '{meant}'" in message
    assert not model_is_prepared(float_toy)


def test_a_refused_glob_leaves_a_network_that_can_be_prepared(float_toy: BNext) -> None:
    with pytest.raises(QuantizationError):
        prepare(float_toy, Quantization(exclude=["nothing.like.it"]))
    prepare(float_toy, Quantization(exclude=["fc"]))
    assert "fc.input" not in quantization_map(float_toy)


# --- values --------------------------------------------------------------------------------------------


def test_trunk_values_are_integers_times_their_scale(toy: BNext, images: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    trunk = {
        name: point
        for name, point in activation_quantizers(toy)
        if name.rpartition(".")[2].startswith("trunk")
    }
    for name, point in trunk.items():
        point.register_forward_hook(lambda module, x, out, name=name: seen.update({name: out / module.scale}))
    # The stem puts its result on the trunk's grid itself.
    stem = toy.feature[0]
    stem.register_forward_hook(
        lambda module, x, out: seen.update({"feature.0.trunk": out / module.trunk.scale})
    )
    toy(images)
    assert seen.keys() == trunk.keys()
    assert len(seen) == 9
    for steps in seen.values():
        assert_integers(steps)
        assert -128 <= steps.round().min() < 0 < steps.round().max() <= 127
        assert len(steps.round().unique()) > 32


def test_the_head_s_activation_stays_on_the_trunk_s_grid(toy: BNext, images: Tensor) -> None:
    seen: list[Tensor] = []
    toy.prelu.register_forward_hook(lambda module, x, out: seen.append(out))
    toy(images)
    steps = seen[0] / toy.feature[4].trunk_out.scale
    assert_integers(steps)


@pytest.mark.parametrize("elm_attention", [True, False], ids=["scale kind", "bias kind"])
def test_a_pooled_residual_returns_to_its_input_s_grid(
    elm_attention: bool, make_toy: Callable[..., BNext], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_toy(elm_attention=elm_attention)
    block = model.feature[2].get_submodule(model.feature[2].spatial_name)
    assert (block.stride, block.kind) == (2, "scale" if elm_attention else "bias")
    requantize, branches, outs = block.branch.requantize, [], []

    def record(x: Tensor, **options: bool) -> Tensor:
        branches.append(requantize(x).clone())  # the residual is added in place
        return branches[-1].clone()

    monkeypatch.setattr(block.branch, "requantize", record)
    block.register_forward_hook(lambda module, args, out: outs.append(out))
    freeze_observers(model)
    model.train()  # evaluating, the sum is on the next grid already
    with torch.no_grad(), torch_alone():  # which shows the branch
        model(images)
    scale = block.source.quantizer.scale
    steps = (outs[0] - branches[-1]) / scale
    # A product, the sum that is taken apart again, and a quotient.
    magnitudes = (outs[0].double().abs() + branches[-1].double().abs()) / scale
    assert_within(steps, steps.round(), sum_bound(magnitudes, 4, torch.float32))
    assert len(steps.round().unique()) > 16


def test_the_sign_of_zero_is_plus_one_in_a_prepared_network_only(float_toy: BNext, toy: BNext) -> None:
    zeros = torch.zeros(3)
    for model, expected in ((float_toy, 0.0), (toy, 1.0)):
        blocks = sub_blocks(model)
        assert len(blocks) == 10
        for block in blocks.values():
            assert block.binary_activation(zeros).tolist() == [expected] * 3


def test_evaluation_depends_on_the_input_and_the_state_alone(toy: BNext, images: Tensor) -> None:
    before = {key: value.clone() for key, value in toy.state_dict().items()}
    first = toy(images)
    toy(100 * images + 3)
    assert torch.equal(toy(images), first)
    after = toy.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_image_s_logits_do_not_depend_on_its_batch(toy: BNext, images: Tensor) -> None:
    alone = torch.cat([toy(image[None]) for image in images])
    beside = toy(torch.cat([images, 50 * images]))[: len(images)]
    assert torch.equal(alone, beside)


def sub_block_errors(float_model: BNext, model: BNext, images: Tensor) -> dict[str, float]:
    """Relative error of each quantized sub-block against the float one on the same input."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            expected = float_model.get_submodule(name)(args[0])
            errors[name] = float((out - expected).norm() / expected.norm())

        return hook

    hooks = [block.register_forward_hook(compare(name)) for name, block in sub_blocks(model).items()]
    with torch.no_grad():
        model(images)
    for handle in hooks:
        handle.remove()
    return errors


def test_eight_bits_keep_every_sub_block_close_to_float(float_toy: BNext, toy: BNext, images: Tensor) -> None:
    kinds = {name: block.kind for name, block in sub_blocks(toy).items()}
    errors = sub_block_errors(float_toy, toy, images)
    assert errors.keys() == kinds.keys()
    # The scale kind multiplies two quantized maps, so its errors add up and its tails are long.
    assert max(error for name, error in errors.items() if kinds[name] == "bias") < 0.05
    assert max(error for name, error in errors.items() if kinds[name] == "scale") < 0.15


def test_more_bits_bring_the_network_closer_to_float(
    make_toy: Any, make_float_toy: Any, images: Tensor
) -> None:
    inside, logits = [], []
    in_float = [make_float_toy(seed=seed) for seed in range(3)]
    for bits in (8, 6, 4):
        block_errors, logit_errors = [], []
        for seed, float_model in enumerate(in_float):
            model = make_toy(everything_at(bits), seed=seed)
            errors = sub_block_errors(float_model, model, images)
            block_errors.append(sum(errors.values()) / len(errors))
            with torch.no_grad():
                expected, found = float_model(images), model(images)
            logit_errors.append(float((found - expected).norm() / expected.norm()))
        inside.append(sum(block_errors) / 3)
        logits.append(sum(logit_errors) / 3)
    assert 4 * inside[0] < 2 * inside[1] < inside[2]
    assert logits[0] < logits[1] < logits[2]
    assert logits[0] < 0.5


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_every_used_parameter_of_every_ablation_learns(
    ablation: dict[str, bool], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(**ablation)
    assert all(point.calibrated for _, point in activation_quantizers(model))
    assert_every_used_parameter_learns(model, images)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_every_ablation_lowers_its_loss(
    ablation: dict[str, bool], make_toy: Callable[..., BNext], images: Tensor
) -> None:
    model = make_toy(**ablation).train()
    labels = torch.arange(len(images)) % 10
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]


def test_the_parameters_without_a_gradient_are_those_of_the_float_network(
    float_toy: BNext, toy: BNext, images: Tensor
) -> None:
    missing = [
        {name for name, grad in gradients(model, images).items() if grad is None}
        for model in (float_toy, toy)
    ]
    assert missing[0] == missing[1] == without_gradient(toy)


def test_an_uncalibrated_network_of_moving_ranges_trains_as_well(float_toy: BNext, images: Tensor) -> None:
    model = prepare(float_toy, Quantization(trunk=TrunkGroup(observer="moving_average")))
    assert_every_used_parameter_learns(model, images)
    assert all(point.calibrated for _, point in activation_quantizers(model))


def test_a_bfloat16_network_trains_a_step_on_float32_grids(toy: BNext, images: Tensor) -> None:
    toy.to(torch.bfloat16)
    assert_every_used_parameter_learns(toy, images.bfloat16())
    torch.optim.SGD(toy.parameters(), lr=0.01).step()
    logits = toy.eval()(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert {point.scale.dtype for _, point in activation_quantizers(toy)} == {torch.float32}


def test_autocast_to_bfloat16_trains_a_step(toy: BNext, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(toy, images)
    assert {grad.dtype for grad in found.values() if grad is not None} == {torch.float32}
    assert all(grad.isfinite().all() for grad in found.values() if grad is not None)


def test_quantizers_are_put_beside_the_parameters() -> None:
    with torch.device("meta"):
        model = BNext(10, widths=(8, 8, 16))
    prepare(model, Quantization())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_network_on_a_gpu_learns_and_agrees_with_the_processor(toy: BNext, images: Tensor) -> None:
    expected = toy(images)
    device = copy.deepcopy(toy).cuda()
    assert {tensor.device.type for tensor in device.state_dict().values()} == {"cuda"}
    assert torch.equal(device(images.cuda()).cpu(), expected), "evaluation computes the same integers"
    assert_every_used_parameter_learns(device, images.cuda())


# --- calibration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization", [None, Quantization(**OFF), Quantization(**{**OFF, "stem": StemGroup()})]
)
def test_calibration_without_a_quantized_activation_is_refused(
    float_toy: BNext, images: Tensor, quantization: Quantization | None
) -> None:
    if quantization:
        prepare(float_toy, quantization)
    with pytest.raises(QuantizationError, match="nothing to calibrate"):
        calibrate(float_toy, lambda: float_toy(images))


def test_calibration_that_reaches_no_point_is_refused(float_toy: BNext) -> None:
    prepare(float_toy, Quantization())
    with pytest.raises(QuantizationError, match=r"no finite value at feature\.0\.trunk"):
        calibrate(float_toy, lambda: None)


@pytest.mark.parametrize("training", [True, False])
def test_calibration_evaluates_without_gradients_and_restores_the_mode(
    float_toy: BNext, images: Tensor, training: bool
) -> None:
    prepare(float_toy.train(training), Quantization())
    norm = float_toy.feature[1].FFN.norm1
    before = norm.running_mean.clone()
    modes = []

    def forward() -> None:
        modes.append((float_toy.training, float_toy(images).requires_grad))

    calibrate(float_toy, forward)
    assert modes == [(False, False)]
    assert float_toy.training is training
    assert torch.equal(norm.running_mean, before)


def test_a_calibration_that_fails_leaves_no_point_observing(float_toy: BNext) -> None:
    prepare(float_toy.train(), Quantization())

    def forward() -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        calibrate(float_toy, forward)
    assert float_toy.training
    assert not any(point.calibrating for _, point in activation_quantizers(float_toy))


def test_calibration_shows_float_ranges(float_toy: BNext, images: Tensor) -> None:
    with torch.no_grad():
        stem = float_toy.feature[0](images)
    prepare(float_toy, Quantization(stem=StemGroup(enabled=False), trunk=TrunkGroup(observer="minmax")))
    calibrate(float_toy, lambda: float_toy(images))
    assert float_toy.feature[0].trunk.scale.item() == pytest.approx(stem.abs().max().item() / 127.5, rel=1e-5)


# --- points left in float ------------------------------------------------------------------------------


def test_points_left_in_float_own_no_state(make_toy: Callable[..., BNext]) -> None:
    model = make_toy(Quantization(trunk=TrunkGroup(enabled=False)))
    points = [module for module in model.modules() if type(module) is Quantizer]
    assert points
    assert all(point.state_dict() == {} for point in points)
    kinds = {type(module) for module in model.modules() if isinstance(module, Quantizer)}
    assert kinds == {Quantizer, ActivationQuantizer, FixedQuantizer}
