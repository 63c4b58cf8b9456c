"""qat verify: what it finds, what it prints, and how each wrong input ends."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qat.cli.group import main
from tests.helpers.cases import fast_where, slow
from tests.helpers.tiny_models import image_model
from tests.helpers.toy_runs import fail, image_folder, qat, settings, succeed, tune, tuned

# One process: each would fine-tune and export for itself.
pytestmark = pytest.mark.xdist_group("verify")

FORMS = {
    "uint8 NCHW": "--input uint8",
    "uint8 NHWC": "--input uint8 --layout NHWC",
    "strict": "--strict-onnx",
    "16 pixels": "--image-size 16",
}


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def network(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The integer network of ``toys / "model.onnx"``."""
    folder = tmp_path_factory.mktemp("network")
    arguments = ["--checkpoint", tuned(toys), "--integer-network", folder / "n.safetensors"]
    succeed("export", "--onnx", folder / "m.onnx", *arguments)
    return folder / "n.safetensors"


@pytest.fixture(scope="module")
def other(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run from the same float network: its run directory, with a model and an integer network."""
    folder = tmp_path_factory.mktemp("other")
    succeed(*tune(toys, folder, "schedule.calibration_batches=1", "seed=5"))
    (run,) = folder.iterdir()
    succeed("export", "--onnx", "--run", run, "--integer-network", run / "n.safetensors")
    return run


def changed(source: Path, target: Path, tensor: str) -> Path:
    """A copy of the model ``source`` in which one bit of an initializer differs."""
    model = onnx.load(source)
    (found,) = (one for one in model.graph.initializer if one.name == tensor)
    content = bytearray(found.raw_data)
    content[0] ^= 0x10
    found.raw_data = bytes(content)
    onnx.save(model, target)
    return target


def with_metadata(source: Path, target: Path, change: Callable[[dict[str, str]], object]) -> Path:
    """A copy of the model ``source`` whose metadata went through ``change``."""
    model = onnx.load(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    change(metadata)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, target)
    return target


def verified(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("verify", *arguments, "--json"))


# What is right


@pytest.mark.parametrize("form", fast_where(["uint8 NHWC"], FORMS))
def test_each_form_of_a_model_is_verified(toys: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "m.onnx"
    succeed("export", "--onnx", path, "--checkpoint", tuned(toys), *FORMS[form].split())
    found = verified(path, "--checkpoint", tuned(toys))
    assert found["verified"]
    assert found["comparison"]["agreement"] == 100.0


def test_a_model_in_a_run_directory_is_compared_with_that_run(toys: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned(toys).parent, run)
    shutil.copy(toys / "model.onnx", run / "model.onnx")
    text = succeed("verify", run / "model.onnx")
    assert text.splitlines()[-1] == f"{run / 'model.onnx'}: verified"
    assert text == succeed("verify", run / "model.onnx", "--run", tuned(toys).parent)


def test_json_is_one_object_with_figures_of_every_level(toys: Path) -> None:
    model = toys / "model.onnx"
    found = verified(model, "--run", tuned(toys).parent)
    assert list(found) == ["model", "verified", "problems", "comparison", "exactness"]
    assert (found["model"], found["verified"], found["problems"]) == (str(model), True, [])
    comparison, exactness = found["comparison"], found["exactness"]
    accuracy = json.loads(succeed("evaluate", model, "--json"))
    assert comparison["n"] == accuracy["n"] == 360
    assert comparison["model_top1"] == comparison["network_top1"] == pytest.approx(accuracy["top1"])
    assert (comparison["largest"], comparison["reference_equal"]) == (0.0, 100.0)
    assert {level["different"] for level in exactness["levels"]} == {0}
    assert {level["level"] for level in exactness["levels"]} >= {
        "constants",
        "binary sums",
        "trunk",
        "logits",
    }
    assert {level["optimizations"] for level in exactness["levels"]} == {
        *("none", "off", "on", "on, logits alone")
    }
    assert exactness["images"] == 32


def test_an_integer_network_alone_shows_every_tensor_without_a_checkpoint(toys: Path, network: Path) -> None:
    model = toys / "model.onnx"
    found = verified(model, "--integer-network", network)
    assert found["verified"]
    assert found["comparison"] is None
    assert found["exactness"] == verified(model, "--checkpoint", tuned(toys))["exactness"]
    text = succeed("verify", model, "--integer-network", network)
    assert "against the integer reference" in text
    assert "Against the network" not in text


def test_other_images_can_be_named(toys: Path, tmp_path: Path, network: Path) -> None:
    root = image_folder(tmp_path / "images", train=1, test=2, classes=[f"class {i}" for i in range(10)])
    options = settings(["data.dataset=imagefolder", f"data.root={root}"])
    assert verified(toys / "model.onnx", "--run", tuned(toys).parent, *options)["comparison"]["n"] == 20
    assert verified(toys / "model.onnx", "--integer-network", network, *options)["verified"]


def test_the_tables_fit_eighty_columns_with_a_line_per_row(toys: Path) -> None:
    *lines, last = succeed("verify", toys / "model.onnx", "--run", tuned(toys).parent).splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"{toys / 'model.onnx'}: verified"
    rows = [line.split() for line in lines]
    assert ["attention", "vectors", "4,500", "100", "%", "100", "%", "0"] in rows
    assert ["logits", "alone", "360", "100", "%", "0"] in rows


def test_help_fits_eighty_columns_and_says_what_each_option_is_for() -> None:
    text = succeed("verify", "--help")
    assert max(map(len, text.splitlines())) <= 80
    for word in ("MODEL", "--run", "--checkpoint", "--integer-network", "--set", "--json", "Exit code 1"):
        assert word in text, word
    assert "verify" in main.commands


# What is wrong with the model


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        slow("feature.1.FFN/binary_weight.bits", "feature.1.FFN/conv"),
        slow("feature.2.Attention/hidden.weight", "feature.2.Attention/hidden"),
        ("fc.weight", "fc/products"),
    ],
)
def test_one_changed_bit_ends_with_1_and_names_the_tensor(
    toys: Path, tmp_path: Path, network: Path, tensor: str, place: str
) -> None:
    model = changed(toys / "model.onnx", tmp_path / "m.onnx", tensor)
    sources: list[list[object]] = [["--integer-network", network]]
    if tensor == "fc.weight":
        sources.append(["--checkpoint", tuned(toys)])
    for source in sources:
        result = qat("verify", model, *source)
        assert result.exit_code == 1
        begin = "error: the exported model is not exact: constants: 1 of 4,560 elements differ, by up to "
        assert result.stderr.startswith(begin)
        assert f" in {place}, input " in result.stderr.partition(";")[0]
        assert any(
            line.startswith("constants: by up to ") and place in line for line in result.stdout.split("\n")
        )
        assert "verified" not in result.stdout


def test_json_of_a_wrong_model_is_still_one_object_and_lists_each_problem(toys: Path, tmp_path: Path) -> None:
    model = changed(toys / "model.onnx", tmp_path / "m.onnx", "feature.1.FFN/binary_weight.bits")
    result = qat("verify", model, "--run", tuned(toys).parent, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["verified"]
    assert found["problems"][0].startswith("constants: 1 of 4,560 elements differ")
    assert any(problem.startswith("binary sums, optimizations off: ") for problem in found["problems"])
    assert any(problem.startswith("only ") for problem in found["problems"])
    assert found["exactness"]["levels"][0]["worst_tensor"] == "feature.1.FFN/conv, input 3"
    assert result.stderr.startswith("error: the exported model is not exact: constants: ")


def test_a_model_of_another_run_is_refused_and_told_apart(toys: Path, other: Path) -> None:
    for source in (["--run", other], ["--integer-network", other / "n.safetensors"]):
        message = fail(2, "verify", toys / "model.onnx", *source)
        assert (
            f"error: {toys / 'model.onnx'}: exported from another network: its grid of 'feature.0/trunk'"
            in (message)
        )
    assert "exported from another network" in fail(
        2, "verify", other / "model.onnx", "--checkpoint", tuned(toys)
    )
    assert verified(other / "model.onnx")["verified"]


# Wrong input


@pytest.fixture(scope="module")
def wrong(toys: Path, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that cannot be verified. To be read only."""
    folder = tmp_path_factory.mktemp("wrong")
    model = (toys / "model.onnx").read_bytes()
    (folder / "text.onnx").write_text("hello", encoding="utf-8")
    (folder / "half.onnx").write_bytes(model[: len(model) // 2])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "folder.onnx").mkdir()
    image_model(folder / "foreign.onnx")
    (folder / "cut.safetensors").write_bytes(network.read_bytes()[:-1])
    for name, key in (("no_grids", "grids"), ("no_recipe", "recipe")):
        with_metadata(toys / "model.onnx", folder / f"{name}.onnx", lambda found, key=key: found.pop(key))
    with_metadata(
        toys / "model.onnx",
        folder / "float.onnx",
        lambda found: found.update(format="bnext-qat float32 1"),
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "Missing argument 'MODEL'"),
        ("''", "'MODEL': is empty; give a path"),
        ("{toys}/model.onnx {toys}/model.onnx", "unexpected extra argument"),
        ("{tmp}/nowhere.onnx", "nowhere.onnx: no such file"),
        ("{tmp}", "{tmp}: is a folder; expected an exported model"),
        ("{tmp}/folder.onnx", "is a folder"),
        ("{tmp}/text.onnx --run {run}", "text.onnx: not a model that onnxruntime can load"),
        ("{tmp}/half.onnx --run {run}", "half.onnx: not a model that onnxruntime can load"),
        ("{tmp}/empty.onnx --run {run}", "empty.onnx: not a model that onnxruntime can load"),
        ("{tmp}/foreign.onnx --run {run}", "foreign.onnx: not exported by this tool"),
        ("{tuned} --run {run}", "not a model that onnxruntime can load"),
        ("{tmp}/float.onnx --run {run}", "a float export ('bnext-qat float32 1') has no integers"),
        ("{tmp}/no_grids.onnx --run {run}", "metadata 'grids' is missing"),
        ("{tmp}/no_recipe.onnx --integer-network {network}", "'recipe' is missing or damaged: give --run or"),
        ("{toys}/model.onnx", "{toys}/model.onnx: does not lie in a run directory: say what"),
        ("{toys}/model.onnx", "--run, --checkpoint or --integer-network"),
        ("{toys}/model.onnx --run ''", "'--run': is empty"),
        ("{toys}/model.onnx --run {tmp}", "not a run directory"),
        ("{toys}/model.onnx --run {tmp}/nowhere", "no such run directory"),
        ("{toys}/model.onnx --checkpoint ''", "'--checkpoint': is empty"),
        ("{toys}/model.onnx --checkpoint {tmp}/nowhere", "nowhere: no such file"),
        ("{toys}/model.onnx --checkpoint {run}", "is a folder"),
        ("{toys}/model.onnx --checkpoint {network}", "not a BNext"),
        ("{toys}/model.onnx --checkpoint {toys}/float.safetensors", "a float-rest network has no integers"),
        ("{toys}/model.onnx --integer-network ''", "'--integer-network': is empty"),
        ("{toys}/model.onnx --integer-network {tmp}/nowhere", "nowhere: no such file"),
        ("{toys}/model.onnx --integer-network {tuned}", "not an integer network"),
        ("{toys}/model.onnx --integer-network {tmp}/cut.safetensors", "damaged or cut short"),
        ("{toys}/model.onnx --integer-network {tmp}", "not a regular file"),
        ("{toys}/model.onnx --run {run} --checkpoint {tuned}", "exclude each other"),
        ("{toys}/model.onnx --run {run} --integer-network {network}", "exclude each other"),
        ("{toys}/model.onnx --run {run} --set ''", "'--set': is empty"),
        ("{toys}/model.onnx --run {run} --set data.image_size=16", "data.image_size: fixed by the model"),
        ("{toys}/model.onnx --run {run} --set data.mean=[0,0,1]", "data.mean: fixed by the model"),
        (
            "{toys}/model.onnx --integer-network {network} --set 'data={{std: [1,1,2]}}'",
            "set its keys one by one",
        ),
        ("{toys}/model.onnx --run {run} --set optimizer.lr=1", "no effect here"),
        ("{toys}/model.onnx --run {run} --set data.dataset=imagefolder", "data.root is unset"),
        ("{toys}/model.onnx --run {run} --layers", "No such option '--layers'"),
    ],
)
def test_a_wrong_verification_ends_with_2_and_says_why(
    toys: Path, wrong: Path, network: Path, arguments: str, part: str
) -> None:
    names = {
        "toys": toys,
        "tmp": wrong,
        "tuned": tuned(toys),
        "run": tuned(toys).parent,
        "network": network,
    }
    message = fail(2, "verify", *(word.format(**names) for word in shlex.split(arguments)))
    assert part.format(**names) in message


@pytest.mark.parametrize("places", [10, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_anywhere_in_the_file_is_never_an_internal_error(
    toys: Path, tmp_path: Path, places: int
) -> None:
    good = (toys / "model.onnx").read_bytes()
    codes = set()
    for place in range(0, len(good), len(good) // places):
        content = bytearray(good)
        content[place] ^= 0x40
        (tmp_path / "m.onnx").write_bytes(content)
        result = qat("verify", tmp_path / "m.onnx", "--checkpoint", tuned(toys))
        codes.add(result.exit_code)
        assert "Traceback" not in result.output
        assert result.exit_code == 0 or "error: " in result.stderr
    assert codes <= {0, 1, 2}  # 0: the bit lies in a name or a text that nothing depends on
    assert {1, 2} & codes
