"""Exporting in Python: every target, what it is compared on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import qat
from qat.errors import DataError, QuantizationError
from tests.api.test_networks import ready
from tests.helpers import checkpoints
from tests.helpers.native_builds import need


@pytest.mark.parametrize("target", ["portable", "native", "strict", "float32"])
@pytest.mark.parametrize("kind", ["float32", "uint8", "uint8 NHWC"])
def test_every_target_is_written_and_verified(tmp_path: Path, target: Any, kind: Any) -> None:
    if target == "native":
        need("c++")
    model, path = ready(), tmp_path / "model.onnx"
    qat.export_onnx(model, path, target=target, input="float32" if target == "float32" else kind)
    labels = torch.arange(2)
    images = checkpoints.images()
    if target != "float32" and kind != "float32":
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert qat.evaluate(path, [(images, labels)]).n == 2


def test_a_float_rest_network_is_exported_as_float_alone(tmp_path: Path) -> None:
    model = checkpoints.toy()
    with pytest.raises(QuantizationError, match="isn't known"):
        qat.export_onnx(model, tmp_path / "a.onnx", target="float32")
    model.facts = ready().facts
    with pytest.raises(QuantizationError, match=r"no integers: qat\.prepare and qat\.calibrate it first"):
        qat.export_onnx(model, tmp_path / "a.onnx")
    qat.export_onnx(model, tmp_path / "a.onnx", target="float32")
    assert (tmp_path / "a.onnx").exists()


def test_names_size_and_normalization_stand_in_the_model(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(10)]
    qat.export_onnx(ready(), tmp_path / "a.onnx", class_names=names, image_size=16)
    metadata = {one.key: one.value for one in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert "class 9" in metadata["class_names"]
    assert qat.evaluate(tmp_path / "a.onnx", [(torch.zeros(1, 3, 16, 16), torch.tensor([3]))]).n == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "portabel"}, QuantizationError, r"target: found 'portabel', .*did you mean 'portable'"),
        ({"input": "int8"}, QuantizationError, "input: found 'int8', allowed: 'float32', 'uint8'"),
        ({"class_names": ["a"]}, QuantizationError, "class_names: found 1 names"),
        ({"image_size": 3}, QuantizationError, "image_size: found 3"),
        ({"images": []}, DataError, "no images"),
        ({"images": [(torch.ones(1, 3, 8, 8), torch.tensor([11]))]}, DataError, "labels run from 11 to 11"),
        ({"images": [(2 * torch.ones(1, 3, 8, 8), torch.tensor([1]))]}, DataError, "pixels beyond 0 to 1"),
        ({"images": [torch.ones(1, 3, 8, 8)]}, DataError, "found nothing behind 1 images"),
        ({"images": [(torch.ones(1, 3, 9, 9), torch.tensor([1]))]}, DataError, "9×9 pixels"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        qat.export_onnx(ready(), tmp_path / "a.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_own_images_can_be_compared_on(tmp_path: Path) -> None:
    pixels = torch.rand(20, 3, 8, 8)
    result = qat.export_onnx(
        ready(), tmp_path / "a.onnx", images=[(pixels, torch.zeros(20, dtype=torch.int64))]
    )
    assert result.comparison.n == 20  # type: ignore[union-attr]
