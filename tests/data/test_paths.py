"""Where data sets are looked for: ``data.root`` in the working directory, and the folder of ``QAT_DATA``."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.data.loading import load_split
from qat.recipe.schema import Data
from tests.helpers.parquet_sets import refusal, settings, write

pytestmark = pytest.mark.usefixtures("alone")


def test_cifar10_is_found_in_its_root_and_in_the_variables_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "all" / "cifar10" / "test.parquet", [0, 1])
    write(tmp_path / "other" / "plain_text" / "test-00000-of-00001.parquet", [0], image="img")
    given = Data(dataset="cifar10", root=str(tmp_path / "other"), image_size=32)
    assert len(load_split(given, "test")) == 1
    monkeypatch.setenv("QAT_DATA", str(tmp_path / "all"))
    assert len(load_split(Data(dataset="cifar10", image_size=32), "test")) == 2
    assert len(load_split(given, "test")) == 1


def test_a_relative_root_is_looked_for_here_and_then_in_the_variables_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "all" / "mine" / "train.parquet", [0, 1])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "here/mine does not exist; name another" in refusal(settings(Path("mine")))
    monkeypatch.setenv("QAT_DATA", str(tmp_path / "all"))
    assert len(load_split(settings(Path("mine")), "train")) == 2
    write(tmp_path / "here" / "mine" / "train.parquet", [0])
    assert len(load_split(settings(Path("mine")), "train")) == 1
    assert "nor is it in QAT_DATA, which is " in refusal(settings(Path("absent")))


def test_a_variable_that_names_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_DATA", str(tmp_path / "nowhere"))
    assert refusal(Data(dataset="cifar10")).startswith(f"QAT_DATA: {tmp_path}/nowhere does not exist")
    (tmp_path / "nowhere").touch()
    assert "nowhere is not a folder" in refusal(Data(dataset="cifar10"))
