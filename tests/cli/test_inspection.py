"""qat inspect: what it prints for each kind of file, and how each wrong input ends."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.cli.inspection import print_compact, print_every_layer
from qat.inspection.facts import InspectedLayer, Inspection, Total
from qat.models.bnext import binary_convolutions, set_temperature
from tests.helpers.checkpoints import prefixed, recipe, toy, training_checkpoint
from tests.helpers.tiny_models import image_model
from tests.helpers.toy_runs import fail, qat, succeed, tuned

#: The verdict on the toy network of tests/helpers/checkpoints.py at temperature 1.
NOT_YET = (
    "binary: not yet: 0 of 7 layers; the temperature is 1, and weights in use are clamp(w / 1, -1, 1), "
    "of which 0 % are exactly ±1; they become ±1 when it falls below 1e-7 (their training multiplies it by "
    "0.9 an epoch: 153 epochs from 1)"
)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state dict of the authors' format, at temperature 1."""
    path = tmp_path_factory.mktemp("published") / "weights.pth.tar"
    torch.save(prefixed(toy(binary=False).state_dict()), path)
    return path


def verdict_of(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("binary: "))
    return line


def as_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("inspect", path, "--json"))
    return found


# What it says.


def test_a_run_directory_is_its_best_checkpoint(toys: Path) -> None:
    text = succeed("inspect", tuned(toys).parent)
    assert text == succeed("inspect", tuned(toys))
    assert text.startswith(f"{tuned(toys)}: bnext-qat checkpoint, fine-tuned, ")
    assert verdict_of(text) == (
        "binary: yes, 1,344 weights at 1 bit; 5 of 5 layers; rest int8, stored as float32"
    )


def test_a_checkpoint_an_integer_network_and_a_model_of_one_run_agree(toys: Path, tmp_path: Path) -> None:
    network, floating = tmp_path / "n.safetensors", tmp_path / "f.onnx"
    run = ("--checkpoint", tuned(toys))
    succeed("export", "--onnx", tmp_path / "m.onnx", "--integer-network", network, *run)
    succeed("export", "--onnx", floating, "--float32", *run)
    found = {path: as_json(path) for path in (tuned(toys), tmp_path / "m.onnx", network, floating)}
    for one in found.values():
        assert one["widths"] == [8, 8, 16]
        assert (one["size"], one["num_classes"]) == ("custom", 10)
        assert one["facts"]["image_size"] == 8
        assert one["facts"]["mean"] == [0.0, 0.0, 0.0]
        assert len(one["facts"]["class_names"]) == 10
        assert one["facts"]["task"] == "finetune"
        assert [(x["name"], x["kind"], x["shapes"], x["binary"]) for x in one["layers"]] == [
            (x["name"], x["kind"], x["shapes"], x["binary"]) for x in found[tuned(toys)]["layers"]
        ]
    integer = "binary: yes, 1,344 weights at 1 bit; 5 of 5 layers; rest int8"
    assert found[network]["verdict"] == found[tmp_path / "m.onnx"]["verdict"] == integer
    assert found[floating]["answer"] == "in use"
    text = succeed("inspect", tmp_path / "m.onnx")
    accuracy = found[network]["facts"]["accuracy"]
    assert f"\nrun: finetune, digits, top-1 {accuracy['top1']:.2f}% of 360 images\n" in text
    assert "\nimages: 8×8 pixels, float32 NCHW, mean (0, 0, 0), std (1, 1, 1)\n" in text
    assert "\nclass names: 10 (0, 1, 2, 3, …)\n" in text


def test_the_authors_weights_at_temperature_one_are_not_binary_and_it_says_why(published: Path) -> None:
    text = succeed("inspect", published)
    assert verdict_of(text) == NOT_YET
    words = " ".join(text.split())
    assert "The float32 parameters are latent weights: training adds its small steps to them" in words
    assert "\ntemperature: 1 in all 7 binary convolutions\n" in text


