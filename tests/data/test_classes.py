"""That all splits have the same classes, and what is said where they don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat.data.loading import load_split, load_splits
from qat.errors import DataError
from tests.helpers.image_folders import everything, folder, make_tree, write_image


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_that_is_empty_in_one_split_and_absent_in_the_other_is_called_empty(
    tmp_path: Path, name: Any
) -> None:
    root = make_tree(tmp_path, train={"cat": 1, "dog": 0}, test={"cat": 1})
    with pytest.raises(
        DataError, match=r"train/dog: this class's folder has no images, and 'test' has no such"
    ):
        load_split(folder(root), name)


def test_what_an_empty_class_holds_instead_of_images_is_told(tmp_path: Path) -> None:
    root = make_tree(tmp_path, train={"cat": 1, "dog": 0})
    (root / "train" / "dog" / "all.zip").touch()
    with pytest.raises(DataError, match=r"class 'dog' \(passed over: 1 other files, such as .*all\.zip\)"):
        load_split(folder(root), "train")


def test_images_outside_of_class_folders_are_refused_with_words(tmp_path: Path) -> None:
    write_image(tmp_path / "horse.jpg")
    for data in (folder(tmp_path), folder(tmp_path.parent, train_split=tmp_path.name)):
        with pytest.raises(
            DataError, match=r"found 1 image without a folder \('horse\.jpg'\); the name of a"
        ):
            load_split(data, "train")


def test_parquet_files_in_place_of_folders_are_named_with_the_data_set_that_reads_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.parquet").touch()
    with pytest.raises(DataError, match=r"its Parquet files are read with --set data\.dataset=parquet"):
        load_split(folder(tmp_path), "train")


def test_accents_composed_in_one_split_and_decomposed_in_the_other_are_one_class(tmp_path: Path) -> None:
    # Decomposed, the name stands before "cafz"; composed, behind it.
    root = make_tree(tmp_path, train={"caf\u00e9": 1, "cafz": 2}, test={"cafe\u0301": 3, "cafz": 1})
    train, test = load_splits(folder(root))
    assert train.class_names == test.class_names == ["cafz", "caf\u00e9"]
    assert everything(train)[1].tolist() == [0, 0, 1]
    assert sorted(everything(test)[1].tolist()) == [0, 1, 1, 1]
