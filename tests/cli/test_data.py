"""`qat data check`, and data sets as people have them in `qat finetune`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.image_folders import make_tree
from tests.helpers.toy_runs import fail, image_folder, qat, settings, succeed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images", train={"a": 2, "b": 3}, val={"a": 1, "b": 1}, test={"a": 1, "b": 2})


def test_a_whole_data_set_passes_with_a_table_of_its_splits(root: Path) -> None:
    shown = succeed("data", "check", "--data", root)
    for part in ("train (to train on)", "val (to choose epochs on)", "test (for the last figure)", "2–3"):
        assert part in shown
    assert shown.endswith("every image can be decoded\n")


def test_problems_are_counted_and_named_and_the_exit_code_is_1(root: Path) -> None:
    for index in range(25):
        (root / "val" / "a" / f"{index:02}.jpg").write_text("no image")
    (root / "test" / "b" / "dead.png").symlink_to("/nowhere")
    result = qat("data", "check", "--data", root)
    assert result.exit_code == 1
    assert "dead.png: dangling link: link that leads nowhere" in result.stdout
    assert "… and 6 more, which --json lists" in result.stdout
    assert "26 cannot be used: 1 dangling link, 25 foreign; repair or remove them" in result.stdout
    found = json.loads(qat("data", "check", "--data", root, "--json").stdout)
    assert len(found["problems"]) == 26
    assert found["counts"] == {"dangling link": 1, "unreadable": 0, "foreign": 25, "broken": 0}
    assert [(one["name"], one["purpose"]) for one in found["splits"]] == [
        ("train", "train"),
        ("val", "test"),
        ("test", "final"),
    ]


def test_the_data_of_a_recipe_is_checked_as_the_recipe_has_it(root: Path) -> None:
    assert "validation (to choose epochs on)" in succeed("data", "check", "--recipe", "tiny_int8")
    overrides = settings(["data.dataset=imagefolder", f"data.root={root}", "data.test_split=test"])
    shown = succeed("data", "check", "--recipe", "tiny_int8", *overrides)
    assert "test (to choose epochs on)" in shown
    assert "val (" not in shown


def test_a_check_without_a_data_set_or_of_none_is_refused(tmp_path: Path) -> None:
    assert "say which data set" in fail(2, "data", "check")
    assert "does not exist" in fail(2, "data", "check", "--data", tmp_path / "nowhere")
    assert "found none" in fail(2, "data", "check", "--data", tmp_path)
    assert "give one with --recipe" in fail(2, "data", "check", "--data", tmp_path, "--set", "data.workers=1")


def test_a_run_names_its_splits_and_measures_the_third_one_last(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "validation").rename(root / "val")
    image_folder(tmp_path / "more", train=0, test=3)
    (tmp_path / "more" / "validation").rename(root / "test")
    overrides = ["data.dataset=imagefolder", f"data.root={root}", "data.image_size=8", "data.batch_size=4"]
    overrides += [
        "model.num_classes=2",
        "model.widths=[8,8,16]",
        "schedule.epochs=1",
        "threads=1",
        "device=cpu",
    ]
    overrides += [f"output.dir={tmp_path / 'runs'}"]
    shown = succeed("pretrain", "--recipe", "tiny_digits_pretrain", *settings(overrides))
    assert "epoch 1 on test, which no epoch was chosen on: top-1 " in shown
    assert "% on val, 12 images (epoch 1)" in shown
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["measured_on"] == {"binary": "val", "final": "test"}
    assert (summary["binary"]["n"], summary["final"]["n"]) == (12, 6)
    again = json.loads(succeed("evaluate", run, "--set", "data.test_split=test", "--json"))
    assert again["top1"] == summary["final"]["top1"]
    succeed("report", run)
    assert "Top-1 on test" in (run / "report.html").read_text()


def test_a_left_out_image_is_told_where_accuracy_is_measured(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "images", train={"a": 4, "b": 4}, val={"a": 3, "b": 3})
    (root / "val" / "a" / "0.png").write_text("no image")
    overrides = ["data.dataset=imagefolder", f"data.root={root}", "data.image_size=8", "data.batch_size=4"]
    overrides += [
        "model.num_classes=2",
        "model.widths=[8,8,16]",
        "schedule.epochs=1",
        "threads=1",
        "device=cpu",
    ]
    overrides += [f"output.dir={tmp_path / 'runs'}"]
    line = fail(2, "pretrain", "--recipe", "tiny_digits_pretrain", *settings(overrides))
    assert "1 file cannot be used: 1 foreign (val/a/0.png): no image of a known format" in line
    assert not (tmp_path / "runs").exists()
    shown = succeed(
        "pretrain", "--recipe", "tiny_digits_pretrain", *settings([*overrides, "data.on_error=skip"])
    )
    assert "val: left out: 1 foreign (a/0.png)" in shown
    (run,) = (tmp_path / "runs").iterdir()
    result = qat("evaluate", run)
    assert (result.exit_code, "of 5 images" in result.stdout) == (0, True)
    assert "warning: val: left out: 1 foreign (a/0.png)" in result.stderr.replace("\n", " ")
