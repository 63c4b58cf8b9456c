"""Training images that are streamed: every image once, in an order that a seed decides."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qat.data.loading import load_split
from qat.data.table import TableSplit
from qat.errors import DataError
from qat.recipe.schema import Data
from qat.system.launch import Share
from tests.helpers.parquet_sets import CLASSES, encoded, everything, refusal, settings, write

pytestmark = pytest.mark.usefixtures("alone")


def sharded(root: Path, files: int = 4, rows: int = 6) -> Data:
    for i in range(files):
        labels = [(i + row) % 3 for row in range(rows)]
        write(root / f"train-0000{i}-of-0000{files}.parquet", labels, seed=100 * i)
    write(root / "test.parquet", [0, 1], seed=999)
    return settings(root, streaming=True, shuffle_buffer=5)


def test_a_stream_gives_every_image_once_as_the_stored_split_does(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    stored = load_split(data.model_copy(update={"streaming": False}), "train")
    streamed = load_split(data, "train")
    assert (len(streamed), streamed.class_names, streamed.resize) == (24, CLASSES, 18)
    plain, expected = everything(streamed), everything(stored)
    assert torch.equal(plain[0], expected[0])
    assert torch.equal(plain[1], expected[1])
    shuffled = everything(streamed, shuffle_seed=1)
    assert sorted(map(hash, map(bytes, shuffled[0].numpy()))) == sorted(
        map(hash, map(bytes, plain[0].numpy()))
    )
    assert not torch.equal(shuffled[0], plain[0])


def test_a_seed_alone_decides_the_order_of_a_stream(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    first = everything(load_split(data, "train"), shuffle_seed=3)
    before = torch.get_rng_state()
    more = data.model_copy(update={"workers": 3})
    assert torch.equal(first[0], everything(load_split(more, "train"), shuffle_seed=3)[0])
    assert not torch.equal(first[0], everything(load_split(data, "train"), shuffle_seed=4)[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_gone_on_with_equals_one_that_was_not_interrupted(tmp_path: Path, drop_last: bool) -> None:
    split = load_split(sharded(tmp_path), "train")
    every = list(split.batches(5, shuffle_seed=2, drop_last=drop_last))
    assert len(every) == split.batch_count(5, drop_last) == (4 if drop_last else 5)
    for skip in range(len(every) + 1):
        left = list(split.batches(5, shuffle_seed=2, drop_last=drop_last, skip=skip))
        assert len(left) == len(every) - skip
        for found, expected in zip(left, every[skip:], strict=True):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("size", [2, 6])
def test_shares_are_parts_of_the_same_batches(tmp_path: Path, streaming: bool, size: int) -> None:
    """Six processes share batches of 5 images, so that one of them has no image of any batch."""
    data = sharded(tmp_path).model_copy(update={"streaming": streaming, "in_memory": False})
    split = load_split(data, "train")
    every = list(split.batches(5, shuffle_seed=2, skip=1))
    found = []
    for rank in range(size):
        split.share = Share(rank, size)
        found.append(list(split.batches(5, shuffle_seed=2, skip=1)))
    for batch, *parts in zip(every, *found, strict=True):
        assert all(part[0].shape[1:] == batch[0].shape[1:] for part in parts)
        for index in (0, 1):
            assert torch.equal(torch.cat([part[index] for part in parts]), batch[index])


def test_the_test_split_is_stored_where_training_images_are_streamed(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    assert isinstance(load_split(data, "test"), TableSplit)
    train = load_split(data, "train")
    with pytest.raises(DataError, match=r"is streamed, so its labels .* data\.streaming=false"):
        _ = train.labels
    with pytest.raises(DataError, match="no image can be picked"):
        train.evenly(2)


def test_the_fingerprint_of_a_stream_changes_with_its_files(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    before = load_split(data, "train").fingerprint()
    assert load_split(data, "train").fingerprint() == before
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("*.parquet"):
        shutil.copy(file, tmp_path / "moved")
    moved = data.model_copy(update={"root": str(tmp_path / "moved")})
    assert load_split(moved, "train").fingerprint() == before
    write(tmp_path / "train-00000-of-00004.parquet", [0, 1, 2, 0, 1, 1])
    assert load_split(data, "train").fingerprint() != before


def test_what_is_wrong_with_a_streamed_row_is_named(tmp_path: Path) -> None:
    data = sharded(tmp_path)
    path = tmp_path / "train-00001-of-00004.parquet"
    write(path, [0, 1], images=[encoded(1), b"no image"])
    assert "train-*.parquet, file 2 of 4: row 1: cannot be decoded" in refusal(data)
    write(path, [0, 1], images=[encoded(1), None])
    assert "row 1: holds no image in column 'image'" in refusal(data)


@pytest.mark.parametrize("label", [7, None])
def test_a_wrong_label_is_refused_before_streaming_and_while(tmp_path: Path, label: int | None) -> None:
    data = sharded(tmp_path)
    split = load_split(data, "train")
    write(tmp_path / "train-00001-of-00004.parquet", [0, label])
    with pytest.raises(
        DataError, match=f"file 2 of 4: row 1: found {label} in column 'label', allowed: 0 to 2"
    ):
        everything(split)
    assert "train-00001-of-00004.parquet: 1 labels" in refusal(data)


def test_a_stream_whose_file_goes_or_shrinks_is_refused(tmp_path: Path) -> None:
    split = load_split(sharded(tmp_path), "train")
    write(tmp_path / "train-00002-of-00004.parquet", [0])
    with pytest.raises(DataError, match="ended before the 24 images"):
        everything(split)
    (tmp_path / "train-00002-of-00004.parquet").unlink()
    with pytest.raises(DataError, match="cannot be read on: "):
        everything(split)
