"""The command line: what each command prints, and how each wrong input ends."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from toyruns import TOY, fail, finetune_arguments, image_folder, pretrain_toy, qat, settings, succeed

from export.integer import IntegerNetwork
from qat import commands
from qat.bnext import set_temperature
from qat.checkpoint import load_checkpoint, save_checkpoint
from qat.cli import main
from qat.loading import build
from qat.recipe import recipe_names

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``float.safetensors``, a run below ``runs``, and its ``model.onnx``."""
    folder = tmp_path_factory.mktemp("toys")
    shutil.copy(pretrain_toy(folder / "pretrain"), folder / "float.safetensors")
    succeed(*finetune_arguments(folder / "runs", folder / "float.safetensors"))
    succeed("export", "--onnx", folder / "model.onnx", "--runs", folder / "runs")
    return folder


def tune(toys: Path, out: Path, *overrides: str) -> list[str]:
    return finetune_arguments(out, toys / "float.safetensors", *overrides)


def tuned(toys: Path) -> Path:
    """The fine-tuned checkpoint."""
    (path,) = (toys / "runs").glob("*/best.safetensors")
    return path


# Help and recipes


def test_help_names_the_commands_and_the_exit_codes() -> None:
    text = succeed("--help")
    for word in ("finetune", "pretrain", "export", "evaluate", "recipe", "--debug", "Exit codes", "130"):
        assert word in text, word
    assert succeed("-h") == text
    assert succeed("--version").startswith("qat, version ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetune", "--recipe --set tiny_int8 KEY=VALUE"),
        ("pretrain", "--recipe --set tiny_digits_pretrain ±1"),
        ("export", "--onnx --run --checkpoint --runs --image-size --set"),
        ("evaluate", "MODEL --recipe --set --json"),
        ("recipe", "list show copy schema"),
        ("recipe show", "NAME --resolved --set"),
        ("recipe copy", "NAME DESTINATION --force"),
    ],
)
def test_each_commands_help_mentions_its_options(command: str, words: str) -> None:
    text = succeed(*command.split(), "--help")
    assert all(word in text for word in words.split())


def test_recipes_are_listed_shown_copied_and_described(tmp_path: Path) -> None:
    listed = succeed("recipe", "list")
    assert all(name in listed for name in recipe_names())
    shown = succeed("recipe", "show", "tiny_int8")
    assert shown == (ROOT / "recipes" / "tiny_int8.yaml").read_text(encoding="utf-8")
    assert "epochs: 5" in succeed("recipe", "show", "tiny_int8", "--set", "schedule.epochs=5")
    assert succeed("recipe", "copy", "tiny_int8", tmp_path).strip() == str(tmp_path / "tiny_int8.yaml")
    assert succeed("recipe", "show", tmp_path / "tiny_int8.yaml") == shown
    assert "exists already" in fail(2, "recipe", "copy", "tiny_int8", tmp_path)
    succeed("recipe", "copy", "tiny_int8", tmp_path, "--force")
    assert json.loads(succeed("recipe", "schema"))["properties"]["quantization"]
    assert "no such recipe" in fail(2, "recipe", "show", "tiny_int")


# The commands


def test_finetune_tells_what_it_does_and_what_to_do_next(toys: Path, tmp_path: Path) -> None:
    lines = succeed(*tune(toys, tmp_path, "schedule.epochs=1")).splitlines()
    opens = [
        "BNext custom [8, 8, 16]",
        "float rest: top-1 ",
        "calibrated ",
        "epoch 1/1  loss ",
        "int8: top-1 ",
    ]
    for line, start in zip(lines, opens, strict=False):
        assert line.startswith(start)
    (run,) = tmp_path.iterdir()
    assert lines[-1] == f"{run}: done. Export it with: qat export --onnx --run {run}"


def test_pretrain_names_its_checkpoint(tmp_path: Path) -> None:
    options = settings([*TOY, "schedule.epochs=1", f"output.dir={tmp_path}", "data.batch_size=512"])
    last = succeed("pretrain", *options).splitlines()[-1]
    assert last.endswith("best.safetensors: written")
    assert Path(last.removesuffix(": written")).is_file()


