"""A training loop of a user's own, from a float-rest checkpoint to a verified model, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import qat
from tests.helpers import toy_runs as toyruns
from tests.helpers.toy_runs import fail, image_folder, succeed

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture(scope="module")
def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Normalized images of two classes, dark and light."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    pixels = 0.3 + 0.4 * labels[:, None, None, None] + 0.1 * torch.randn(48, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset((pixels.clamp(0, 1) - 0.5) / 0.25, labels), batch_size=12)


@pytest.fixture(scope="module")
def tuned(
    start: Path, loader: DataLoader[tuple[torch.Tensor, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The loop of the documentation. To be read only."""
    folder = tmp_path_factory.mktemp("loop")
    torch.manual_seed(0)
    trained = qat.load(start)  # ten classes: the digits
    model = qat.BNext(2, widths=trained.architecture.widths)
    qat.load_state(model, trained.state_dict(), classifier="new")
    qat.prepare(model, mean=MEAN, std=STD)
    qat.calibrate(model, loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(4):
        model.train()
        if epoch == 2:
            qat.freeze(model)
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    qat.save(model.eval(), folder / "tuned.safetensors", class_names=["dark", "light"])
    qat.export_onnx(model, folder / "model.onnx", class_names=["dark", "light"])
    return folder


def test_the_loop_learns_and_its_export_answers_alike(
    tuned: Path, loader: DataLoader[tuple[torch.Tensor, ...]]
) -> None:
    model = qat.load(tuned / "tuned.safetensors")
    here, file = qat.evaluate(model, loader), qat.evaluate(tuned / "model.onnx", loader)
    assert here == file
    assert here.top1 >= 90.0
    assert here.n == 48


def test_a_model_is_verified_against_a_network_a_checkpoint_and_never_another(tuned: Path) -> None:
    model = qat.load(tuned / "tuned.safetensors")
    for source in (model, tuned / "tuned.safetensors", str(tuned / "tuned.safetensors")):
        found = qat.verify(tuned / "model.onnx", source)
        assert found.problems() == []
    with torch.no_grad():
        model.fc.bias += 1.0
    with pytest.raises(qat.QatError):
        qat.verify(tuned / "model.onnx", model)


def test_frozen_statistics_and_grids_stay_in_training_mode(
    tuned: Path, loader: DataLoader[tuple[torch.Tensor, ...]]
) -> None:
    model = qat.load(tuned / "tuned.safetensors")
    qat.freeze(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    for images, _ in loader:
        model(images)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_was_saved_is_taken_by_every_command(tuned: Path, tmp_path: Path) -> None:
    saved = tuned / "tuned.safetensors"
    printed = succeed("export", "--onnx", tmp_path / "again.onnx", "--checkpoint", saved)
    assert printed.splitlines()[-1].endswith(" MB, verified")
    assert "Against the network, on images of noise" in printed
    assert "top-1, torch network" not in printed
    assert (tmp_path / "again.onnx").read_bytes() == (tuned / "model.onnx").read_bytes()
    succeed("export", "--onnx", tmp_path / "float.onnx", "--checkpoint", saved, "--float32")
    assert "31 of" not in succeed("inspect", saved)
    assert "verified" in succeed("verify", tmp_path / "again.onnx", "--checkpoint", saved)
    root = image_folder(tmp_path / "images")
    for model in (saved, tmp_path / "again.onnx"):
        assert "data.root" in fail(2, "evaluate", model)
        content = json.loads(succeed("evaluate", model, "--set", f"data.root={root}", "--json"))
        assert content["n"] == 12
    baseline = tmp_path / "baseline.json"
    succeed("gate", "record", saved, "-o", baseline, "--set", f"data.root={root}")
    gate = toyruns.qat("gate", tmp_path / "again.onnx", "--baseline", baseline, "--set", f"data.root={root}")
    assert gate.exit_code == 0, gate.output
    # And fine-tuning starts from it.
    options = ["data.dataset=imagefolder", f"data.root={root}", "data.image_size=16", "data.batch_size=7"]
    again = qat.load_recipe(
        "tiny_int8",
        [
            f"model.checkpoint={saved}",
            "model.widths=[8,8,16]",
            "model.num_classes=null",
            "schedule.epochs=0",
            f"output.dir={tmp_path / 'runs'}",
            *options,
        ],
    )
    assert qat.load(qat.finetune(again).path).architecture.num_classes == 2
