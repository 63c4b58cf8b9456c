"""Networks in Python: what is taken, what is known, and what is refused with what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import CheckpointError, DataError, QuantizationError
from tests.helpers import checkpoints


@pytest.fixture
def network() -> qat.BNext:
    return checkpoints.toy()


def ready(**options: Any) -> qat.BNext:
    model = qat.prepare(checkpoints.toy(**options), mean=(0.5,) * 3, std=(0.5,) * 3)
    qat.calibrate(model, [checkpoints.images()])
    return model


def test_importing_qat_loads_no_torch_and_its_names_are_the_documented_ones() -> None:
    code = "import sys, qat; print('torch' in sys.modules, *qat.__all__, sep='\\n')"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded, *names = lines.split()
    assert loaded == "False"
    asked = "BNext Architecture Recipe load_recipe prepare calibrate quantization_map load save pretrain"
    assert set(names) >= {*asked.split(), "finetune", "evaluate", "export_onnx", "verify", "QatError"}
    for name in names:
        assert getattr(qat, name) is not None
    assert set(names) <= set(dir(qat))
    with pytest.raises(AttributeError, match="module 'qat' has no attribute 'nothing'"):
        qat.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_stub_has_the_names_that_are_loaded_lazily() -> None:
    assert qat.__file__ is not None
    stub = Path(qat.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    listed = {line.rpartition(" as ")[2] for line in stub.splitlines() if " import " in line}
    assert listed | {"__version__"} == set(qat.__all__)
    for name in listed:
        assert getattr(qat, name).__doc__, name


@pytest.mark.parametrize("as_text", [True, False])
def test_any_checkpoint_is_loaded_with_what_it_knows(
    network: qat.BNext, tmp_path: Path, as_text: bool
) -> None:
    torch.save(checkpoints.prefixed(network.state_dict()), tmp_path / "published.pth")
    path = tmp_path / "published.pth"
    loaded = qat.load(str(path) if as_text else path)
    assert not loaded.training
    assert loaded.facts.mean is None
    assert torch.equal(loaded(checkpoints.images()), network(checkpoints.images()))
    with pytest.raises(CheckpointError, match="no such file"):
        qat.load(tmp_path / "absent")


def test_a_run_is_loaded_by_its_folder(start: Path) -> None:
    model = qat.load(start.parent)
    assert model.facts.class_names == tuple("0123456789")
    assert (model.facts.image_size, model.facts.mean) == (8, (0.0, 0.0, 0.0))
    assert qat.prepare(model) is model  # the normalization is known


def test_the_normalization_is_required_where_no_checkpoint_has_it(network: qat.BNext) -> None:
    with pytest.raises(QuantizationError, match=r"isn't known: give prepare\(model, mean="):
        qat.prepare(network)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), (1, 1, 1), r"mean: found \[0.5, 0.5\], allowed: three numbers"),
        ((0, 0, 0), (1, 1, 0), r"std: found .*allowed: three positive numbers"),
        ((0, float("nan"), 0), (1, 1, 1), "mean: found .*allowed: three numbers"),
        (("a", "b", "c"), (1, 1, 1), "mean: found .*allowed: three numbers"),
    ],
)
def test_a_normalization_that_is_none_is_refused(
    network: qat.BNext, mean: Any, std: Any, message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        qat.prepare(network, mean=mean, std=std)
    assert not qat.quantization_map(network)


def test_bits_are_given_as_in_a_recipe_and_wrong_ones_are_named(network: qat.BNext) -> None:
    qat.prepare(network, {"se": {"weight_bits": 4}}, mean=(0, 0, 0), std=(1, 1, 1))
    lines = qat.quantization_map(network)
    assert {line["type"] for name, line in lines.items() if ".se." in name and "weight" in name} == {"int4"}
    with pytest.raises(QuantizationError, match=r"quantization: se\.weight_bits: "):
        qat.prepare(checkpoints.toy(), {"se": {"weight_bits": 40}}, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: [x],
        lambda x: [(x, torch.zeros(len(x)))],
        lambda x: iter([[x, "labels"]]),
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=1),
    ],
)
def test_any_iterable_of_images_calibrates(batches: Any) -> None:
    model = qat.prepare(checkpoints.toy(), mean=(0, 0, 0), std=(1, 1, 1))
    qat.calibrate(model, batches(checkpoints.images()))
    assert model.facts.image_size == 8
    assert torch.isfinite(model(checkpoints.images())).all()


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], QuantizationError, "reached no finite value"),
        ([{"image": 1}], DataError, r"batch 1: found dict, allowed: images \(N, 3, H, W\)"),
        ([torch.zeros(3, 8, 8)], DataError, r"batch 1: found a tensor \(3, 8, 8\) of float32"),
        ([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], DataError, "found torch.uint8 pixels, allowed: norm"),
        ([checkpoints.images(), None], DataError, "batch 2: found nothing"),
    ],
)
def test_batches_without_normalized_images_are_refused(batches: Any, error: Any, message: str) -> None:
    model = qat.prepare(checkpoints.toy(), mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(error, match=message):
        qat.calibrate(model, batches)


def test_what_a_checkpoint_knows_survives_saving(tmp_path: Path) -> None:
    model = ready()
    names = [f"class {number}" for number in range(10)]
    qat.save(model, tmp_path / "a.safetensors", class_names=names)
    again = qat.load(tmp_path / "a.safetensors")
    assert again.facts.class_names == tuple(names)
    assert (again.facts.mean, again.facts.std, again.facts.image_size) == ((0.5,) * 3, (0.5,) * 3, 8)
    qat.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(QuantizationError, match="class_names: found 1 names, the network has 10 classes"):
        qat.save(model, tmp_path / "c.safetensors", class_names=["one"])
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("side", [0, 7, 8.0, True, "16"])
def test_an_image_size_that_is_none_is_refused(tmp_path: Path, side: Any) -> None:
    with pytest.raises(QuantizationError, match=r"image_size: found .*allowed: a whole number of pixels"):
        qat.save(ready(), tmp_path / "a.safetensors", image_size=side)
