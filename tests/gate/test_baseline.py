"""Baselines: what counts as right, how answers are packed, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.data.folder import FolderSplit
from qat.data.split import MemorySplit
from qat.evaluation import accuracy_of
from qat.gate.baseline import LINE, ModelFacts, describe_data, observe, pack, unpack
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Data
from tests.helpers.recorded_baselines import baseline

MODEL = ModelFacts(file="m.onnx", sha256="a" * 64, format="bnext-qat portable 1", architecture="BNext tiny")


def split(count: int, classes: int) -> MemorySplit:
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return MemorySplit([f"class {i}" for i in range(classes)], images, torch.arange(count) % classes)


# What is right


@pytest.mark.parametrize("place", [0, 1])
def test_an_answer_with_nan_is_wrong_wherever_the_nan_is(place: int) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    logits[0, place] = torch.nan
    data = Data(image_size=8)
    ones = MemorySplit([*"abcdef"], torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0]))
    found = observe(logits, ones, describe_data(ones, data), MODEL, None)
    assert (found.top1, found.top5, found.answers().tolist()) == (50.0, 50.0, [False, True])


def test_the_accuracies_are_those_of_an_evaluation() -> None:
    logits = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    one = split(1000, 20)
    found = observe(logits, one, describe_data(one, Data(image_size=8)), MODEL, None)
    expected = accuracy_of(logits, one.labels)
    assert (found.top1, found.top5) == (pytest.approx(expected.top1), pytest.approx(expected.top5))
    assert found.answers().tolist() == (logits.argmax(1) == one.labels).tolist()
    assert 100 * found.correct_count / 1000 == expected.top1


# Bits


@given(st.lists(st.booleans(), min_size=1, max_size=3 * LINE))
def test_bits_come_back_as_they_were_packed(bits: list[bool]) -> None:
    lines = pack(np.array(bits))
    assert unpack(lines, len(bits)).tolist() == bits
    assert [len(line) for line in lines[:-1]] == [64] * (len(lines) - 1)


def test_the_first_image_is_the_most_significant_bit_and_a_change_touches_one_line() -> None:
    bits = np.zeros(600, np.bool_)
    bits[0] = True
    lines = pack(bits)
    assert lines == ["8" + "0" * 63, "0" * 64, "0" * 22]
    bits[511] = True
    assert pack(bits) == [lines[0], "0" * 63 + "1", lines[2]]


@pytest.mark.parametrize(
    ("lines", "n", "part"),
    [
        ([], 1, "found 0 lines, 1 images need 1"),
        (["80", "80"], 1, "found 2 lines"),
        (["8"], 1, "line 1: found 1 digits, needs 2"),
        (["f" * 64, "8000"], 257, "line 2: found 4 digits, needs 2"),
        (["8g"], 8, "line 1: 'g' is no hexadecimal digit"),
        (["8A"], 8, "lower case"),
        (["٣٣"], 8, "line 1: '٣' is no hexadecimal digit"),
        (["c0"], 1, "bits are set beyond image 1"),
    ],
)
def test_bits_of_another_size_or_alphabet_are_refused(lines: list[str], n: int, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        unpack(lines, n)


# What is recorded


def logits_for(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes).float()


def test_a_recording_says_what_was_measured_on_what_with_what() -> None:
    one = split(10, 3)
    data = Data(image_size=8, mean=(0.1, 0.2, 0.3))
    found = observe(logits_for(one.labels, 3), one, describe_data(one, data), MODEL, None)
    assert (found.images, found.num_classes, found.top1, found.top5) == (10, 3, 100.0, 100.0)
    assert found.model == MODEL
    assert found.class_names == ["class 0", "class 1", "class 2"]
    assert (found.data.fingerprint, found.data.image_size) == (one.fingerprint(), 8)
    assert (found.data.mean, found.data.std) == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])
    assert {"bnext-qat", "torch", "numpy", "onnxruntime", "pillow", "python"} == set(found.versions)
    assert found.versions["torch"]
    assert found.versions["python"].count(".") == 1
    assert found.processor.architecture
    assert found.recipe is None


def test_no_path_of_the_machine_is_recorded(tmp_path: Path) -> None:
    overrides = [
        f"model.checkpoint={tmp_path}/some.safetensors",
        f"output.dir={tmp_path}/runs",
        "data.dataset=imagefolder",
        f"data.root={tmp_path}",
        f"data.test_split={tmp_path}/held_out",
    ]
    recipe = load_recipe("tiny_int8", overrides).recipe
    one = split(4, 2)
    found = observe(logits_for(one.labels, 2), one, describe_data(one, recipe.data), MODEL, recipe)
    text = json.dumps(found.model_dump(mode="json"))
    assert tmp_path.name not in text
    assert str(tmp_path.parent) not in text
    assert found.recipe is not None
    assert found.recipe["model"]["checkpoint"] == "some.safetensors"
    assert found.data.test_split == found.recipe["data"]["test_split"] == "held_out"
    assert found.recipe["optimizer"] == recipe.model_dump(mode="json")["optimizer"]


def test_the_resize_in_effect_is_recorded_of_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"")
    labels = torch.tensor([0])
    one = FolderSplit(tmp_path, ["a"], ["a/0.png"], labels, resize=18, side=16, workers=0)
    assert describe_data(one, Data(image_size=16)).resize == 18
    assert describe_data(split(1, 1), Data(image_size=16, resize=40)).resize is None


def test_many_class_names_are_recorded_as_their_hash() -> None:
    def names(count: int) -> list[str] | str:
        one = split(2, count)
        data = describe_data(one, Data(image_size=8))
        return observe(logits_for(one.labels, count), one, data, MODEL, None).class_names

    assert len(names(1000)) == 1000
    found = names(1001)
    assert isinstance(found, str)
    assert len(found) == 64
    assert found != names(1002)


def test_a_class_name_that_is_not_utf8_is_written_out() -> None:
    one = MemorySplit(["ok", "a\udcff"], torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    found = observe(logits_for(one.labels, 2), one, describe_data(one, Data(image_size=8)), MODEL, None)
    assert found.class_names == ["ok", "a\\udcff"]


def test_a_made_up_baseline_has_the_answers_it_was_asked_for() -> None:
    one = baseline(10, wrong=[3, 9])
    assert np.flatnonzero(~one.answers()).tolist() == [3, 9]
    assert (one.correct_count, one.top1) == (8, 80.0)


def test_the_orientation_of_images_is_recorded_where_it_is_not_as_it_was() -> None:
    kept, turned = (
        describe_data(split(1, 1), Data(image_size=16, exif_orientation=turn)) for turn in (False, True)
    )
    assert "exif_orientation" not in kept.model_dump()
    assert turned.model_dump()["exif_orientation"] is True
    assert type(kept).model_validate(kept.model_dump()) == kept
