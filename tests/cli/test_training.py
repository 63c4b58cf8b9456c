"""qat finetune and qat pretrain: what they print, and how each wrong input ends."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from qat.errors import RecipeError
from qat.recipe.loading import load_recipe
from tests.helpers.toy_runs import TOY, fail, image_folder, settings, succeed, tune


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


# Wrong input


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


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("finetune --recipe ''", "'--recipe': is empty"),
        ("finetune --set ''", "'--set': is empty"),
        ("finetune --recipes x", "No such option"),
        ("finetune tiny_int8 extra", "unexpected extra argument"),
        ("finetune tiny_int8 --recipe tiny_int8", "two recipes: tiny_int8 and --recipe tiny_int8"),
        ("finetune --set", "requires an argument"),
    ],
)
def test_a_wrong_training_command_ends_with_2_and_says_why(arguments: str, part: str) -> None:
    assert part in fail(2, *shlex.split(arguments))


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


# A recipe as the argument, and short options


def test_a_recipe_is_the_argument_and_short_options_stand_for_keys(toys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    options = [
        "--checkpoint",
        toys / "float.safetensors",
        "--batch-size",
        320,
        "--image-size",
        8,
        "--lr",
        "1e-5",
    ]
    keys = settings(["model.widths=[8,8,16]", "threads=1", "schedule.calibration_batches=2"])
    printed = succeed(
        "finetune", "tiny_int8", "--epochs", 1, "--device", "cpu", *options, *keys, "-o", folder
    )
    assert f"{folder}: done." in printed
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert (recipe.schedule.epochs, recipe.data.batch_size, recipe.optimizer.lr) == (1, 320, 1e-5)
    assert recipe.model.checkpoint == str(toys / "float.safetensors")
    again = fail(2, "finetune", "tiny_int8", *options, *keys, "-o", folder)
    assert f"{folder}: exists already and is not empty; name another folder with --output" in again


def test_a_run_is_called_as_asked(toys: Path, tmp_path: Path) -> None:
    succeed(*tune(toys, tmp_path), "--run-name", "mine")
    (run,) = tmp_path.iterdir()
    assert run.name.startswith("mine-20")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (
            ["--epochs", "2", "--set", "schedule.epochs=3"],
            "--epochs and --set schedule.epochs=… say the same",
        ),
        (["--epochs", "two"], "'two' is not a valid integer"),
        (["--epochs", "-1"], "schedule.epochs: found -1, allowed: an integer >= 0"),
        (["--data", "2024"], "data.root: found '2024', but only data.dataset"),
        (["--run-name", "a/b"], "output.name: found 'a/b', allowed: a folder's name"),
        (["-o", "/dev/null"], "/dev/null: is a file"),
        (["--resume", "run", "-o", "x"], "goes on in the run's own folder"),
    ],
)
def test_wrong_short_options_are_refused(toys: Path, tmp_path: Path, options: list[str], part: str) -> None:
    keys = settings([f"model.checkpoint={toys / 'float.safetensors'}", "model.widths=[8,8,16]"])
    keys += [] if "--epochs" in options else settings(["schedule.epochs=0"])
    assert part in fail(2, "finetune", *keys, *settings([f"output.dir={tmp_path / 'runs'}"]), *options)
    assert not (tmp_path / "runs").exists()


def test_numbers_are_decimal_and_texts_that_look_like_numbers_stay_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "2024")
    texts = ["data.dataset=imagefolder", "data.root=2024", "data.revision=null"]
    loaded = load_recipe("tiny_int8", texts).recipe
    assert loaded.data.root == "2024"
    assert load_recipe("tiny_int8", [*texts, "data.test_split=2017"]).recipe.data.test_split == "2017"
    for text in ("010", "1:30", "0x10", "0b11", "08"):
        with pytest.raises(RecipeError, match=f"seed: found '{text}', allowed: an integer"):
            load_recipe("tiny_int8", [f"seed={text}"])
    assert load_recipe("tiny_int8", ["seed=10", "optimizer.lr=1e-3"]).recipe.optimizer.lr == 1e-3


# Post-training quantization


def test_quantizing_without_training_is_a_command_of_its_own(toys: Path, tmp_path: Path) -> None:
    _, *options = tune(toys, tmp_path, "data.batch_size=320")
    at = options.index("schedule.epochs=0")
    del options[at - 1 : at + 1]
    printed = succeed("quantize", *options)
    assert "top-1" in printed
    (run,) = tmp_path.iterdir()
    assert load_recipe(run / "recipe.yaml").recipe.schedule.epochs == 0
    message = fail(2, "quantize", *options, "--set", "schedule.epochs=3")
    assert "--set schedule.epochs=…: nothing is trained here; use qat finetune" in message
    message = fail(
        2,
        "quantize",
        *options,
        "--set",
        f"data.root={image_folder(tmp_path / 'i')}",
        "--set",
        "data.dataset=imagefolder",
        "--set",
        "model.num_classes=null",
    )
    assert "model.classifier is 'keep'" in message
