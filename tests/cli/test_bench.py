"""qat bench: what it prints of models from files and of random networks, and how each wrong input ends."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

from qat.cli.group import main
from qat.system.machine import usable_cores
from tests.helpers.native_models import KERNELS
from tests.helpers.tiny_models import image_model
from tests.helpers.toy_runs import fail, succeed, tuned

RESULT = [
    *("target", "ms_median", "ms_min", "ms_max", "ratio_to_float32", "file_bytes", "load_ms"),
    "peak_rss_bytes",
]
SETTINGS = {"size", "classes", "resolution", "targets", "threads", "batch", "repeats", "seed", "date"}
#: The smallest random network there is.
SMALLEST = ("--size", "tiny", "--classes", "2", "--resolution", "8", "--repeats", "1")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def baseline(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 export of the network of ``toys / "model.onnx"``."""
    path = tmp_path_factory.mktemp("baseline") / "anything.onnx"
    succeed("export", "--onnx", path, "--float32", "--checkpoint", tuned(toys))
    return path


def measured(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("bench", *arguments, "--json"))


# Files


def test_json_is_one_object_of_machine_settings_and_results(toys: Path, baseline: Path) -> None:
    found = measured(toys / "model.onnx", baseline, "--repeats", 3)
    assert list(found) == ["machine", "settings", "results"]
    assert {"processor", "logical_cores", "memory_bytes", "system", "python", "versions"} <= set(
        found["machine"]
    )
    assert {"bnext-qat", "onnxruntime"} <= set(found["machine"]["versions"])
    assert set(found["settings"]) == SETTINGS
    assert [list(result) for result in found["results"]] == [RESULT, RESULT]
    for result, path in zip(found["results"], (toys / "model.onnx", baseline), strict=True):
        assert result["target"] == path.stem
        assert 0 < result["ms_min"] <= result["ms_median"] <= result["ms_max"]
        assert result["file_bytes"] == path.stat().st_size
        assert result["load_ms"] > 0
        assert result["peak_rss_bytes"] > 10**7
    model, floats = found["results"]
    assert floats["ratio_to_float32"] == 1.0
    ratio = floats["ms_median"] / model["ms_median"]
    assert model["ratio_to_float32"] == pytest.approx(ratio, rel=0.01, abs=0.001)


def test_the_settings_are_those_asked_for(baseline: Path) -> None:
    options = {"threads": 1, "batch": 3, "repeats": 2, "seed": 7}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    settings = measured(baseline, *words)["settings"]
    assert {key: settings[key] for key in options} == options
    assert (settings["size"], settings["classes"], settings["targets"]) == (None, None, ["anything"])


def test_foreign_models_of_any_size_are_measured_at_the_resolution_given(tmp_path: Path) -> None:
    path = image_model(tmp_path / "foreign.onnx", ("batch", 3, "height", "width"), TensorProto.UINT8)
    found = measured(path, "--repeats", 1, "--resolution", 48)
    assert found["settings"]["resolution"] == 48
    assert found["results"][0]["ratio_to_float32"] is None


def test_the_table_fits_eighty_columns_with_complete_names(
    toys: Path, tmp_path: Path, baseline: Path
) -> None:
    odd = image_model(tmp_path / "an [odd] name.onnx")
    lines = succeed("bench", toys / "model.onnx", baseline, odd, "--repeats", 2).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("1 thread, batch 1, 2 runs of each, ")
    rows = [line.split() for line in lines if line.strip()]
    assert [row[0] for row in rows[-3:]] == ["model", "anything", "an"]
    assert rows[-1][:3] == ["an", "[odd]", "name"]
    # Of the baseline: how many times as fast as itself; and no model went through quantize_static.
    assert rows[-2][3:5] == ["1.00", "–"]
    assert rows[-2][5] == f"{baseline.stat().st_size / 1e6:.2f}"


def test_help_fits_eighty_columns_and_says_what_each_option_is_for() -> None:
    text = succeed("bench", "--help")
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        *("MODELS", "--size", "--classes", "--resolution", "--targets", "--threads", "--batch", "--repeats"),
        *("--seed", "--json", "float32,ort_static,portable"),
    ):
        assert word in text, word
    # In the list of commands it stands in full.
    assert not main.commands["bench"].get_short_help_str(60).endswith("...")


# Random networks