def test_a_training_checkpoint_says_its_epoch_and_how_many_are_left(tmp_path: Path) -> None:
    model = toy(binary=False)
    set_temperature(model, 0.9**46)
    torch.save(training_checkpoint(model.state_dict()) | {"epoch": 46}, tmp_path / "c")
    text = succeed("inspect", tmp_path / "c")
    assert "\nrun: epoch 46, best top-1 72.4\n" in text
    assert verdict_of(text).endswith("an epoch: 107 epochs after epoch 46)")


def test_mixed_temperatures_have_a_column(tmp_path: Path) -> None:
    model = toy()
    list(binary_convolutions(model).values())[2].temperature.fill_(0.5)
    save_checkpoint(tmp_path / "c", model, recipe=recipe())
    text = succeed("inspect", tmp_path / "c")
    (line,) = (line for line in text.splitlines() if "feature.2.Attention" in line)
    name, shape, bits, _, temperature, share, _, unit = line.split()
    assert (name, shape, bits, temperature, unit) == ("feature.2.Attention", "8×8×3×3", "32", "0.5", "±1")
    exact = as_json(tmp_path / "c")["layers"]
    (layer,) = (layer for layer in exact if layer["name"] == name)
    assert float(share) == pytest.approx(100 * layer["exact_in_use"], abs=0.051)