def test_evaluate_prints_one_json_object_and_agrees_for_run_checkpoint_and_model(toys: Path) -> None:
    found = []
    for model in (tuned(toys).parent, tuned(toys), toys / "model.onnx"):
        text = succeed("evaluate", model, "--json")
        assert len(text.splitlines()) == 1
        found.append(json.loads(text))
    assert {"top1", "top5", "n"} <= set(found[0])
    assert found[0]["n"] == 360
    assert found[0] == found[1]
    assert {one["top1"] for one in found} == {found[0]["top1"]}
    assert succeed("evaluate", toys / "model.onnx").startswith(f"top-1 {found[0]['top1']:.2f}%  top-5 ")


def test_export_without_a_path_takes_the_newest_run_and_writes_beside_its_checkpoint(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        succeed(*tune(toys, Path("runs")))
    text = succeed("export", "--onnx")
    older, newer = sorted(Path("runs").iterdir(), key=lambda run: (run / "summary.json").stat().st_mtime_ns)
    assert text.splitlines()[-1].startswith(f"{newer / 'model.onnx'}: ")
    assert text.splitlines()[-1].endswith("MB, verified")
    assert not (older / "model.onnx").exists()
    again = newer / "again" / "model.onnx"
    succeed("export", "--onnx", again, "--run", newer)
    assert (newer / "model.onnx").read_bytes() == again.read_bytes()


def test_a_model_for_another_image_size_is_evaluated_at_that_size(toys: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.ONNX"
    succeed("export", "--onnx", path, "--checkpoint", tuned(toys), "--image-size", "16")
    succeed("evaluate", path)
    assert "data.image_size is 8" in fail(2, "evaluate", path, "--set", "data.image_size=8")


def test_a_model_that_differs_from_its_network_leaves_the_earlier_file_alone(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    succeed("export", "--onnx", path, "--checkpoint", tuned(toys))
    good = path.read_bytes()
    emit = commands.emit

    def damaged(network: IntegerNetwork) -> onnx.ModelProto:
        multiplier = network.head.classifier.multiplier
        multiplier[:] = multiplier[::-1].copy() * np.float32(1.5)
        return emit(network)

    monkeypatch.setattr(commands, "emit", damaged)
    message = fail(1, "export", "--onnx", path, "--checkpoint", tuned(toys))
    assert "the exported model does not match" in message
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("command", [("evaluate",), ("recipe", "copy", "tiny_int8")])
def test_a_name_too_long_for_a_file_is_an_error_of_the_user(command: tuple[str, ...]) -> None:
    assert "too long" in fail(2, *command, "x" * 300)


def test_published_weights_are_evaluated_with_the_stem_stride_of_the_recipe(
    toys: Path, tmp_path: Path
) -> None:
    published = tmp_path / "published.pth"
    torch.save(load_checkpoint(toys / "float.safetensors").state, published)
    found = {}
    for stride in (1, 2):
        overrides = (*TOY, f"model.stem_stride={stride}")
        recipe_yaml = succeed("recipe", "show", "tiny_digits_pretrain", *settings(overrides))
        (tmp_path / f"{stride}.yaml").write_text(recipe_yaml, encoding="utf-8")
        found[stride] = succeed("evaluate", published, "--recipe", tmp_path / f"{stride}.yaml", "--json")
    assert found[1] == succeed("evaluate", toys / "float.safetensors", "--json")
    assert found[1] != found[2]
    # Our own checkpoint knows its stride.
    result = qat("evaluate", toys / "float.safetensors", "--recipe", tmp_path / "2.yaml", "--json")
    assert (result.exit_code, result.stdout) == (0, found[1])
    assert "describes BNext custom [8, 8, 16], 10 classes, stem stride 2; evaluated is what" in result.stderr


def test_a_recipe_of_another_network_lends_its_data_with_a_warning(toys: Path) -> None:
    path = toys / "float.safetensors"
    result = qat("evaluate", path, "--recipe", "tiny_int8", "--set", "data.image_size=8", "--json")
    assert (result.exit_code, result.stdout) == (0, succeed("evaluate", path, "--json"))
    assert "model: describes BNext tiny, 10 classes" in result.stderr


def test_weights_that_are_not_binary_are_evaluated_with_a_warning(toys: Path, tmp_path: Path) -> None:
    stored = load_checkpoint(toys / "float.safetensors")
    for temperature in (1e-7, 0.3):
        model = build(stored)
        set_temperature(model, temperature)
        path = tmp_path / f"{temperature}.safetensors"
        save_checkpoint(path, model, recipe=stored.recipe)
        result = qat("evaluate", path, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["n"] == 360
        assert result.stderr == (
            f"warning: {path}: the weights in use are not binary: the temperature is {temperature:.3g}, "
            "binary means below 1e-7\n"
        )
    succeed("evaluate", toys / "float.safetensors", "--json")


def test_another_normalization_is_refused_for_a_quantized_checkpoint_and_unusual_for_others(
    toys: Path, tmp_path: Path
) -> None:
    for key, value in (("mean", [0.0, 0.0, 1.0]), ("std", [1.0, 1.0, 0.5])):
        override = f"data.{key}={value}"
        message = fail(2, "evaluate", tuned(toys), "--set", override)
        assert f"data.{key} is {value}, {tuned(toys)} was made for [" in message
        (tmp_path / "r.yaml").write_text(
            succeed("recipe", "show", "tiny_int8", *settings([*TOY, override])), encoding="utf-8"
        )
        assert f"data.{key} is {value}" in fail(2, "evaluate", tuned(toys), "--recipe", tmp_path / "r.yaml")
        result = qat("evaluate", toys / "float.safetensors", "--set", override)
        assert result.exit_code == 0
        assert result.stderr.startswith(f"warning: data.{key} is {value}, ")
    succeed("evaluate", tuned(toys), "--set", "data.mean=[0,0,0]", "--set", "data.std=[1,1,1]")


def test_another_image_size_is_evaluated_with_a_warning(toys: Path) -> None:
    result = qat("evaluate", tuned(toys), "--set", "data.image_size=16", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["n"] == 360
    assert result.stderr == f"warning: data.image_size is 16, {tuned(toys)} was trained with 8\n"


# Wrong input: recipes


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("schedule.epoch=1", "did you mean 'epochs'"),
        ("quantization.se.weight_bit=4", "did you mean 'weight_bits'"),
        ("schedule.epochs=many", "schedule.epochs: found 'many'"),
        ("schedule.epochs=-1", "schedule.epochs: found -1"),
        ("schedule.epochs=1.5", "schedule.epochs: found 1.5"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("data.std=[0,0,0]", "data.std"),
        ("data.image_size=1", "data.image_size"),
        ("model.num_classes=7", "the data has 10 classes, the network 7"),
        ("model.widths=[8,8,12]", "model.widths"),
        ("model.widths=[8,16,16]", "does not fit the network"),
        ("model.checkpoint=absent.safetensors", "found no file 'absent.safetensors'"),
        ("data.batch_size=5000", "5000 is more than the 1437 training images"),
        ("device=cuda:99", "device: 'cuda:99' cannot be used here"),
        ("device=gpu", "device: found 'gpu'"),
        ("task=pretrain", "task"),
        ("quantization.exclude=[nothing*]", "'nothing*' matches no module"),
        ("noequals", "has no '='"),
        ("=3", "--set =3"),
        ("model.checkpoint.size=3", "model.checkpoint"),
    ],
)
def test_a_wrong_setting_is_named_and_leaves_nothing_behind(
    toys: Path, tmp_path: Path, override: str, part: str
) -> None:
    changes = [override] if override.startswith("schedule.epochs") else ["schedule.epochs=1", override]
    message = fail(2, *tune(toys, tmp_path / "runs", *changes))
    assert part in message
    assert not (tmp_path / "runs").exists()


def test_every_wrong_setting_is_reported_at_once(toys: Path, tmp_path: Path) -> None:
    message = fail(2, *tune(toys, tmp_path, "optimizer.lr=fast", "seed=-1"))
    assert "optimizer.lr" in message
    assert "seed" in message


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "text", "bytes", "not YAML", "empty name"])
def test_a_recipe_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "r.yaml"
    content = {"empty": b"", "text": b"hello", "bytes": b"\xff\xfe\x00", "not YAML": b"a: [1"}
    if kind == "folder":
        path.mkdir()
    elif kind in content:
        path.write_bytes(content[kind])
    message = fail(2, "finetune", "--recipe", "" if kind == "empty name" else path)
    assert kind == "empty name" or "r.yaml" in message


def test_a_recipe_for_the_other_command_says_which() -> None:
    assert "`qat pretrain`, not `qat finetune`" in fail(2, "finetune", "--recipe", "tiny_digits_pretrain")
    assert "`qat finetune`, not `qat pretrain`" in fail(2, "pretrain", "--recipe", "tiny_int8")


# Wrong input: checkpoints and models


class _Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "bits", "text", "folder", "null bytes"])
def test_a_damaged_checkpoint_is_refused_by_every_command(toys: Path, tmp_path: Path, damage: str) -> None:
    path, good = tmp_path / "c.safetensors", tuned(toys).read_bytes()
    if damage == "folder":
        path.mkdir()
    else:
        content = {
            "empty": b"",
            "truncated": good[: len(good) // 2],
            "header": good[:20] + b"\xff" * 40 + good[60:],
            "bits": good[:-400] + b"\xff" * 400,
            "text": b"hello\n",
            "null bytes": bytes(1000),
        }
        path.write_bytes(content[damage])
    for command in (
        tune(toys, tmp_path / "runs", f"model.checkpoint={path}"),
        ["export", "--onnx", "--checkpoint", path],
        ["evaluate", path],
    ):
        assert str(path) in fail(2, *command)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "model.onnx").exists()


