"""Both backends in whole networks, which differ in one key of the recipe, and scales of powers of two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.errors import QuantizationError
from qat.models.bnext import BNext
from qat.native.bindings import torch_alone
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.backends import backend_of
from qat.quantize.calibration import freeze_observers
from qat.quantize.preparation import prepare
from qat.quantize.quantizer_base import power_of_two_above
from qat.recipe.schema import Quantization
from tests.helpers.cases import combinations, slow
from tests.helpers.networks import (
    float_network,
    lowered,
    parity_problems,
    pixels,
    prepared,
    torch_problems,
    toy,
)


def settings(**keys: Any) -> Quantization:
    return Quantization.model_validate(keys)


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Everything in an integer network, by dotted name."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from leaves(entry, f"{name}.{index}")
    else:
        yield name, value.tobytes() if isinstance(value, np.ndarray) else value


def differences(one: IntegerNetwork, other: IntegerNetwork) -> list[str]:
    a, b = dict(leaves(one)), dict(leaves(other))
    return [name for name in a | b if a.get(name) != b.get(name)]


def train(model: BNext, steps: int = 4) -> None:
    """Train some steps on noise, with a learning rate that changes every scale."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(pixels(step, 8, 16)), torch.arange(8)).backward()
        optimizer.step()
    model.eval()


@combinations({"bits": [8, 4], "power_of_two": [False, True]})
def test_networks_of_both_backends_with_equal_scales_are_the_same_network(
    bits: int, power_of_two: bool
) -> None:
    group = {"activation_bits": bits}
    keys: dict[str, Any] = {"trunk": group, "se": {**group, "weight_bits": 4}, "power_of_two": power_of_two}
    observed, learned = (toy(1, settings(backend=name, **keys)) for name in ("torch_ao", "brevitas"))
    # Other scales than those of calibration, as training would leave them, given to both.
    random = torch.Generator().manual_seed(0)
    for (_, one), (_, two) in zip(
        activation_quantizers(observed), activation_quantizers(learned), strict=True
    ):
        two.log_scale.data.copy_(torch.rand(1, generator=random) - 0.5)  # type: ignore[operator, union-attr]
        one.fake.scale.copy_(two.scale)
    images = pixels(7, 4, 16)
    with torch.no_grad():
        assert torch.equal(observed(images), learned(images))
        for model in (observed, learned):
            freeze_observers(model)
            model.train()
        with torch_alone():  # whose passes are the same for both: others add up batches in another order
            assert torch.equal(observed(images), learned(images))
    assert differences(lowered(observed.eval()), lowered(learned.eval())) == []


def test_the_comparison_of_descriptions_sees_one_scale_in_the_last_place() -> None:
    one, other = toy(1), toy(1)
    point = dict(activation_quantizers(other))["feature.2.FFN.y"]
    point.scale.copy_(torch.nextafter(point.scale, torch.tensor(9.0)))
    assert differences(lowered(one), lowered(one)) == []
    assert ".blocks.1.pointwise.0.y_grid.scale" in differences(lowered(one), lowered(other))


@pytest.mark.parametrize("power_of_two", [False, slow(True)])
def test_a_network_trained_with_learned_scales_equals_its_export(power_of_two: bool) -> None:
    model = toy(2, settings(backend="brevitas", power_of_two=power_of_two))
    before = {key: value.clone() for key, value in model.state_dict().items() if "log_scale" in key}
    train(model)
    still = [key for key, value in before.items() if torch.equal(model.state_dict()[key], value)]
    # A channel attention one or two units wide may be dead; and a sum of two grids of powers of two may lie
    # on the third as it is.
    assert all(".se." in key or (power_of_two and ".trunk_" in key) for key in still)
    assert len(still) < len(before) / 10
    network, images = lowered(model), pixels(5, 3, 16).numpy()
    assert list(torch_problems(model, network, images, sub_blocks=True)) == []
    assert list(parity_problems(network, emit_portable(network), images)) == []


