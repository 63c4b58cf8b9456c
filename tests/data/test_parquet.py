"""Parquet folders, from files to batches. Each valid case is followed by a broken one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qat.data.folder import FolderSplit
from qat.data.loading import load_split
from qat.data.table import TableSplit
from qat.errors import DataError
from qat.recipe.schema import Augment, Data
from tests.helpers.parquet_sets import CLASSES, LABELS, encoded, everything, refusal, settings, write

pytestmark = pytest.mark.usefixtures("alone")


def test_a_split_has_the_labels_classes_and_size_asked_for(root: Path) -> None:
    split = load_split(settings(root), "train")
    images, labels = everything(split)
    assert (images.shape, images.dtype) == ((7, 3, 16, 16), torch.uint8)
    assert labels.tolist() == split.labels.tolist() == LABELS
    assert (split.class_names, split.resize) == (CLASSES, 18)
    assert split.image_name(3) == "train.parquet: row 3"


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 1), (True, 1)])
def test_the_same_files_in_folders_give_the_same_pixels_and_content_fingerprint(
    tmp_path: Path, in_memory: bool, workers: int
) -> None:
    labels = [0, 0, 1, 1, 2]
    images = [encoded(i, (20 + i, 30), "JPEG") for i in range(5)]
    write(tmp_path / "set" / "train.parquet", labels, images=images)
    for i, (label, content) in enumerate(zip(labels, images, strict=True)):
        file = tmp_path / "folders" / "train" / CLASSES[label] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    folders = load_split(settings(tmp_path / "folders", dataset="imagefolder"), "train")
    split = load_split(settings(tmp_path / "set", in_memory=in_memory, workers=workers), "train")
    assert isinstance(folders, FolderSplit)
    assert isinstance(split, TableSplit)
    for seed in (None, 3):
        for _ in range(2):  # the second time from memory
            found = everything(split, shuffle_seed=seed)
            expected = everything(folders, shuffle_seed=seed)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert split.content_fingerprint() == split.fingerprint() == folders.content_fingerprint()


def test_images_that_have_the_size_already_are_not_resampled(tmp_path: Path) -> None:
    write(tmp_path / "cifar10" / "train.parquet", [0], size=(16, 16))
    data = Data(dataset="cifar10", root=str(tmp_path / "cifar10"), image_size=16)
    images, _ = everything(load_split(data, "train"))
    import io

    import numpy as np
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(encoded(0, (16, 16)))))
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(pixels))


def test_training_images_are_larger_only_when_a_random_crop_follows(root: Path) -> None:
    crop = settings(root, augment=Augment(crop=(0.5, 1.0)))
    assert everything(load_split(crop, "train"))[0].shape[-1] == 18
    assert everything(load_split(crop, "test"))[0].shape[-1] == 16


@pytest.mark.parametrize("in_memory", [True, False])
def test_skipped_batches_are_not_decoded_and_the_others_stay_as_they_are(root: Path, in_memory: bool) -> None:
    data = settings(root, in_memory=in_memory)
    every = list(load_split(data, "train").batches(2, shuffle_seed=4))
    left = list(load_split(data, "train").batches(2, shuffle_seed=4, skip=2))
    assert len(left) == len(every) - 2
    for found, expected in zip(left, every[2:], strict=True):
        assert torch.equal(found[0], expected[0])
    write(root / "train.parquet", LABELS, images=[b"broken", *(encoded(i) for i in range(6))])
    split = load_split(data, "train")
    assert len(list(split.batches(1, skip=1))) == 6
    with pytest.raises(
        DataError, match=r"train\.parquet: row 0: cannot be decoded: cannot identify image file; `qat data"
    ):
        list(split.batches(1))


def test_an_iterator_left_early_leaves_the_split_usable(root: Path) -> None:
    split = load_split(settings(root), "train")
    next(split.batches(2))
    assert torch.equal(everything(split)[0], everything(load_split(settings(root), "train"))[0])


def test_a_fingerprint_changes_with_an_image_a_label_and_the_order(tmp_path: Path) -> None:
    images = [encoded(i) for i in range(3)]
    variants = [
        ([0, 1, 2], images),
        ([0, 2, 2], images),
        ([0, 1, 2], [*images[:2], images[2][:-1] + b"x"]),
        ([1, 0, 2], [images[1], images[0], images[2]]),
    ]
    found = []
    for i, (labels, content) in enumerate(variants):
        write(tmp_path / str(i) / "train.parquet", labels, images=content)
        found.append(load_split(settings(tmp_path / str(i)), "train").fingerprint())
    assert len(set(found)) == 4
    again = load_split(settings(tmp_path / "0", in_memory=False, image_size=8), "train")
    assert again.fingerprint() == found[0]


def test_the_fingerprint_of_large_sets_is_over_sizes_and_labels(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.data.table.IN_MEMORY_BYTES", 100)
    split = load_split(settings(root), "train")
    assert split.fingerprint() != split.content_fingerprint()
    shutil.copy(root / "train.parquet", root / "again.parquet")
    assert load_split(settings(root, train_split="again"), "train").fingerprint() == split.fingerprint()
    write(root / "again.parquet", [*LABELS[:-1], 0])
    assert load_split(settings(root, train_split="again"), "train").fingerprint() != split.fingerprint()


def test_shards_are_read_in_the_order_of_their_names_and_errors_name_them(root: Path) -> None:
    for i in range(3):
        write(
            root / f"part-0000{i}-of-00003.parquet",
            [i, i],
            images=[encoded(i), b"x" if i == 2 else encoded(9)],
        )
    split = load_split(settings(root, train_split="part"), "train")
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match=r"part-00002-of-00003\.parquet: row 1: cannot be decoded"):
        everything(split)
    (root / "part-00001-of-00003.parquet").unlink()
    assert "found 2 files part-*.parquet, but part-00000-of-00003.parquet says that there are 3" in refusal(
        settings(root, train_split="part")
    )


def test_bare_integers_are_numbered_up_to_the_largest_of_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], names=None)
    write(tmp_path / "test.parquet", [0, 3], names=None)
    for name in ("train", "test"):
        assert load_split(settings(tmp_path), name).class_names == ["0", "1", "2", "3"]  # type: ignore[arg-type]


def test_raw_bytes_are_images_too(tmp_path: Path) -> None:
    content = pa.table({"picture": [encoded(1), encoded(2)], "kind": [1, 0]})
    pq.write_table(content, tmp_path / "train.parquet")
    images, labels = everything(load_split(settings(tmp_path), "train"))
    assert (len(images), labels.tolist()) == (2, [1, 0])


def test_missing_splits_and_files_are_refused_naming_what_is_there(root: Path) -> None:
    assert "data.test_split: " in refusal(settings(root, test_split="tests"), "test")
    assert "(did you mean 'test'?); it has test, train" in refusal(settings(root, test_split="tests"), "test")
    write(root / "train-extra.parquet", [0])
    assert "has both train.parquet and train-extra.parquet" in refusal(settings(root))
    (root / "bare").mkdir()
    assert "it has no *.parquet file" in refusal(settings(root / "bare"))


def test_wrong_columns_are_refused_with_a_list_of_them(root: Path) -> None:
    assert "data.image_column: " in refusal(settings(root, image_column="img"))
    assert "has image (Image), label (ClassLabel)" in refusal(settings(root, image_column="img"))
    assert "column 'image' holds no class labels" in refusal(settings(root, label_column="image"))
    pq.write_table(pa.table({"text": ["a"]}), root / "words.parquet")
    assert "has no column of images; it has text (string)" in refusal(settings(root, train_split="words"))
    pq.write_table(pa.table({"a": [b""], "b": [b""], "label": [0]}), root / "two.parquet")
    message = refusal(settings(root, train_split="two"))
    assert "several columns of images: a, b; choose one with --set data.image_column=NAME" in message


def test_labels_that_are_missing_or_out_of_range_are_refused_with_their_rows(root: Path) -> None:
    write(root / "train.parquet", [0, None, 1])
    assert "1 labels are missing in column 'label', first in row 1" in refusal(settings(root))
    write(root / "train.parquet", [0, -1, 3])
    message = refusal(settings(root))
    assert "2 labels in column 'label' are out of range: -1 in row 1, 3 in row 2; allowed: 0 to 2" in message


def test_an_empty_split_a_missing_image_and_a_broken_file_are_refused(root: Path) -> None:
    write(root / "train.parquet", [0, 1], images=[encoded(0), None])
    assert "train.parquet: row 1: holds no image in column 'image'" in refusal(settings(root))
    write(root / "train.parquet", [])
    assert refusal(settings(root)).endswith("train.parquet: holds no images")
    (root / "train.parquet").write_bytes(b"PAR1 no")
    assert "train.parquet: cannot be read as Parquet: " in refusal(settings(root))


@pytest.mark.parametrize("name", ["train", "test"])
def test_splits_with_different_classes_are_refused(root: Path, name: Any) -> None:
    write(root / "test.parquet", [0], names=["cat", "dog", "fox"])
    assert "must have the same classes, but 'emu' is in one alone" in refusal(settings(root), name)
    write(root / "test.parquet", [0], names=["dog", "cat", "emu"])
    assert "must have the same classes, but the order is another" in refusal(settings(root), name)


def test_files_of_a_split_must_agree(root: Path) -> None:
    write(root / "part-0.parquet", [0])
    write(root / "part-1.parquet", [0], label="kind")
    assert "part-1.parquet: has other columns or classes than part-0.parquet" in refusal(
        settings(root, train_split="part")
    )