def test_code_in_a_checkpoint_is_not_run(toys: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "c.pth.tar", tmp_path / "trace"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": _Hostile(trace)}, path)
    assert "refused" in fail(2, *tune(toys, tmp_path / "runs", f"model.checkpoint={path}"))
    fail(2, "evaluate", path)
    path.write_bytes(pickle.dumps(_Hostile(trace)))
    fail(2, "export", "--onnx", "--checkpoint", path)
    assert not trace.exists()


def test_weights_that_are_not_binary_are_neither_tuned_nor_exported(toys: Path, tmp_path: Path) -> None:
    for source, name in ((toys / "float.safetensors", "float"), (tuned(toys), "tuned")):
        stored = load_checkpoint(source)
        model = build(stored)
        set_temperature(model, 0.3)
        save_checkpoint(tmp_path / f"{name}.safetensors", model, recipe=stored.recipe)
    soft = f"model.checkpoint={tmp_path / 'float.safetensors'}"
    assert "the temperature is 0.3" in fail(2, *tune(toys, tmp_path / "runs", soft))
    message = fail(2, "export", "--onnx", "--checkpoint", tmp_path / "tuned.safetensors")
    assert "tuned.safetensors: feature.1" in message
    assert "temperature 0.3" in message


def test_a_trunk_left_in_float_is_not_exported_and_the_group_is_named(toys: Path, tmp_path: Path) -> None:
    arguments = tune(toys, tmp_path)
    arguments[1:1] = ["--recipe", "tiny_int8_paper"]
    succeed(*arguments)
    message = fail(2, "export", "--onnx", "--runs", tmp_path)
    assert "trunk" in message
    assert "float" in message
    assert not list(tmp_path.glob("*/model.onnx"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("export", "say what to export: --onnx"),
        ("export --onnx --runs {tmp}/nowhere", "no finished finetune run here"),
        ("export --onnx --run {tmp}/nowhere", "no such run directory"),
        ("export --onnx --run {tmp}", "not a run directory"),
        ("export --onnx --run {tmp} --checkpoint {toys}/float.safetensors", "exclude each other"),
        ("export --onnx --checkpoint {toys}/float.safetensors", "fine-tune it first"),
        ("export --onnx --checkpoint {tmp}/nowhere", "no such file"),
        ("export --onnx {tmp}/model.bin --runs {toys}/runs", "does not end in .onnx"),
        ("export --onnx {tuned} --runs {toys}/runs", "does not end in .onnx"),
        ("export --onnx {tmp}/file/m.onnx --runs {toys}/runs", "cannot be written"),
        ("export --onnx --runs {toys}/runs --image-size 0", "--image-size"),
        ("export --onnx --runs {toys}/runs --image-size 7", "7 is not in the range x>=8"),
        ("export --onnx --runs {toys}/runs --image-size many", "--image-size"),
        ("export --onnx --runs {toys}/runs --set data.image_size=16", "say it with --image-size"),
        ("export --onnx --runs {toys}/runs --set data.std=[1,1,2]", "fixed by the checkpoint"),
        ("export --onnx --runs {toys}/runs --set data.mean=[0,0,1]", "fixed by the checkpoint"),
        ("export --onnx --runs {toys}/runs --set optimizer.lr=1", "no effect here"),
        ("export --onnx --runs {toys}/runs --set data.datasets=x", "did you mean 'dataset'"),
        ("evaluate", "Missing argument 'MODEL'"),
        ("evaluate {tmp}", "not a run directory"),
        ("evaluate {tmp}/nowhere", "no such file"),
        ("evaluate {tmp}/nowhere.onnx", "no such file"),
        ("evaluate {tmp}/file", "{tmp}/file: "),
        ("evaluate {tmp}/text.onnx", "not a model that onnxruntime can load"),
        ("evaluate {tmp}/half.onnx", "not a model that onnxruntime can load"),
        ("evaluate {tmp}/empty.onnx", "text.onnx: |empty.onnx: "),
        ("evaluate {tmp}/folder.onnx", "not a run directory"),
        ("evaluate {toys}/model.onnx --set data.image_size=16", "data.image_size is 16"),
        ("evaluate {toys}/model.onnx --set data.mean=[0,0,1]", "data.mean is [0.0, 0.0, 1.0]"),
        ("evaluate {toys}/model.onnx --set data.dataset=imagefolder", "data.root is unset"),
        ("evaluate {toys}/model.onnx --set schedule.epochs=1", "no effect here"),
        ("evaluate {toys}/model.onnx --recipe nowhere", "no such recipe file"),
        ("evaluate {toys}/model.onnx --recipe nowhere", "`qat recipe list`"),
        ("evaluate ''", "'MODEL': is empty; give a path"),
        ("evaluate {toys}/model.onnx --set ''", "'--set': is empty; write section.key=value"),
        ("evaluate {toys}/model.onnx --recipe ''", "'--recipe': is empty; give a recipe file or a name from"),
        ("finetune --recipe ''", "'--recipe': is empty"),
        ("finetune --set ''", "'--set': is empty"),
        ("export --onnx --run ''", "'--run': is empty"),
        ("export --onnx --checkpoint ''", "'--checkpoint': is empty"),
        ("export --onnx --set ''", "'--set': is empty"),
        ("recipe show ''", "'NAME': is empty"),
        ("recipe copy tiny_int8 ''", "'[DESTINATION]': is empty; give a path"),
        ("evaluate {toys}/float.safetensors --set data.eval_batch_size=0", "data.eval_batch_size"),
        ("evaluate {toys}/float.safetensors extra", "unexpected extra argument"),
        ("train", "No such command 'train'"),
        ("finetune --recipes x", "No such option"),
        ("finetune extra", "unexpected extra argument"),
        ("finetune --set", "requires an argument"),
        ("recipe shows", "No such command"),
        ("recipe copy tiny_int8 {tmp}/file/r.yaml", "cannot be written"),
    ],
)
def test_a_wrong_command_ends_with_2_and_says_why(
    toys: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    (tmp_path / "text.onnx").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    model = (toys / "model.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(model[: len(model) // 2])
    before = tuned(toys).read_bytes()
    words = [word.format(toys=toys, tmp=tmp_path, tuned=tuned(toys)) for word in shlex.split(arguments)]
    message = fail(2, *words)
    assert any(one.format(tmp=tmp_path) in message for one in part.split("|"))
    assert tuned(toys).read_bytes() == before


def test_data_of_other_classes_does_not_fit(toys: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=1, test=1)
    options = settings(["data.dataset=imagefolder", f"data.root={root}"])
    for model in (toys / "model.onnx", toys / "float.safetensors"):
        assert "the data has 2 classes, the network 10" in fail(2, "evaluate", model, *options)


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_file_in_place_of_the_output_folder_is_refused(toys: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert f"{tmp_path}/file" in fail(2, *tune(toys, Path(f"{tmp_path}/file{below}")))


# Runs that end badly


def test_a_loss_that_is_no_number_ends_with_1_and_names_the_checkpoint_kept(
    toys: Path, tmp_path: Path
) -> None:
    message = fail(1, *tune(toys, tmp_path, "optimizer.lr=1e30", "schedule.epochs=1"))
    (run,) = tmp_path.iterdir()
    assert f"the last good checkpoint is {run / 'last.safetensors'}" in message
    succeed("evaluate", run)
    fail(2, "export", "--onnx", "--runs", tmp_path)  # it is not a finished run


def test_debug_shows_a_traceback_before_and_after_the_command() -> None:
    for arguments in (("--debug", "evaluate", "nowhere"), ("evaluate", "nowhere", "--debug")):
        result = qat(*arguments)
        assert result.exit_code == 2
        assert "Traceback (most recent call last)" in result.stderr
        assert "CheckpointError" in result.stderr
        assert result.stderr.splitlines()[-1] == "error: nowhere: no such file"
    # As a value it is no option.
    assert "Traceback" not in fail(2, "finetune", "--set", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError(), 2, "error: not enough memory: "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "error: not enough memory: ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: not enough memory: "),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: cannot write: No space left"),
        (ValueError("odd"), 3, "error: internal error: ValueError: odd (see `qat --debug`)\n"),
        (RecursionError("deep"), 3, "error: internal error: RecursionError: deep"),
        (AssertionError(), 3, "error: internal error: AssertionError (see"),
    ],
)
def test_other_errors_have_codes_too_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("qat.commands.evaluate_model", broken)
    result = CliRunner().invoke(main, ["evaluate", "x"])
    assert result.exit_code == code
    assert result.stderr.startswith(text)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# As a process of its own


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qat", *map(str, arguments)],
        env=environment | options.pop("env", {}),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    for command in (["recipe", "schema"], ["recipe", "list"]):
        read, write = os.pipe()
        os.close(read)
        process = start(*command, stdout=write)
        os.close(write)
        _, errors = process.communicate(timeout=60)
        assert errors == ""


def test_an_interrupt_ends_a_run_with_130_and_its_checkpoint_stays_readable(
    toys: Path, tmp_path: Path
) -> None:
    process = start(*tune(toys, tmp_path, "schedule.epochs=500"))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "last.safetensors").quantization is not None
    assert not list(run.glob(".*.tmp"))


def test_a_narrow_encoding_replaces_signs_rather_than_failing() -> None:
    process = start("pretrain", "--help", env={"PYTHONIOENCODING": "cp866", "PYTHONUTF8": "0"})  # has no ±
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "exactly ?1." in output


def test_the_command_line_answers_before_torch_is_loaded() -> None:
    program = "import sys, qat.cli; sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime')))"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0
    assert time.perf_counter() - started < 30