WIDE = InspectedLayer(
    "feature.13.Attention",
    "scale 3×3",
    ((1024, 1024, 3, 3),),
    "float32",
    32,
    4 * 9 * 2**20,
    (-0.0123, 0.0123),
    "clamp(w / T, -1, 1)",
    "float32",
    exact_stored=0.00001,
    temperature=0.0123,
    exact_in_use=0.987,
)
WIDE_ATTENTION = replace(
    WIDE,
    name="feature.13.Attention.se",
    kind="attention",
    shapes=((128, 1024, 1, 1), (1024, 128, 1, 1)),
    size=2**20,
    in_use="int8",
    result="uint8",
    exact_stored=None,
    temperature=None,
    exact_in_use=None,
    scale=(1.2e-4, 1.2e-3),
)


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("kind", ["fine-tuned", "export", "not yet", "mixed"])
def test_the_widest_names_and_numbers_fit_eighty_columns_with_nothing_folded_or_cut(
    kind: str, every_layer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = replace(WIDE, stored="sign bits", bits=1, values=(-1.0, 1.0), exact_stored=1.0, exact_in_use=1.0)
    binary = {
        "fine-tuned": [replace(packed, in_use="±1", temperature=1e-8)],
        "export": [replace(packed, in_use="±1", temperature=None, multiplier=(1e-4, 1e-3))],
        "not yet": [WIDE],
        "mixed": [WIDE, replace(WIDE, name="feature.12.Attention", temperature=1e-8)],
    }[kind]
    rest = replace(WIDE_ATTENTION, scale=WIDE_ATTENTION.scale if kind == "fine-tuned" else None)
    found = Inspection(
        "f", "a test", 9**9, "BNext large", (1024,) * 14, 10, (*binary, rest, rest), Total(0, 0), {}, False
    )
    (print_every_layer if every_layer else print_compact)(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    # Every row begins with a whole name, and no cell is cut short.
    names = [line.split()[0] for line in lines if line.startswith("  f")]
    expected = [x.name for x in binary]
    assert names == ([*expected, rest.name, rest.name] * 2 if every_layer else expected)
    text = "".join(lines)
    assert "1024×1024×3×3" in text
    assert "…  " not in text


def test_every_layer_has_a_line_in_both_tables_and_attentions_are_grouped_otherwise(toys: Path) -> None:
    names = [layer["name"] for layer in as_json(tuned(toys))["layers"]]
    assert len(names) == 12
    words = [
        line.split()[0] for line in succeed("inspect", tuned(toys), "--layers").splitlines() if line.strip()
    ]
    assert [words.count(name) for name in names] == [2] * len(names)
    compact = succeed("inspect", tuned(toys))
    assert ".se " not in compact
    assert "SE, 5 pairs" in compact


def test_json_is_one_object_with_everything(published: Path) -> None:
    found = as_json(published)
    assert (found["answer"], found["verdict"]) == ("not yet", NOT_YET)
    assert found["file"] == str(published)
    assert found["file_bytes"] == published.stat().st_size
    assert (found["binary_layers"], found["binary_convolutions"]) == (0, 7)
    assert found["totals"]["binary"] == {"count": 3904, "bytes": 4 * 3904, "float32_bytes": 4 * 3904}
    assert {"name", "kind", "shapes", "weights", "stored", "bits", "size", "values", "exact_stored"} <= set(
        found["layers"][1]
    )
    assert found["explanation"]


def test_require_binary_fails_where_weights_in_use_are_not_and_still_prints(
    published: Path, toys: Path
) -> None:
    result = qat("inspect", published, "--require-binary")
    assert result.exit_code == 1
    assert verdict_of(result.stdout) == NOT_YET
    assert result.stderr == (f"error: {published}: not binary: 0 of 7 layers use weights of exactly ±1\n")
    fail(1, "inspect", published, "--require-binary", "--json")
    for path in (toys / "model.onnx", toys / "float.safetensors"):
        succeed("inspect", path, "--require-binary")


def test_require_binary_accepts_signs_that_are_stored_as_float(toys: Path, tmp_path: Path) -> None:
    torch.save(load_checkpoint(toys / "float.safetensors").state, tmp_path / "w.pth")
    assert verdict_of(succeed("inspect", tmp_path / "w.pth", "--require-binary")).startswith(
        "binary: yes in use, but stored as float32: "
    )


def test_notes_on_what_was_chosen_and_left_out_are_shown(toys: Path, tmp_path: Path) -> None:
    state = load_checkpoint(toys / "float.safetensors").state
    inner = {f"net.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(2)}
    torch.save({"model": state, "ema": inner}, tmp_path / "w.pth")
    notes = as_json(tmp_path / "w.pth")["facts"]["notes"]
    assert notes == [
        "its weights are those of ema, an average, as is usual for evaluation; it also holds model "
        "(model.state_key takes another)",
        "left out: 1 entry of other modules (criterion)",
    ]
    shown = succeed("inspect", tmp_path / "w.pth")
    assert all(f"note: {note}\n" in shown for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {f"module.{key}" if key != "fc.bias" else key: state[key] for key in state},
            "half wrapped",
        ),
        (lambda state: {key: state[key] for key in state if not key.startswith("fc.")}, "has no classifier"),
        (lambda state: {"model": torch.nn.Linear(2, 2)}, "holds a whole model"),
    ],
    ids=["half wrapped", "backbone", "whole model"],
)
def test_files_that_hold_no_whole_state_dict_are_refused_in_one_line(
    toys: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    torch.save(change(load_checkpoint(toys / "float.safetensors").state), tmp_path / "w.pth")
    result = qat("inspect", tmp_path / "w.pth")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'w.pth'}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_files_are_recognised_by_content_whatever_their_name(
    toys: Path, published: Path, tmp_path: Path
) -> None:
    for source, name in (
        (toys / "model.onnx", "model.safetensors"),
        (toys / "model.onnx", "model"),
        (published, "weights.onnx"),
        (toys / "float.safetensors", "float.onnx"),
    ):
        shutil.copy(source, tmp_path / name)
        expected = as_json(source)
        assert as_json(tmp_path / name) == expected | {"file": str(tmp_path / name)}


def test_what_a_terminal_would_act_on_is_escaped(toys: Path, tmp_path: Path) -> None:
    model = onnx.load(toys / "model.onnx")
    for entry in model.metadata_props:
        if entry.key in ("architecture", "class_names"):
            entry.value = entry.value.replace('"3"', '"\\u001b[31m"').replace("custom", "\x1b[2Jcustom")
    onnx.save(model, tmp_path / "m.onnx")
    text = succeed("inspect", tmp_path / "m.onnx")
    assert "\x1b" not in text
    assert "\\x1b[31m" in text
    assert "\\x1b[2J" in text


# Refusals.


class _Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("code ran",)


def wrong(kind: str, folder: Path, toys: Path) -> Path:
    path = folder / "file"
    model = (toys / "model.onnx").read_bytes()
    checkpoint = (toys / "float.safetensors").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one byte":
        path.write_bytes(b"\x08")
    elif kind == "text":
        path.write_text("accuracy: 99\n")
    elif kind == "random":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "random zip":
        path.write_bytes(b"PK\x03\x04" + np.random.default_rng(0).bytes(5000))
    elif kind == "random ONNX":
        path.write_bytes(b"\x08" + np.random.default_rng(0).bytes(5000))
    elif kind == "random safetensors":
        path.write_bytes(b"\x10" + b"\0" * 7 + b"{" + np.random.default_rng(0).bytes(5000))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no checkpoint")
    elif kind == "code":
        torch.save({"state_dict": _Code()}, path)
    elif kind == "legacy code":
        torch.save({"state_dict": _Code()}, path, _use_new_zipfile_serialization=False)
    elif kind == "cut model":
        path.write_bytes(model[: len(model) // 2])
    elif kind == "cut checkpoint":
        path.write_bytes(checkpoint[: len(checkpoint) // 2])
    elif kind == "cut header":
        path.write_bytes(checkpoint[:100])
    elif kind == "flipped bit":
        path.write_bytes(checkpoint[:-1] + bytes([checkpoint[-1] ^ 1]))
    elif kind == "foreign model":
        image_model(path)
    elif kind == "foreign weights":
        safetensors.numpy.save_file({"conv.weight": np.ones(3), "conv.bias": np.ones(1)}, path)
    return path


REASONS = {
    "absent": "no such file",
    "folder": "not a run directory (it has no best.safetensors)",
    "empty": "is empty",
    "one byte": "not a model that onnxruntime can load",
    "text": "begins like neither a safetensors file, nor one of torch.save, nor an ONNX model",
    "random": "begins like neither a safetensors file",
    "random zip": "not a readable checkpoint",
    "random ONNX": "not a model that onnxruntime can load",
    "random safetensors": "damaged or cut short safetensors file",
    "zip": "not a readable checkpoint",
    "code": "refused: it asks to unpickle",
    "legacy code": "refused: it asks to unpickle",
    "cut model": "not a model that onnxruntime can load",
    "cut checkpoint": "damaged or cut short safetensors file",
    "cut header": "damaged or cut short safetensors file",
    "flipped bit": "its tensors are damaged",
    "foreign model": "not exported by this tool: expected input 'image'",
    "foreign weights": "not a BNext: key 'feature.0.conv1.weight' is missing; found 2 tensors: conv.",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_no_file_of_ours_or_the_authors_is_refused_saying_why(
    kind: str, toys: Path, tmp_path: Path
) -> None:
    path = wrong(kind, tmp_path, toys)
    message = fail(2, "inspect", path)
    assert message.startswith(f"error: {path}: ")
    assert REASONS[kind] in message
    assert len(message.splitlines()) == 1


def test_a_network_with_missing_keys_is_refused_naming_them(tmp_path: Path) -> None:
    state = toy().state_dict()
    del state["feature.1.FFN.norm1.bias"]
    torch.save(state, tmp_path / "w")
    assert "1 key missing: feature.1.FFN.norm1.bias" in fail(2, "inspect", tmp_path / "w")


def test_an_empty_name_is_refused() -> None:
    assert "is empty; give a path" in fail(2, "inspect", "")