def test_a_checkpoint_keeps_learned_scales(tmp_path: Path) -> None:
    model = toy(2, settings(backend="brevitas"))
    train(model)
    save_checkpoint(tmp_path / "a.safetensors", model, recipe=None)
    loaded = build(load_checkpoint(tmp_path / "a.safetensors"))
    images = pixels(5, 3, 16)
    for (name, one), (_, two) in zip(
        activation_quantizers(model), activation_quantizers(loaded), strict=True
    ):
        assert torch.equal(one.scale, two.scale), name
    weights = {name: module for name, module in model.named_modules() if hasattr(module, "range_10")}
    assert weights.keys() == {"fc.weight_quantizer"}
    quantizer: Any = loaded.fc.weight_quantizer
    assert torch.equal(quantizer.scale(loaded.fc.weight), model.fc.weight_quantizer.scale(model.fc.weight))  # type: ignore[operator, union-attr]
    with torch.no_grad():
        assert loaded(images).isfinite().all()


def test_freezing_a_network_fixes_learned_scales_of_activations_and_weights() -> None:
    model = toy(2, settings(backend="brevitas"))
    train(model, 1)
    freeze_observers(model)
    before = {key: value.clone() for key, value in model.state_dict().items() if "log_scale" in key}
    train(model, 2)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_backend_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "brevitas"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "brevitas", None)
    monkeypatch.delitem(sys.modules, "qat.quantize.learned_scales", raising=False)
    model = float_network()
    before = list(model.state_dict())
    with pytest.raises(QuantizationError, match=r"'brevitas' cannot be used here: .*\[brevitas\]'$"):
        prepare(model, settings(backend="brevitas"))
    assert list(model.state_dict()) == before
    assert backend_of(settings(backend="torch_ao")).activations.__name__ == "ActivationQuantizer"


# Powers of two.


def is_power_of_two(values: Any) -> bool:
    return bool((np.frexp(np.asarray(values, np.float64))[0] == 0.5).all())


@pytest.mark.parametrize(
    ("scale", "above"),
    [
        (1.0, 1.0),
        (1.0 + 2.0**-23, 2.0),
        (0.3, 0.5),
        (0.25, 0.25),
        (3e-30, 2.0**-98),
        (2.0**-126, 2.0**-126),
        (100.0, 128.0),
    ],
)
def test_a_scale_is_rounded_up_to_the_next_power_of_two(scale: float, above: float) -> None:
    assert power_of_two_above(torch.tensor([scale])).tolist() == [above]


@pytest.mark.parametrize("backend", ["torch_ao", "brevitas"])
def test_multipliers_of_scales_alone_become_powers_of_two(backend: str) -> None:
    model = toy(1, settings(power_of_two=True, backend=backend))
    train(model, 2)
    network = lowered(model)
    fixed = {
        network.stem.image.scale,
        *(sub.attention.attention.scale for sub in network.sub_blocks() if sub.attention),
    }
    for name, grid in network.grids.items():
        assert is_power_of_two(grid.scale) or grid.scale in fixed, name
    for sub in network.sub_blocks():
        assert is_power_of_two([sub.branch_multiplier.value, sub.residual_multiplier.value]), sub.name
        assert sub.branch is not None
        assert is_power_of_two(sub.branch.first.value), sub.name
        assert sub.branch.second is None or is_power_of_two(sub.branch.second.value), sub.name
        assert sub.attention is not None
        assert is_power_of_two(sub.attention.reduce.multiplier), sub.name
        assert is_power_of_two(sub.attention.expand.multiplier), sub.name
    assert is_power_of_two(network.head.mean)
    assert is_power_of_two(network.head.classifier.multiplier)
    # Those with the gain of a batch normalization can't.
    assert not is_power_of_two(network.stem.conv.multiplier)
    assert not is_power_of_two(network.blocks[0].spatial.conv.multiplier)


def test_without_the_key_scales_are_as_observed() -> None:
    plain, rounded = (dict(activation_quantizers(toy(1, settings(power_of_two=on)))) for on in (False, True))
    assert not is_power_of_two([float(point.scale) for point in plain.values()])
    for point in rounded.values():  # what was observed is kept beside it
        assert torch.equal(point.scale, power_of_two_above(point.fake.scale))
    assert not is_power_of_two([float(point.fake.scale) for point in rounded.values()])


def test_a_classifier_row_of_zeros_keeps_a_power_of_two() -> None:
    model = float_network(1)
    with torch.no_grad():
        model.fc.weight[3] = 0.0
        model.fc.bias[3] = 0.7
    network = lowered(prepared(model, settings(power_of_two=True), seed=1))
    assert is_power_of_two(network.head.classifier.multiplier)
    bias = network.head.classifier.bias[3] * network.head.classifier.multiplier[3]
    assert float(bias) == pytest.approx(0.7, rel=1e-6)
