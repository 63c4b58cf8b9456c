"""Files that version 0.1 wrote are read by the present version, with the results that 0.1 recorded of them.

How they were made: ``tests/fixtures/version_0_1/README.md``. Integers are compared bit for bit; what was
computed in floating point, within what another processor or another version of torch may change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from qat_export.nativelibrary import register

from tests.helpers.native_models import needs_library
from tests.helpers.toy_runs import qat, succeed

FILES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
EXPECTED = json.loads((FILES / "expected.json").read_text("utf-8"))
ANSWERS = dict(np.load(FILES / "answers.npz"))
NATIVE = pytest.param("native", marks=needs_library)
#: Points of top-1 that sums in another order may move: 3 of 360 images.
A_FEW_IMAGES = 0.9


def needs_brevitas() -> None:
    pytest.importorskip("brevitas")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files, which commands may write beside."""
    return Path(shutil.copytree(FILES, tmp_path / "old"))


def logits(model: Path) -> NDArray[np.float32]:
    """What onnxruntime computes of the recorded images, (16, 10)."""
    options = ort.SessionOptions()
    if "native" in model.name:
        register(options)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images = (ANSWERS["images"] / np.float64(255)).astype(np.float32)
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(found)


def evaluated(path: Path) -> dict[str, Any]:
    return dict(json.loads(succeed("evaluate", path, "--json")))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text("utf-8")))


def test_the_files_are_the_ones_that_version_0_1_wrote() -> None:
    listed = dict(reversed(line.split()) for line in (FILES / "SHA256SUMS").read_text("utf-8").splitlines())
    found = {
        path.relative_to(FILES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FILES.rglob("*")
        if path.is_file() and path.name not in ("README.md", "SHA256SUMS")
    }
    assert found == listed


# Models


@pytest.mark.parametrize("form", ["portable", "strict", NATIVE])
def test_an_integer_model_answers_as_it_did_bit_for_bit(form: str) -> None:
    assert logits(FILES / f"{form}.onnx").tobytes() == ANSWERS["logits"].tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "run/best.safetensors",
        "learned.safetensors",
        "portable.onnx",
        "strict.onnx",
        pytest.param("native.onnx", marks=needs_library),
    ],
)
def test_a_quantized_network_is_as_accurate_as_recorded(name: str) -> None:
    if name.startswith("learned"):
        needs_brevitas()
    found, recorded = evaluated(FILES / name), EXPECTED["evaluate"][name.partition("/")[0]]
    assert (found["top1"], found["top5"], found["n"]) == (recorded["top1"], recorded["top5"], recorded["n"])
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["float.safetensors", "float32.onnx"])
def test_a_float_network_is_as_accurate_as_recorded_but_for_a_few_images(name: str) -> None:
    found, recorded = evaluated(FILES / name), EXPECTED["evaluate"][name]
    assert found["top1"] == pytest.approx(recorded["top1"], abs=A_FEW_IMAGES)
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-2)


@pytest.mark.parametrize("name", EXPECTED["inspect"])
def test_a_file_is_inspected_to_the_same_layers_and_bytes(name: str) -> None:
    found = json.loads(succeed("inspect", FILES / name, "--json"))
    assert {key: found[key] for key in EXPECTED["inspect"][name]} == EXPECTED["inspect"][name]


@pytest.mark.parametrize(
    "source", [["--run", "run"], ["--checkpoint", "run/best.safetensors"]], ids=["run", "checkpoint"]
)
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("portable", []),
        ("strict", ["--strict-onnx"]),
        pytest.param("native", ["--target", "native"], marks=needs_library),
    ],
)
def test_a_run_is_exported_to_the_same_answers(
    tmp_path: Path, source: list[str], form: str, options: list[str]
) -> None:
    path = tmp_path / f"{form}.onnx"
    assert "verified" in succeed("export", "--onnx", path, source[0], FILES / source[1], *options)
    assert logits(path).tobytes() == ANSWERS["logits"].tobytes()


def test_a_checkpoint_with_learned_scales_is_exported_to_the_same_answers(tmp_path: Path) -> None:
    needs_brevitas()
    path = tmp_path / "portable.onnx"
    succeed("export", "--onnx", path, "--checkpoint", FILES / "learned.safetensors")
    assert logits(path).tobytes() == ANSWERS["learned_logits"].tobytes()


def test_the_float_network_of_a_run_is_exported_as_accurate_as_recorded(tmp_path: Path) -> None:
    succeed("export", "--onnx", tmp_path / "float32.onnx", "--run", FILES / "run", "--float32")
    recorded = EXPECTED["evaluate"]["float32.onnx"]["top1"]
    assert evaluated(tmp_path / "float32.onnx")["top1"] == pytest.approx(recorded, abs=A_FEW_IMAGES)