def test_one_target_of_the_smallest_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = measured(*SMALLEST, "--targets", "portable")
    settings = found["settings"]
    assert (settings["size"], settings["classes"], settings["resolution"]) == ("tiny", 2, 8)
    (result,) = found["results"]
    assert (result["target"], result["ratio_to_float32"]) == ("portable", None)
    assert result["ms_min"] == result["ms_median"] == result["ms_max"]
    # 28 million weights of one bit and 1.5 million of eight.
    assert 5e6 < result["file_bytes"] < 6.5e6
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_the_default_targets_are_compared_with_the_float_baseline() -> None:
    lines = succeed("bench", *SMALLEST).splitlines()
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert max(map(len, lines)) <= 80
    assert list(rows)[-len(KERNELS[:1]) - 3 :] == [
        "float32",
        "ort_static",
        "portable",
        *["native"][: len(KERNELS)],
    ]
    assert rows["float32"][2] == rows["ort_static"][3] == "1.00"
    assert float(rows["float32"][4]) > 100 > 10 > float(rows["portable"][4])


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("''", "is empty; give a path"),
        ("{tmp}/nowhere.onnx", "nowhere.onnx: no such file"),
        ("{tmp}", "{tmp}: not a file"),
        ("{tmp}/folder.onnx", "folder.onnx: not a file"),
        ("{tmp}/text.onnx", "text.onnx: not a model that onnxruntime can load"),
        ("{tmp}/half.onnx", "half.onnx: not a model that onnxruntime can load"),
        ("{tmp}/empty.onnx", "empty.onnx: not a model that onnxruntime can load"),
        ("{toys}/model.onnx {tmp}/half.onnx", "half.onnx: not a model"),
        ("{toys}/float.safetensors", "float.safetensors: not a model"),
        ("{toys}/model.onnx {toys}/model.onnx", "two models are called '{toys}/model.onnx'"),
        ("{tmp}/one.onnx --batch 2", "takes batches of 1, not of 2"),
        ("{tmp}/numbers.onnx", "not a type of images"),
        ("{toys}/model.onnx --size tiny", "--size is of a random network: give it or MODELS, not both"),
        ("{toys}/model.onnx --classes 10", "--classes is of a random network"),
        ("{toys}/model.onnx --targets portable", "--targets is of a random network"),
        ("{toys}/model.onnx --threads 0", "threads is 0, allowed are 1 to "),
        ("{toys}/model.onnx --batch 0", "batch is 0, allowed are 1 to 4096"),
        ("{toys}/model.onnx --run {toys}/runs", "No such option '--run'"),
        ("--targets portable,portble", "target 'portble' is unknown, allowed: float32, ort_static, portable"),
        ("--targets portable,portble", "did you mean 'portable'?"),
        ("--targets portable,", "target '' is unknown"),
        ("--targets portable,,float32", "target '' is unknown"),
        ("--targets ''", "'--targets': is empty; write float32,portable"),
        ("--targets ' '", "target '' is unknown"),
        ("--targets portable,portable", "target 'portable' is given twice"),
        ("--size huge", "size 'huge' is unknown, allowed: tiny, small, middle, large"),
        ("--size ''", "size '' is unknown"),
        ("--classes 0", "num_classes 0: need at least 1"),
        ("--classes 1000000000", "classes is 1000000000, allowed are 1 to 100000"),
        ("--classes many", "'many' is not a valid integer"),
        ("--resolution 3", "resolution is 3, allowed are 8 to "),
        ("--resolution -1", "resolution is -1, allowed are "),
        ("--resolution 100000", "resolution is 100000, allowed are "),
        ("--threads -1", "threads is -1, allowed are 1 to {cores} (the cores this process may use)"),
        ("--threads 100000", "threads is 100000, allowed are 1 to {cores} "),
        ("--batch 100000", "batch is 100000, allowed are 1 to 4096"),
        ("--repeats 0", "repeats is 0, allowed are 1 to "),
        ("--repeats 1e3", "'1e3' is not a valid integer"),
        ("--seed -1", "seed is -1, allowed are 0 to "),
        ("--seed 99999999999999999999999", "allowed are 0 to "),
    ],
)
def test_a_wrong_measurement_ends_with_2_and_says_why(
    toys: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    model = (toys / "model.onnx").read_bytes()
    (tmp_path / "text.onnx").write_text("hello", encoding="utf-8")
    (tmp_path / "half.onnx").write_bytes(model[: len(model) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    image_model(tmp_path / "one.onnx", (1, 3, 8, 8))
    image_model(tmp_path / "numbers.onnx", (1, 3, 8, 8), TensorProto.INT64)
    names = {"toys": toys, "tmp": tmp_path, "cores": usable_cores()}
    message = fail(2, "bench", *(word.format(**names) for word in shlex.split(arguments)))
    assert part.format(**names) in message
