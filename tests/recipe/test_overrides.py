"""``--set``: values changed one by one, and refused under the text that was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.recipe.loading import load_recipe
from qat.recipe.schema import Augment
from tests.helpers.recipes import file_problems, write


def test_overrides_change_values_at_every_level_and_the_last_one_wins() -> None:
    loaded = load_recipe(
        "tiny_int8",
        [
            "seed=3",
            "optimizer.lr=1e-2",
            "quantization.se.weight_bits=6",
            "quantization.se.weight_bits=4",
            "quantization.exclude=[fc]",
            "data.augment={flip: true}",
            "data.dataset=imagefolder",
            "data.root=a=b",
            "output.dir=out",
        ],
    ).recipe
    assert (loaded.seed, loaded.optimizer.lr, loaded.data.root, loaded.output.dir) == (3, 0.01, "a=b", "out")
    assert loaded.quantization is not None
    assert (loaded.quantization.se.weight_bits, loaded.quantization.exclude) == (4, ["fc"])
    assert loaded.data.augment == Augment(flip=True)
    untouched = load_recipe("tiny_int8").recipe
    assert (untouched.seed, untouched.optimizer.lr) == (0, 2e-4)


def test_an_override_creates_the_sections_it_needs(folder: Path) -> None:
    path = write(folder, "task: pretrain\nmodel: {}\ndata: {}\nschedule:\n")
    loaded = load_recipe(path, ["schedule.temperature.share=0.3", "output.dir=out"]).recipe
    assert (loaded.schedule.temperature.share, loaded.output.dir) == (0.3, "out")
    # Without the override the empty section is what it was: null.
    assert file_problems(path)[0].startswith("r.yaml: schedule: found null, ")


def test_an_override_leaves_a_section_that_shares_an_anchor_alone(folder: Path) -> None:
    text = (
        "task: finetune\nmodel: {checkpoint: a}\ndata: {}\n"
        "quantization: {se: &g {weight_bits: 4}, classifier: *g}\n"
    )
    quantization = load_recipe(write(folder, text), ["quantization.se.weight_bits=2"]).recipe.quantization
    assert quantization is not None
    assert (quantization.se.weight_bits, quantization.classifier.weight_bits) == (2, 4)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed", "--set seed: has no '='; write section.key=value"),
        ("=1", "--set =1: has an empty key; write section.key=value"),
        ("data.=1", "--set data.=1: has an empty key; write section.key=value"),
        ("seed=", "--set seed=: has no value; write seed=null for none"),
        ("task.a=1", "--set task.a=1: task holds a value, not a section: it has no keys to set"),
        ("seed=-1", "--set seed=-1: seed: found -1, allowed: an integer >= 0 and < 4294967296"),
        ("optimiser.lr=1", "--set optimiser.lr=1: optimiser: unknown key (did you mean 'optimizer'?)"),
        (
            "quantization.se.weight_bit=4",
            "--set quantization.se.weight_bit=4: quantization.se.weight_bit: unknown key "
            "(did you mean 'weight_bits'?)",
        ),
        (
            "model={}",
            "--set model={}: model.checkpoint: missing; task 'finetune' starts from a trained network",
        ),
    ],
)
def test_a_broken_override_is_refused_under_its_own_text(text: str, line: str) -> None:
    assert file_problems("tiny_int8", text) == [line]


def test_an_override_that_is_not_yaml_is_refused_with_the_place() -> None:
    [line] = file_problems("tiny_int8", "data.mean=[0, 0")
    assert line.startswith("--set data.mean=[0, 0: line 1, column 6: not valid YAML: ")


def test_problems_of_the_file_and_of_overrides_are_reported_together(folder: Path) -> None:
    path = write(folder, "task: pretrain\nseed: -1\nmodel: {}\ndata: {}\n")
    assert file_problems(path, "seed", "optimizer.lr=0", "output.dirs=x") == [
        "--set seed: has no '='; write section.key=value",
        "r.yaml: seed: found -1, allowed: an integer >= 0 and < 4294967296",
        "--set optimizer.lr=0: optimizer.lr: found 0, allowed: a number > 0",
        "--set output.dirs=x: output.dirs: unknown key (did you mean 'dir'?)",
    ]


def test_an_override_mends_what_the_file_has_wrong(folder: Path) -> None:
    path = write(folder, "task: pretrain\nseed: -1\nmodel: {}\ndata: {}\n")
    assert len(file_problems(path)) == 1
    assert load_recipe(path, ["seed=1"]).recipe.seed == 1
