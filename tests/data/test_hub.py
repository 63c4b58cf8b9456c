"""Data sets of the Hub, which local Parquet files stand in for: no test here uses the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from qat.data.loading import load_split
from qat.data.split import Split
from qat.data.stream import StreamedSplit
from qat.errors import DataError
from qat.recipe.schema import Data
from tests.helpers.parquet_sets import CLASSES, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for `load_dataset` and `dataset_info`: repositories are folders of Parquet files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[tuple[Any, ...]] = []
        self.trouble: Exception | None = None
        self.counts = True
        self.commit = COMMIT
        self._load = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)

    def info(self, repo_id: str, *, revision: str | None, timeout: float) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return SimpleNamespace(sha=self.commit)

    def load(self, name: str, config: str | None = None, **options: Any) -> Any:
        if name == "parquet":
            return self._load(name, config, **options)
        split, revision = options.pop("split"), options.pop("revision")
        self.asked.append((name, config, split, revision, options.get("streaming", False)))
        files = {file.stem: str(file) for file in sorted((self.folder / name).glob("*.parquet"))}
        if split not in files:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(files)}.")
        found = self._load("parquet", data_files=files, split=split, **options)
        if options.get("streaming") and self.counts:
            rows = self._load("parquet", data_files=files, split=split).num_rows
            infos = {split: datasets.SplitInfo(name=split, num_examples=rows)}
            found.info.splits = datasets.splits.SplitDict(infos)
        return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.delenv("QAT_DATA", raising=False)
    for name in ("uoft-cs/cifar10", "some/images"):
        write(tmp_path / name / "train.parquet", [0, 1, 2, 0, 1], image="img")
        write(tmp_path / name / "test.parquet", [2, 1], image="img", seed=40)
    return Hub(tmp_path, monkeypatch)


def settings(**changes: Any) -> Data:
    base = {"dataset": "hub", "name": "some/images", "image_size": 16, "test_split": "test"}
    return Data(**(base | changes))


def everything(split: Split, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*split.batches(2, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def refusal(data: Data, name: Any = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_split(data, name)
    return str(caught.value)


def test_a_repository_is_read_at_the_commit_that_was_found(hub: Hub) -> None:
    split = load_split(settings(config="small", revision="main"), "train")
    assert hub.asked == [("some/images", "small", "train", COMMIT, False)]
    assert (split.class_names, split.labels.tolist()) == (CLASSES, [0, 1, 2, 0, 1])
    assert everything(split)[0].shape == (5, 3, 16, 16)


def test_cifar10_comes_from_the_hub_where_it_is_nowhere_else(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load_split(Data(dataset="cifar10", image_size=32), "test")) == 2
    assert hub.asked == [("uoft-cs/cifar10", None, "test", COMMIT, False)]
    (hub.folder / "cifar10").mkdir()
    write(hub.folder / "cifar10" / "test.parquet", [0])
    monkeypatch.setenv("QAT_DATA", str(hub.folder))
    assert len(load_split(Data(dataset="cifar10", image_size=32), "test")) == 1
    assert len(hub.asked) == 1


def test_the_same_images_on_the_hub_and_in_a_folder_have_one_fingerprint(hub: Hub) -> None:
    local = Data(dataset="parquet", root=str(hub.folder / "some/images"), image_size=16, test_split="test")
    for name in ("train", "test"):
        ours, theirs = load_split(settings(), name), load_split(local, name)  # type: ignore[arg-type]
        assert ours.content_fingerprint() == theirs.content_fingerprint()
        assert torch.equal(everything(ours)[0], everything(theirs)[0])


def test_training_images_are_streamed_and_test_images_stored_in_their_order(hub: Hub) -> None:
    stored, streamed = settings(), settings(streaming=True)
    train, test = load_split(streamed, "train"), load_split(streamed, "test")
    assert isinstance(train, StreamedSplit)
    assert torch.equal(everything(train)[0], everything(load_split(stored, "train"))[0])
    assert torch.equal(everything(test)[0], everything(load_split(stored, "test"))[0])
    assert test.labels.tolist() == [2, 1]
    assert [ask[-1] for ask in hub.asked] == [True, True, False, False]


def test_the_fingerprint_of_a_stream_is_of_its_commit(hub: Hub) -> None:
    before = load_split(settings(streaming=True), "train").fingerprint()
    assert load_split(settings(streaming=True), "train").fingerprint() == before
    hub.commit = "f" * 40
    assert load_split(settings(streaming=True), "train").fingerprint() != before


def test_a_stream_of_unknown_length_or_classes_is_refused(hub: Hub) -> None:
    hub.counts = False
    assert "does not say how many images it has" in refusal(settings(streaming=True))
    write(hub.folder / "some/images/train.parquet", [0, 1], names=None)
    write(hub.folder / "some/images/test.parquet", [0, 2], names=None)
    assert "integers without class names" in refusal(settings(streaming=True))
    assert load_split(settings(), "train").class_names == ["0", "1", "2"]


def test_a_split_or_column_that_is_not_there_is_refused(hub: Hub) -> None:
    message = refusal(settings(test_split="dev"), "test")
    assert message == (
        "data.test_split: 'dev' of some/images on the Hub: Unknown split 'dev'. Should be one of "
        "['test', 'train']."
    )
    assert "some/images (train) has no column 'image'" in refusal(settings(image_column="image"))


def test_what_is_here_is_used_without_a_network_and_what_is_not_is_refused_in_words(hub: Hub) -> None:
    hub.trouble = OSError("no route to host")
    assert len(load_split(settings(revision="v1"), "train")) == 5
    assert hub.asked[0][3] == "v1"
    message = refusal(settings(name="other/images"))
    assert message.startswith(
        "data.name: other/images is not on this machine, and the Hugging Face Hub cannot"
    )
    assert "no route to host" in message
    (hub.folder / "uoft-cs/cifar10/test.parquet").unlink()
    message = refusal(Data(dataset="cifar10"), "test")
    assert "data.root is unset" in message
    assert "QAT_DATA" in message
    assert "uoft-cs/cifar10" in message


def test_a_name_that_cannot_be_one_is_refused() -> None:
    assert "data.name: 'a/b/c' is not to be had from the Hub" in refusal(settings(name="a/b/c"))


def test_being_offline_is_put_back(hub: Hub) -> None:
    before = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    hub.trouble = OSError("no route to host")
    refusal(settings(name="other/images"))
    assert before == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


def test_a_fresh_process_without_a_network_says_so(tmp_path: Path) -> None:
    """This runs the real libraries, offline and with an empty cache."""
    code = "from qat.data.loading import load_split as load, Data; load(Data(dataset='cifar10'), 'test')"
    environment = {key: value for key, value in os.environ.items() if key != "QAT_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "qat.errors.DataError: data.root is unset, QAT_DATA names no folder with" in done.stderr
