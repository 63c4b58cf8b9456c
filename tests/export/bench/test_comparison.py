"""What `qat bench` reports."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper
from qat_export.bench import comparison as bench
from qat_export.bench.comparison import Report, bench_files, bench_random
from qat_export.bench.measurement import Candidate, Conditions, Measurement
from qat_export.graphs.float32 import FORMAT

from qat.errors import CheckpointError, QatError
from qat.models.bnext import Architecture
from tests.helpers.tiny_models import image_model, save

THIN = Architecture.of(widths=(8, 16), num_classes=10)
KEYS = [
    "target",
    "ms_median",
    "ms_min",
    "ms_max",
    "ratio_to_float32",
    "file_bytes",
    "load_ms",
    "peak_rss_bytes",
]


def measured(name: str, *milliseconds: float, form: str = "") -> Measurement:
    metadata = {"format": form} if form else {}
    return Measurement(Candidate(name, Path(f"{name}.onnx")), milliseconds, 5000, 12.5, 70_000_000, metadata)


def report(*measurements: Measurement) -> Report:
    return Report(measurements, {"threads": 1}, {"processor": "abacus"})


def results(found: Report) -> dict[str, Any]:
    return {result["target"]: result for result in json.loads(found.to_json())["results"]}


# Ratios.


def test_a_ratio_says_how_many_times_as_fast_a_model_is() -> None:
    found = results(report(measured("float32", 8.0, 10.0, 30.0), measured("portable", 4.0, 5.0, 2.0)))
    assert found["float32"]["ratio_to_float32"] == 1.0
    assert found["portable"]["ratio_to_float32"] == 2.5
    assert [found["portable"][key] for key in ("ms_median", "ms_min", "ms_max")] == [4.0, 2.0, 5.0]


def test_without_a_float32_model_there_is_no_ratio() -> None:
    found = report(measured("portable", 4.0), measured("ort_static", 8.0))
    assert results(found)["portable"]["ratio_to_float32"] is None
    assert [found.ratio(each, "ort_static") for each in found.measurements] == [2.0, 1.0]


def test_a_float32_model_is_known_by_its_metadata_whatever_its_name() -> None:
    found = results(report(measured("mine", 4.0), measured("baseline", 8.0, form=FORMAT)))
    assert found["mine"]["ratio_to_float32"] == 2.0


def test_the_table_shows_both_ratios_and_what_is_missing() -> None:
    titles, *rows = report(measured("ort_static", 8.0), measured("portable", 4.0)).rows()
    assert [dict(zip(titles, row, strict=True))["× ort_static"] for row in rows] == ["1.00", "2.00"]
    assert [dict(zip(titles, row, strict=True))["× float32"] for row in rows] == ["–", "–"]
    assert dict(zip(titles, rows[1], strict=True)) | {"× float32": ""} == {
        "target": "portable",
        "median ms": "4.00",
        "quartiles": "4.00–4.00",
        "× float32": "",
        "× ort_static": "2.00",
        "file MB": "0.01",
        "load ms": "12",
        "peak MB": "70",
    }


def test_the_title_says_how_and_on_what_it_was_measured() -> None:
    settings = {"threads": 2, "batch": 1, "repeats": 1}
    assert Report([], settings, {"processor": "abacus"}).title == "2 threads, batch 1, 1 run of each, abacus"
    settings = {"threads": 1, "batch": 8, "repeats": 30}
    title = Report([], settings, {"processor": None}).title
    assert title == "1 thread, batch 8, 30 runs of each, unknown processor"


# Random networks.


def test_the_json_of_a_random_network_has_exactly_these_keys() -> None:
    conditions = Conditions(repeats=3, seed=4)
    targets = ["float32", "ort_static", "portable"]
    found = bench_random(THIN, 16, targets, conditions)
    content = json.loads(found.to_json())
    assert list(content) == ["machine", "settings", "results"]
    date = content["settings"].pop("date")
    assert datetime.fromisoformat(date).tzinfo is not None
    assert content["settings"] == {
        "size": "custom",
        "classes": 10,
        "resolution": 16,
        "targets": targets,
        "threads": 1,
        "batch": 1,
        "repeats": 3,
        "seed": 4,
    }
    assert content["machine"]["versions"]["onnxruntime"]
    assert [list(result) for result in content["results"]] == [KEYS] * 3
    assert [result["target"] for result in content["results"]] == targets
    for result in content["results"]:
        assert 0 < result["ms_min"] <= result["ms_median"] <= result["ms_max"]
        assert result["ratio_to_float32"] == pytest.approx(
            content["results"][0]["ms_median"] / result["ms_median"], abs=2e-3, rel=2e-3
        )
        assert result["file_bytes"] > 1000
        assert result["load_ms"] > 0
        assert result["peak_rss_bytes"] is None or result["peak_rss_bytes"] > 2**24


def test_files_of_a_random_network_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    found = bench_random(THIN, 16, ["float32"], Conditions(repeats=1), said.append)
    assert str(tmp_path) in str(found.measurements[0].candidate.path)
    assert list(tmp_path.iterdir()) == []
    assert said[:2] == [f"filling {THIN} at random", "exporting float32"]


@pytest.mark.parametrize(
    ("classes", "resolution", "targets", "message"),
    [
        (10**9, 16, ["float32"], "classes is 1000000000, allowed are 1 to 100000"),
        (10, 4, ["float32"], "resolution is 4, allowed are 8 to 2048"),
        (10, 10**6, ["float32"], "resolution is 1000000"),
        (10, 16, ["float16"], "target 'float16' is unknown"),
        (10, 16, [], "no target, allowed: float32"),
        (10, 16, ["float32", "portable", "float32"], "target 'float32' is given twice"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_network_is_filled(
    classes: int, resolution: int, targets: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Subject", None)
    architecture = Architecture.of(widths=(8, 16), num_classes=classes)
    with pytest.raises(QatError, match=message):
        bench_random(architecture, resolution, targets, Conditions())


# Files.


def test_files_are_called_by_their_names(tmp_path: Path) -> None:
    paths = [image_model(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    found = bench_files(paths, Conditions(repeats=1))
    assert list(results(found)) == ["a", "b"]
    settings = json.loads(found.to_json())["settings"]
    assert [settings[key] for key in ("size", "classes", "resolution", "targets")] == [
        None,
        None,
        None,
        ["a", "b"],
    ]


def test_files_of_equal_names_are_called_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [image_model(folder / "a.onnx") for folder in (tmp_path, tmp_path / "other")]
    assert list(results(bench_files(paths, Conditions(repeats=1)))) == [str(path) for path in paths]


def test_any_set_of_files_is_measured_together(tmp_path: Path) -> None:
    foreign = image_model(tmp_path / "foreign.onnx", ("batch", 3, "height", "width"))
    floats = save(
        tmp_path / "baseline.onnx",
        [helper.make_node("ReduceMean", ["pixels"], ["score"])],
        [("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        metadata={"format": FORMAT},
    )
    found = results(bench_files([foreign, floats], Conditions(repeats=1, resolution=8)))
    assert found["baseline"]["ratio_to_float32"] == 1.0
    assert found["foreign"]["ratio_to_float32"] > 0


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    path = image_model(tmp_path / "a.onnx")
    with pytest.raises(QatError, match=r"two models are called '.*a\.onnx'"):
        bench_files([path, path], Conditions(repeats=1))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    good, bad = image_model(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    bad.write_bytes(good.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"bad\.onnx: not a model that onnxruntime can load"):
        bench_files([good, bad], Conditions(repeats=1))


@pytest.mark.parametrize("built", [True, False])
def test_without_names_every_target_that_runs_here_is_measured(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    monkeypatch.setattr(bench, "has_library", lambda: built)
    baselines = ("float32", "ort_static", "portable")
    assert bench.default_targets() == ((*baselines, "native") if built else baselines)
