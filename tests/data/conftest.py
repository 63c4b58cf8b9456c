"""Fixtures for data sets: folders of images and Parquet files, and caches outside of the home directory."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.image_folders import make_tree
from tests.helpers.parquet_sets import LABELS, write


@pytest.fixture(autouse=True, scope="module")
def _caches_stay_out_of_the_home_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))
        yield


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images", train={"cat": 3, "dog": 2}, test={"cat": 1, "dog": 2})


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No caches in the home directory, no data sets of this machine, no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.delenv("QAT_DATA", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "train.parquet", LABELS)
    write(tmp_path / "set" / "test.parquet", [2, 1], seed=50)
    return tmp_path / "set"
