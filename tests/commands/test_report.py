"""Reports on real runs: what is compared with what, and what is missing or moved."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from qat.commands.report import REPORT, write_report
from qat.errors import DataError, QatError, RecipeError
from tests.helpers.toy_runs import image_folder, pretrain_toy, succeed, tune, tuned

# See tests/report/test_browser.py.
pytestmark = pytest.mark.xdist_group("reports")


@pytest.fixture
def run(toys: Path, tmp_path: Path) -> Path:
    """A finished run of this test's own."""
    path = tmp_path / "run"
    shutil.copytree(tuned(toys).parent, path)
    return path


def text_of(run: Path, *overrides: str) -> str:
    return write_report(run, overrides=overrides).read_text(encoding="utf-8")


def callouts(text: str) -> list[str]:
    return re.findall(r'<p class="callout">([^<]*)</p>', text)


def tile(text: str, name: str) -> str:
    (value,) = re.findall(rf'<dt>{name}</dt>\n<dd class="value ?\w*">([^<]*)<', text)
    return str(value)


def test_the_report_has_the_accuracies_that_finetune_found(reported: Path) -> None:
    text = reported.read_text(encoding="utf-8")
    summary = json.loads((reported.parent / "summary.json").read_text(encoding="utf-8"))
    assert tile(text, "int8 top-1") == f"{summary['int8']['top1']:.2f} %"
    assert tile(text, "Float-rest top-1") == f"{summary['float']['top1']:.2f} %"
    assert callouts(text) == []


def test_every_quantization_point_has_a_row(reported: Path) -> None:
    text = reported.read_text(encoding="utf-8").replace("<wbr>", "")
    for name in json.loads((reported.parent / "quantization.json").read_text(encoding="utf-8")):
        assert f'<th scope="row">{name}</th>' in text


def test_without_the_start_the_report_says_so_and_shows_int8_alone(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    gone = re.sub(r"checkpoint: .*", "checkpoint: /gone/away.safetensors", recipe)
    (run / "recipe.yaml").write_text(gone, encoding="utf-8")
    text = text_of(run)
    assert "/gone/away.safetensors" in callouts(text)[0]
    assert "Float-rest top-1" not in text
    assert tile(text, "int8 top-1")
    assert "Flipped sign bits</h3>" not in text


def test_another_checkpoint_in_the_starts_place_is_not_compared_with(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["pretrained_sha256"] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = text_of(run)
    assert "has changed since the run" in callouts(text)[0]
    assert "Float-rest top-1" not in text


def test_other_test_images_are_said_to_be_others_and_an_old_report_is_replaced(run: Path) -> None:
    (run / REPORT).write_text("old", encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["data"]["test"] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert "fingerprint is another" in callouts(text_of(run))[0]


def test_a_run_that_broke_off_and_one_with_damaged_files_are_reported_on(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "quantization.json").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": NaN, "top1": null}\n{"epo', encoding="utf-8")
    (run / "bench.json").write_text("{", encoding="utf-8")
    notes = callouts(text_of(run))
    assert [
        "not a finished run" in notes[0],
        "1 line of metrics.jsonl" in notes[1],
        "bench.json" in notes[2],
    ] == [True] * 3


def test_a_pretraining_run_is_reported_on(tmp_path: Path) -> None:
    path = pretrain_toy(tmp_path, "schedule.epochs=2").parent
    text = text_of(path)
    assert "Pretraining report" in text
    assert "Weight temperature</h3>" in text
    assert 'id="layers"' not in text
    assert callouts(text) == []


@pytest.mark.usefixtures("with_report")
def test_a_run_with_parts_in_float_and_another_width_is_reported_on(toys: Path, tmp_path: Path) -> None:
    parts = ("quantization.trunk.enabled=false", "quantization.se.enabled=false", "schedule.epochs=1")
    succeed(*tune(toys, tmp_path, *parts))
    (path,) = tmp_path.iterdir()
    text = (path / REPORT).read_text(encoding="utf-8")
    assert callouts(text) == []
    assert "custom [8, 8, 16]" in text
    assert "<td>32</td>" in text  # bits of the attention's weights
    assert tile(text, r"int8 \(channel attention and trunk in float\) top-1")
    assert "int8 top-1" not in text


def test_images_with_names_of_markup_are_reported_on_wherever_they_lie(toys: Path, tmp_path: Path) -> None:
    names = ("a<b>&amp;", "$x$ 'quoted'")
    root = image_folder(tmp_path / "images", classes=names)
    folder = ["data.dataset=imagefolder", "data.workers=0", "data.batch_size=4", "model.num_classes=2"]
    path = pretrain_toy(tmp_path / "pre", *folder, f"data.root={root}").parent
    root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"data\.root"):
        write_report(path)
    text = text_of(path, f"data.root={tmp_path / 'moved'}")
    assert callouts(text) == []
    assert "a&lt;b&gt;&amp;amp;" in text
    assert "<b>&amp;" not in text


def test_a_device_that_is_not_here_gives_way_to_the_cpu(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(recipe.replace("device: cpu", "device: cuda:99"), encoding="utf-8")
    assert "on the CPU" in text_of(run)


@pytest.mark.parametrize("override", ["schedule.epochs=1", "data.image_size=16", "data.mean=[0,0,1]"])
def test_what_changes_the_network_is_refused(run: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(override)):
        write_report(run, overrides=[override])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QatError, match="no such run directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(QatError, match="no finished finetune run here"):
        write_report(None, runs=tmp_path)
