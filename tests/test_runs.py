"""Run directories: how they are made and found, and that damaged ones are not found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.errors import OutputError, QatError
from qat.recipe.loading import load_recipe, resolve_checkpoint
from qat.runs import RunDirectory, find_run, newest_run
from tests.helpers.toy_runs import recipe


def finished(root: Path, name: str, content: object) -> Path:
    """A folder that looks like a finished run; ``content`` is its summary, as JSON or as text."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(b"x")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "summary.json").write_text(text, encoding="utf-8")
    return folder


def test_a_new_run_holds_its_resolved_recipe(tmp_path: Path) -> None:
    loaded = recipe("tiny_int8", tmp_path / "deep" / "runs", "seed=3")
    run = RunDirectory.create(loaded)
    assert run.path.parent == tmp_path / "deep" / "runs"
    assert run.path.name.startswith("tiny_int8-")
    written = load_recipe(run.path / "recipe.yaml").recipe
    model = written.model.model_copy(update={"checkpoint": loaded.recipe.model.checkpoint})
    assert written.model_copy(update={"model": model}) == loaded.recipe


def test_the_recipe_of_a_run_finds_its_files_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "start.safetensors").write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "here")
    overrides = ("model.checkpoint=start.safetensors", "data.dataset=imagefolder", "data.root=images")
    run = RunDirectory.create(recipe("tiny_int8", tmp_path / "runs", *overrides))
    monkeypatch.chdir("/")
    written = load_recipe(run.path / "recipe.yaml")
    assert written.recipe.model.checkpoint == str(tmp_path / "here" / "start.safetensors")
    assert resolve_checkpoint(written).read_bytes() == b"x"
    assert written.recipe.data.root == str(tmp_path / "here" / "images")


def test_a_run_from_random_weights_names_no_checkpoint(tmp_path: Path) -> None:
    loaded = recipe("tiny_digits_pretrain", tmp_path)
    assert load_recipe(RunDirectory.create(loaded).path / "recipe.yaml").recipe == loaded.recipe


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.runs.time.strftime", lambda _: "20260101-000000")
    loaded = recipe("tiny_int8", tmp_path)
    names = [RunDirectory.create(loaded).path.name for _ in range(3)]
    assert names == [f"tiny_int8-20260101-000000{suffix}" for suffix in ("", "-1", "-2")]


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_file_where_the_output_folder_should_be_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match=r"file.*: "):
        RunDirectory.create(recipe("tiny_int8", Path(f"{tmp_path}/file{below}")))


def test_metrics_are_appended_line_by_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log({"epoch": 1, "loss": 0.5})
    run.log({"epoch": 2, "loss": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_metrics_that_cannot_be_written_are_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: "):
        RunDirectory(tmp_path).log({"epoch": 1})


def test_a_summary_is_read_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_json("summary.json", {"task": "finetune"})
    assert run.summary() == {"task": "finetune"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a finished run"), ("[1]", "not a JSON object"), ("{", "cannot be read")],
)
def test_a_missing_or_damaged_summary_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(QatError, match=message):
        RunDirectory(tmp_path).summary()


def test_a_run_is_found_by_its_best_checkpoint(tmp_path: Path) -> None:
    assert find_run(finished(tmp_path, "a", {})).best == tmp_path / "a" / "best.safetensors"
    with pytest.raises(QatError, match="no such run directory"):
        find_run(tmp_path / "absent")
    with pytest.raises(QatError, match="not a run directory"):
        find_run(tmp_path)


def test_the_newest_run_is_the_one_that_finished_last(tmp_path: Path) -> None:
    finished(tmp_path, "z-older", {"task": "finetune", "finished": 10.0})
    newest = finished(tmp_path, "a-newer", {"task": "finetune", "finished": 20.0})
    finished(tmp_path, "other-task", {"task": "pretrain", "finished": 30.0})
    assert newest_run(tmp_path).path == newest


DAMAGED = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "deeply nested": "[" * 100_000,
    "no time": {"task": "finetune"},
    "a text for a time": {"task": "finetune", "finished": "tomorrow"},
    "null for a time": {"task": "finetune", "finished": None},
    "no number for a time": '{"task": "finetune", "finished": NaN}',
    "the end of time": '{"task": "finetune", "finished": Infinity}',
    "true for a time": {"task": "finetune", "finished": True},
    "no task": {"finished": 99.0},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_run_neither_wins_nor_hides_the_others(tmp_path: Path, content: object) -> None:
    good = finished(tmp_path, "good", {"task": "finetune", "finished": 10.0})
    finished(tmp_path, "zz-damaged", content)
    (tmp_path / "a file").write_text("x", encoding="utf-8")
    assert newest_run(tmp_path).path == good


def test_a_run_without_its_checkpoint_or_in_bytes_that_are_no_text_does_not_count(tmp_path: Path) -> None:
    good = finished(tmp_path, "good", {"task": "finetune", "finished": 10.0})
    gone = finished(tmp_path, "gone", {"task": "finetune", "finished": 20.0})
    (gone / "best.safetensors").unlink()
    (finished(tmp_path, "bytes", "") / "summary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder" / "summary.json").mkdir(parents=True)
    assert newest_run(tmp_path).path == good


@pytest.mark.parametrize("kind", ["absent", "empty", "file"])
def test_no_run_at_all_says_how_to_make_one(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "runs"
    if kind == "empty":
        root.mkdir()
    elif kind == "file":
        root.write_text("x", encoding="utf-8")
    with pytest.raises(QatError, match=r"no finished finetune run here; run `qat finetune` first"):
        newest_run(root)


def test_a_log_is_rewritten_whole_and_without_rows_there_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rows = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.3}]
    for row in rows:
        run.log(row)
    appended = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "lo')
    run.rewrite_log(rows)
    assert (tmp_path / "metrics.jsonl").read_bytes() == appended
    run.rewrite_log([])
    assert list(tmp_path.iterdir()) == []
    run.rewrite_log([])