@pytest.mark.parametrize(
    "source",
    [
        ["--run", "run"],
        ["--checkpoint", "run/best.safetensors"],
        ["--integer-network", "integers.safetensors"],
    ],
    ids=["run", "checkpoint", "integers"],
)
@pytest.mark.parametrize("form", ["portable", "strict", NATIVE])
def test_a_model_is_verified_exact_against_what_it_came_from(form: str, source: list[str]) -> None:
    succeed("verify", FILES / f"{form}.onnx", source[0], FILES / source[1])


def test_a_model_of_another_network_is_not_verified() -> None:
    needs_brevitas()
    result = qat("verify", FILES / "portable.onnx", "--checkpoint", FILES / "learned.safetensors")
    assert result.exit_code == 2
    assert "exported from another network" in result.stderr


# The gate


@pytest.mark.parametrize(
    "name", ["portable.onnx", "strict.onnx", pytest.param("native.onnx", marks=needs_library), "run"]
)
def test_the_recorded_model_passes_the_gate_in_any_form_without_one_answer_changed(name: str) -> None:
    rule = ("--max-drop", 1.0, "--confidence", 0.95, "--on-inconclusive", "fail")
    result = qat("gate", FILES / name, "--baseline", FILES / "baseline.json", "--json", *rule)
    found = json.loads(result.stdout)
    assert (found["lost"], found["gained"], found["images"]) == (0, 0, 360)
    assert (result.exit_code, found["verdict"]) == (0, "pass")


def test_a_model_below_the_floor_fails_the_gate() -> None:
    result = qat("gate", FILES / "float.safetensors", "--baseline", FILES / "baseline.json", "--floor", 60)
    assert result.exit_code == 1
    assert "below the floor of 60 %" in result.stderr


def test_a_baseline_is_replaced_by_one_with_the_same_answers(old: Path) -> None:
    before = json.loads((old / "baseline.json").read_text("utf-8"))
    succeed("gate", "record", old / "portable.onnx", "-o", old / "baseline.json")
    after = json.loads((old / "baseline.json").read_text("utf-8"))
    same = ("format", "images", "num_classes", "top1", "top5", "model", "data", "class_names", "correct")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


# Runs


def test_the_accuracy_of_a_run_is_the_one_in_its_summary() -> None:
    assert evaluated(FILES / "run")["top1"] == summary(FILES / "run")["int8"]["top1"]


def test_an_interrupted_run_goes_on_to_what_the_whole_one_found(old: Path) -> None:
    run = old / "interrupted"
    result = qat("finetune", "--resume", run)
    assert result.exit_code == 0, result.output
    assert "goes on after 1 of 2 epochs and 8 steps" in result.stdout
    assert not (run / "state").exists()
    (before, last), (_, expected) = rows(run), rows(FILES / "run")
    assert [before] == rows(FILES / "interrupted")
    # To the last bit where the files were made. Other instruction sets and torch alone moved 4e-8 of the
    # training loss and none of the test loss; an average of the weights that is not restored moves 4.5e-4
    # of that.
    for key in ("loss", "test_loss"):
        assert last[key] == pytest.approx(expected[key], rel=2e-4)
    for key in ("top1", "test_top1"):
        assert last[key] == pytest.approx(expected[key], abs=A_FEW_IMAGES)
    found, whole = summary(run), summary(FILES / "run")
    for key in ("architecture", "float", "calibrated", "checkpoint", "pretrained_sha256", "data"):
        assert found[key] == whole[key]
    assert found["int8"]["top1"] == pytest.approx(whole["int8"]["top1"], abs=A_FEW_IMAGES)


def test_a_finished_run_has_nothing_left_to_do(old: Path) -> None:
    assert "nothing is left to do" in succeed("finetune", "--resume", old / "run")


def test_a_report_on_a_run_has_its_accuracies(old: Path) -> None:
    succeed("report", old / "run", "-o", old / "report.html")
    text = (old / "report.html").read_text("utf-8")
    assert "BNext custom [8, 8, 16, 16], 10 classes, stem stride 1" in text
    for accuracy in (EXPECTED["evaluate"]["run"], EXPECTED["evaluate"]["float.safetensors"]):
        assert f"{accuracy['top1']:.2f}" in text


def test_a_resolved_recipe_starts_a_run_from_the_float_checkpoint(old: Path) -> None:
    runs = f"output.dir='{old / 'runs'}'"
    succeed("finetune", "--recipe", old / "run" / "recipe.yaml", "--set", "schedule.epochs=0", "--set", runs)
    (run,) = (old / "runs").iterdir()
    found, before = summary(run), summary(FILES / "run")
    assert found["pretrained_sha256"] == before["pretrained_sha256"]
    assert found["data"] == before["data"]
    for key in ("float", "calibrated"):
        assert found[key]["top1"] == pytest.approx(before[key]["top1"], abs=A_FEW_IMAGES)
