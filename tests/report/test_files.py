"""What a report reads of a run directory, whole or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.errors import QatError
from qat.report.files import mapping, read_run
from qat.runs import RunDirectory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("task: finetune\n", encoding="utf-8")
    (tmp_path / "summary.json").write_text(
        json.dumps({"task": "finetune", "pretrained_sha256": "ab", "data": {"test": "cd"}}), encoding="utf-8"
    )
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "loss": NaN}\n', encoding="utf-8")
    return tmp_path


def test_a_whole_run_has_no_problems(folder: Path) -> None:
    (folder / "bench.json").write_text('{"results": []}', encoding="utf-8")
    files = read_run(RunDirectory(folder))
    assert list(files.problems) == []
    assert [row["epoch"] for row in files.metrics] == [1, 2]
    assert (files.pretrained_sha256, files.test_fingerprint) == ("ab", "cd")
    assert files.bench == {"results": []}
    assert files.recipe == "task: finetune\n"
    assert files.model == folder / "model.onnx"


@pytest.mark.parametrize(
    ("text", "rows", "problem"),
    [
        ('{"epoch": 1}\n{"epoch": 2, "lo', 1, "1 line of metrics.jsonl cannot be read and is left out."),
        ("\xff\n[1]\n\n{}", 1, "2 lines of metrics.jsonl cannot be read and are left out."),
        ("", 0, None),
        (None, 0, None),
    ],
)
def test_damaged_lines_cost_their_epochs_alone(
    folder: Path, text: str | None, rows: int, problem: str | None
) -> None:
    if text is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    files = read_run(RunDirectory(folder))
    assert len(files.metrics) == rows
    assert list(files.problems) == ([problem] if problem else [])


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_summary_is_said(folder: Path, text: str) -> None:
    (folder / "summary.json").write_text(text, encoding="utf-8")
    files = read_run(RunDirectory(folder))
    assert "summary.json" in files.problems[0]
    assert (files.summary, files.pretrained_sha256, files.test_fingerprint) == ({}, None, None)


def test_a_run_that_broke_off_is_said_to_have(folder: Path) -> None:
    (folder / "summary.json").unlink()
    assert "not a finished run" in read_run(RunDirectory(folder)).problems[0]


def test_a_damaged_measurement_is_said(folder: Path) -> None:
    (folder / "bench.json").write_text("{", encoding="utf-8")
    files = read_run(RunDirectory(folder))
    assert files.bench is None
    assert files.problems[0].startswith("bench.json cannot be read: ")


def test_a_run_without_its_recipe_is_refused(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()
    with pytest.raises(QatError, match=r"recipe\.yaml: cannot be read"):
        read_run(RunDirectory(folder))


def test_what_is_no_object_is_an_empty_one() -> None:
    assert mapping([1]) == {}
    assert mapping({"a": 1}) == {"a": 1}
