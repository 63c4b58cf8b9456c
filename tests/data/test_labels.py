"""Labels of tables: numbers, truth values, texts and categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qat.data.labels import labels_of
from qat.data.loading import load_every, load_split
from tests.helpers.parquet_sets import encoded, everything, refusal, settings

pytestmark = pytest.mark.usefixtures("alone")

TEXTS = ["cat", "dog", "cat", "emu"]


def write(path: Path, labels: Any, **more: Any) -> None:
    count = len(labels)
    content = {"image": [encoded(i) for i in range(count)], "label": labels, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(content), path)


@pytest.mark.parametrize("categorical", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_sorted_texts_of_the_training_split_are_the_classes(
    tmp_path: Path, categorical: bool, streaming: bool
) -> None:
    def column(labels: list[str]) -> Any:
        found = pa.array(labels)
        return found.dictionary_encode() if categorical else found

    write(tmp_path / "train.parquet", column(TEXTS))
    write(tmp_path / "test.parquet", column(["emu", "cat"]))
    data = settings(tmp_path, streaming=streaming)
    train, test = load_split(data, "train"), load_split(data, "test")
    assert train.class_names == test.class_names == ["cat", "dog", "emu"]
    assert everything(train)[1].tolist() == [0, 1, 0, 2]
    assert everything(test)[1].tolist() == [2, 0]


def test_a_text_that_no_training_image_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", TEXTS)
    write(tmp_path / "test.parquet", ["cat", "dgo"])
    message = refusal(settings(tmp_path), "test")
    assert (
        "1 labels in column 'label' are no class of the training split: 'dgo' in row 1 (did you mean"
        in message
    )
    assert "its classes are 'cat', 'dog', 'emu'" in message


@pytest.mark.parametrize("missing", [None, ""])
def test_missing_texts_are_refused_with_their_row(tmp_path: Path, missing: str | None) -> None:
    write(tmp_path / "train.parquet", ["cat", missing, "dog"])
    assert "1 labels are missing in column 'label', first in row 1" in refusal(settings(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_truth_values_are_the_classes_false_and_true(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "train.parquet", [True, False, True])
    write(tmp_path / "test.parquet", [True])
    split = load_split(settings(tmp_path, streaming=streaming), "train")
    assert split.class_names == ["false", "true"]
    assert everything(split)[1].tolist() == [1, 0, 1]


def test_categories_of_numbers_are_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pa.array([2, 0, 2]).dictionary_encode())
    assert load_split(settings(tmp_path), "train").class_names == ["0", "1", "2"]


def test_numbers_are_taken_before_texts_unless_a_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], word=["x", "y"])
    assert load_split(settings(tmp_path), "train").class_names == ["0", "1"]
    assert load_split(settings(tmp_path, label_column="word"), "train").class_names == ["x", "y"]


@pytest.mark.parametrize("labels", [[1, 2**62], pa.array([0, 2**64 - 1], pa.uint64()), [10**6, 0]])
def test_a_column_of_huge_numbers_is_refused_before_anything_is_made_of_them(
    labels: Any, tmp_path: Path
) -> None:
    write(tmp_path / "train.parquet", labels)
    message = refusal(settings(tmp_path))
    assert "column 'label' holds numbers up to " in message
    assert "allowed for labels: 0 to 999999" in message
    assert message.endswith("--set data.label_column=NAME")


def test_labels_of_named_classes_are_checked_as_before() -> None:
    from qat.data.columns import Columns

    columns = Columns("image", "label", ("a", "b"))
    assert labels_of(pa.chunked_array([[0, 1]]), columns, "t").tolist() == [0, 1]
    assert "kind" not in str(columns)  # part of the fingerprint of a streamed data set


def test_a_table_without_a_validation_split_holds_a_share_of_each_class_out(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0] * 5 + [1] * 5)
    train, test, final = load_every(settings(tmp_path, test_split=None))
    assert (len(train), test.labels.tolist(), final) == (8, [0, 1], None)
    assert not {train.image_name(i) for i in range(8)} & {test.image_name(i) for i in range(2)}
    assert everything(test)[0].shape[0] == 2
    assert "of images that are streamed none can be held out" in refusal(
        settings(tmp_path, test_split=None, streaming=True)
    )


def test_broken_images_of_a_table_are_left_out_on_request(tmp_path: Path) -> None:
    content = {"image": [encoded(0), b"broken", encoded(2)], "label": [0, 1, 1]}
    pq.write_table(pa.table(content), tmp_path / "train.parquet")
    split = load_split(settings(tmp_path, on_error="skip"), "train")
    assert everything(split)[1].tolist() == [0, 1]
    assert split.image_name(1) == "train.parquet: row 2"
    assert split.left_out is not None
    assert "1 foreign (" in split.left_out


def test_a_cache_that_cannot_be_written_is_blamed_with_the_variable_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    write(tmp_path / "train.parquet", [0, 1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nowhere/datasets"))
    message = refusal(settings(tmp_path))
    assert message.startswith("/proc/nowhere/datasets: the cache")
    assert message.endswith("environment variable HF_HOME")
