"""`qat predict`: the classes of single images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.commands.prediction import predict
from qat.data.augment import normalize
from qat.data.decode import decode
from tests.helpers.toy_runs import fail, image_folder, succeed, tuned


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images") / "validation"


def test_the_classes_are_those_of_the_network(toys: Path, images: Path) -> None:
    checkpoint = tuned(toys)
    (first, *_), folder = sorted((images / "dark").iterdir()), images / "dark"
    network = build(load_checkpoint(checkpoint))
    with torch.no_grad():
        expected = network(normalize(decode(first, 8, 8)[None], (0.0,) * 3, (1.0,) * 3)).double().softmax(1)
    for model in (checkpoint, checkpoint.parent, toys / "model.onnx"):
        lines = succeed("predict", model, folder, "--json").splitlines()
        assert len(lines) == 6
        found = json.loads(lines[0])
        assert found["image"] == str(first)
        order = expected[0].argsort(descending=True, stable=True)[:5].tolist()
        assert [one["name"] for one in found["classes"]] == [str(label) for label in order]
        probabilities = [one["probability"] for one in found["classes"]]
        assert probabilities == pytest.approx(expected[0, order].tolist())


def test_people_get_a_table(toys: Path, images: Path) -> None:
    text = succeed("predict", toys / "model.onnx", next((images / "dark").iterdir()), "--top", 2)
    assert "probability" in text
    assert text.count("%") == 2


def test_more_images_than_a_batch_are_answered_in_order(toys: Path, images: Path) -> None:
    files = sorted((images / "dark").iterdir()) * 7
    found = list(predict(toys / "model.onnx", files, 1, (), lambda text: None))
    assert [one.image for one in found] == [str(file) for file in files]
    assert found[0].classes == found[6].classes


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("{model} {tmp}/absent.png", "absent.png: no such file"),
        ("{model} {tmp}/text.png", "cannot be decoded"),
        ("{model} {tmp}/empty", "a folder without images"),
        ("{tmp}/absent {tmp}/text.png", "absent: no such file"),
        ("{model}", "Missing argument"),
        ("{model} {tmp}/text.png --top 0", "--top"),
        ("{model} {tmp}/text.png --set seed=1", "only keys of `data` may be set"),
    ],
)
def test_what_cannot_be_answered_is_refused(toys: Path, tmp_path: Path, arguments: str, part: str) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    words = arguments.format(model=toys / "model.onnx", tmp=tmp_path).split()
    assert part in fail(2, "predict", *words)
