"""`qat runs`: what is listed, and what is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.toy_runs import fail, succeed, tune, tuned


@pytest.fixture
def two(toys: Path, tmp_path: Path) -> tuple[Path, Path]:
    first = tmp_path / "first"
    shutil.copytree(tuned(toys).parent, first)
    succeed(*tune(toys, tmp_path / "runs", "seed=7"), "-o", tmp_path / "second")
    return first, tmp_path / "second"


def test_runs_are_listed_with_what_came_out(two: tuple[Path, Path], tmp_path: Path) -> None:
    broken, unfinished = tmp_path / "broken", tmp_path / "unfinished"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("a: [", encoding="utf-8")
    shutil.copytree(two[0], unfinished)
    (unfinished / "summary.json").unlink()
    content = json.loads(succeed("runs", "--runs", tmp_path, "--json"))
    states = {Path(one["path"]).name: one["state"] for one in content["runs"]}
    assert states == {
        "first": "finished",
        "second": "finished",
        "broken": "damaged",
        "unfinished": "unfinished",
    }
    summary = json.loads((two[0] / "summary.json").read_text("utf-8"))
    (found,) = (one for one in content["runs"] if one["path"] == str(two[0]))
    assert (found["top1"], found["float_top1"]) == (summary["int8"]["top1"], summary["float"]["top1"])
    text = succeed("runs", "--runs", tmp_path)
    assert f"{summary['int8']['top1']:.2f} %" in text


def test_named_runs_are_compared_by_the_keys_that_differ(two: tuple[Path, Path]) -> None:
    content = json.loads(succeed("runs", *two, "--json"))
    assert content["differences"]["seed"] == ["0", "7"]
    assert "output.dir" not in content["differences"]
    assert "of their recipes that differ" in " ".join(succeed("runs", *two).split())
    assert "nothing differs" in succeed("runs", two[0], two[0])


def test_what_is_no_run_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such folder" in fail(2, "runs", "--runs", tmp_path / "absent")
    assert "no such run directory" in fail(2, "runs", two[0], tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no runs yet" in succeed("runs", "--runs", tmp_path / "empty")
