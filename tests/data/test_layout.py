"""Which splits a data set has, by the names that people give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat.data.loading import load_every, load_for_training, load_split
from qat.errors import DataError
from qat.recipe.schema import Data
from tests.helpers.image_folders import make_tree

CLASSES = {"a": 5, "b": 5}


def made(root: Path, *splits: str) -> Path:
    return make_tree(root, **dict.fromkeys(splits, CLASSES))


def settings(root: Path, **changes: Any) -> Data:
    return Data(**({"dataset": "imagefolder", "root": str(root), "image_size": 8} | changes))


def names(data: Data) -> list[str | None]:
    return [split.name for split in load_every(data).every]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "validation"), ["train", "validation"]),
        (("train", "val"), ["train", "val"]),
        (("train", "valid", "test"), ["train", "valid", "test"]),
        (("Train", "Val", "TEST"), ["Train", "Val", "TEST"]),
        (("training", "validation"), ["training", "validation"]),
        (("train", "test"), ["train", "test"]),
        (("train",), ["train", "20 % held out of train"]),
        (("train", "validation", "more"), ["train", "validation"]),
    ],
)
def test_splits_are_found_by_their_usual_names(
    tmp_path: Path, splits: tuple[str, ...], expected: list[str]
) -> None:
    assert names(settings(made(tmp_path, *splits))) == expected


def test_one_folder_of_classes_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    for root in (tmp_path / "one", tmp_path / "other"):
        make_tree(root.parent, **{root.name: CLASSES})
    found = [load_every(settings(tmp_path / name)) for name in ("one", "other")]
    train, test, final = found[0]
    assert (len(train), len(test), final) == (8, 2, None)
    assert test.labels.tolist() == [0, 1]
    held = {test.image_name(i) for i in range(2)}
    assert not held & {train.image_name(i) for i in range(8)}
    assert held == {found[1].test.image_name(i) for i in range(2)}
    assert test.notes == [
        "validation: 2 of 10 images are held out of training, 20 % of each class (data.validation_share)"
    ]


def test_a_share_takes_the_place_of_a_validation_split_and_test_comes_last(tmp_path: Path) -> None:
    data = settings(made(tmp_path, "train", "test"), validation_share=0.4)
    assert names(data) == ["train", "40 % held out of train", "test"]
    assert [len(split) for split in load_every(data).every] == [6, 4, 10]


def test_a_share_beside_a_validation_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation_share: found 0\.3, but .* has a split 'val'"):
        names(settings(made(tmp_path, "train", "val"), validation_share=0.3))


def test_choosing_epochs_on_the_test_split_is_told(tmp_path: Path) -> None:
    _, test, final = load_for_training(settings(made(tmp_path, "train", "test")))
    assert final is None
    assert [note for note in test.notes if "epochs are chosen on 'test'" in note]


def test_splits_can_be_named_otherwise_and_the_last_be_switched_off(tmp_path: Path) -> None:
    root = made(tmp_path, "train", "validation", "test", "extra")
    assert names(settings(root, final_split="extra")) == ["train", "validation", "extra"]
    assert names(settings(root, final_split="validation")) == ["train", "validation"]
    assert names(settings(root, test_split="test")) == ["train", "test"]
    with pytest.raises(DataError, match=r"data\.final_split: .* no folder 'extr' \(did you mean 'extra'\?\)"):
        names(settings(root, final_split="extr"))


@pytest.mark.parametrize("flat", [True, False])
def test_a_test_folder_without_these_classes_is_left_aside_and_told(tmp_path: Path, flat: bool) -> None:
    root = made(tmp_path, "train", "val")
    make_tree(root, test={"" if flat else "images": 2})
    train, test, final = load_for_training(settings(root))
    assert final is None
    assert [note for note in test.notes if "'test' is left aside: it has" in note]
    assert (len(train), len(test)) == (10, 10)


def test_two_spellings_of_one_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'validation' could be 'val' or 'valid'; name the one with"):
        names(settings(made(tmp_path, "train", "val", "valid")))
    assert names(settings(tmp_path, test_split="valid")) == ["train", "valid"]


def test_a_class_called_train_is_taken_where_the_root_is_named_as_the_split(tmp_path: Path) -> None:
    make_tree(tmp_path, vehicles={"train": 5, "bus": 5})
    with pytest.raises(DataError, match=r"if 'train' is a class itself, set data\.train_split=\."):
        names(settings(tmp_path / "vehicles"))
    split = load_split(settings(tmp_path / "vehicles", train_split="."), "train")
    assert (split.class_names, len(split)) == (["bus", "train"], 8)


def test_a_root_above_the_data_set_is_refused_with_the_one_that_is_meant(tmp_path: Path) -> None:
    made(tmp_path / "download" / "set", "train", "val")
    with pytest.raises(DataError, match=r"its folder 'set' has: --set data\.root=.*/download/set$"):
        names(settings(tmp_path / "download"))


def test_a_relative_root_with_dots_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "data", "train", "val")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert names(settings(Path("../data"))) == ["train", "val"]


def test_an_archive_as_root_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "images.tar.gz").touch()
    with pytest.raises(DataError, match=r"images\.tar\.gz is an archive; unpack it"):
        names(settings(tmp_path / "images.tar.gz"))
