"""Recipes that are wrong: the error lists every problem with its key and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_origin

import pytest

from qat.recipe.loading import parse_recipe
from qat.recipe.schema import Recipe, Section
from tests.helpers.recipes import FINETUNE, PRETRAIN, changed, problems


def key_paths(model: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted path of each section below ``model``."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is list:  # a list of sections; it has tests of its own
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield f"{prefix}{name}"
                yield from key_paths(kind, f"{prefix}{name}.")


SECTIONS = list(key_paths(Recipe))


def test_every_section_is_known_to_these_tests() -> None:
    groups = [f"quantization.{name}" for name in ("stem", "se", "classifier", "trunk")]
    others = ["model", "data", "data.augment", "data.augment.randaugment", "schedule"]
    others += ["schedule.temperature", "optimizer", "loss", "distillation", "output", "tracking"]
    assert sorted(SECTIONS) == sorted([*groups, *others, "quantization"])


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    key = f"{section}.qqq".lstrip(".")
    line = next(line for line in problems(changed(FINETUNE, key, 1)) if line.startswith(f"r.yaml: {key}: "))
    assert line.startswith(f"r.yaml: {key}: unknown key; allowed: ")
    assert not line.endswith("allowed: ")


def test_an_unknown_key_comes_with_the_nearest_known_one() -> None:
    assert parse_recipe(changed(FINETUNE, "quantization.se.weight_bits", 4), "r.yaml")
    assert problems(changed(FINETUNE, "quantization.se.weight_bit", 4), "recipes/tiny_int8.yaml") == [
        "recipes/tiny_int8.yaml: quantization.se.weight_bit: unknown key (did you mean 'weight_bits'?)"
    ]


def test_a_key_that_is_a_number_is_refused() -> None:
    [line] = problems({**FINETUNE, 1: 2})
    assert line.startswith("r.yaml: 1: unknown key; allowed: task, ")


def test_weights_of_the_trunk_are_refused_with_the_reason() -> None:
    assert parse_recipe(changed(FINETUNE, "quantization.trunk.activation_bits", 4), "r.yaml")
    [line] = problems(changed(FINETUNE, "quantization.trunk.weight_bits", 4))
    assert line.startswith("r.yaml: quantization.trunk.weight_bits: ")
    assert "the trunk has no weights of its own beyond the 1 bit" in line


@pytest.mark.parametrize("key", ["activation_bits", "observer", "averaging_constant", "percentile", "clip"])
def test_activations_of_the_stem_are_refused_with_the_reason(key: str) -> None:
    [line] = problems(changed(FINETUNE, f"quantization.stem.{key}", 8))
    assert line.startswith(f"r.yaml: quantization.stem.{key}: ")
    assert "only the stem's weights are quantized" in line


def test_required_keys_that_are_absent_are_named_together() -> None:
    lines = problems({})
    assert [line.split(": ")[1:3] for line in lines] == [
        ["task", "missing; allowed"],
        ["model", "missing; allowed"],
        ["data", "missing; allowed"],
    ]


def test_every_problem_is_reported_at_once() -> None:
    raw = {
        "task": "finetune",
        "seed": -1,
        "model": {"size": "tinny"},
        "data": {"image_size": 32, "resize": 20, "mean": [0.0, 1.0]},
        "quantization": {"se": {"weight_bit": 4}},
        "optimizer": {"lr": "fast"},
    }
    assert sorted(problems(raw)) == [
        "r.yaml: data.mean: found [0.0, 1.0], allowed: a list of 3, each a number",
        "r.yaml: data.resize: found 20, allowed: at least data.image_size, which is 32",
        "r.yaml: model.checkpoint: missing; task 'finetune' starts from a trained network",
        "r.yaml: model.size: found 'tinny', allowed: 'tiny', 'small', 'middle', 'large' "
        "(did you mean 'tiny'?)",
        "r.yaml: optimizer.lr: found 'fast', allowed: a number > 0",
        "r.yaml: quantization.se.weight_bit: unknown key (did you mean 'weight_bits'?)",
        "r.yaml: seed: found -1, allowed: an integer >= 0 and < 4294967296",
    ]


OVERRIDE = "r.yaml: quantization.overrides[1]"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"match": "fc", "weight_bit": 4}, ".weight_bit: unknown key (did you mean 'weight_bits'?)"),
        ({"weight_bits": 4}, ".match: missing; allowed: a text that is not empty"),
        ({"match": "", "weight_bits": 4}, ".match: found '', allowed: a text that is not empty"),
        (
            {"match": "fc", "weight_bits": 9},
            ".weight_bits: found 9, allowed: an integer from 2 to 8, or null",
        ),
        (
            {"match": "*", "activation_bits": 17},
            ".activation_bits: found 17, allowed: an integer from 2 to 16",
        ),
        ({"match": "*", "percentile": 0}, ".percentile: found 0, allowed: a number > 0 and <= 100"),
        ({"match": "*", "clip": -1.0}, ".clip: found -1.0, allowed: a number > 0, or null"),
        ({"match": "*", "observer": "max"}, ".observer: found 'max', allowed: 'moving_average', 'minmax'"),
        (7, ": found 7, allowed: a section with keys match, weight_bits"),
    ],
)
def test_a_wrong_override_is_refused_with_its_place_in_the_list(entry: object, line: str) -> None:
    entries = [{"match": "fc", "weight_bits": 4}, entry]
    found = problems(changed(FINETUNE, "quantization.overrides", entries))
    assert len(found) == 1
    assert found[0].startswith(OVERRIDE + line)


def test_a_task_has_no_default_and_no_other_name() -> None:
    assert parse_recipe(PRETRAIN, "r.yaml").task == "pretrain"
    assert problems({**PRETRAIN, "task": "pretrian"}) == [
        "r.yaml: task: found 'pretrian', allowed: 'pretrain', 'finetune' (did you mean 'pretrain'?)"
    ]


def test_a_number_that_is_not_finite_is_called_so() -> None:
    [line] = problems(changed(FINETUNE, "model.latent", float("nan")))
    assert line == "r.yaml: model.latent: found nan, allowed: a finite number > 0"


def test_a_width_that_neither_stays_nor_doubles_is_named_with_its_position() -> None:
    assert problems(changed(FINETUNE, "model.widths", [8, 16, 48])) == [
        "r.yaml: model.widths: found 48 at position 2, allowed after 16: 16 or 32 "
        "(a block keeps its width or doubles it)"
    ]


def test_a_section_that_is_not_a_mapping_is_refused_with_its_keys() -> None:
    for value in (None, 3, ["teacher"]):
        [line] = problems(changed(FINETUNE, "distillation", value))
        assert line.endswith(
            "allowed: a section with keys teacher, teachers, teacher_weights, weight, temperature"
        )


@pytest.mark.parametrize("value", [None, 3, "text", ["task"]])
def test_a_recipe_that_is_not_a_mapping_is_refused(value: object) -> None:
    [line] = problems(value)
    assert line.startswith("r.yaml: found ")
    assert "at the top level, allowed: a section with keys task, " in line


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {"dataset": "imagefolder", "validation_share": 0.1, "test_split": "test"},
            "r.yaml: data.validation_share: found 0.1, allowed beside data.test_split, which is 'test': null",
        ),
        (
            {"dataset": "parquet", "validation_share": 0.1, "streaming": True},
            "r.yaml: data.validation_share: found 0.1, allowed where images are streamed: null",
        ),
        (
            {"dataset": "parquet", "on_error": "skip", "streaming": True},
            "r.yaml: data.on_error: found 'skip', allowed where images are streamed: 'stop'",
        ),
        (
            {"dataset": "digits", "final_split": "test"},
            "r.yaml: data.final_split: found 'test', but only data.dataset 'imagefolder', 'parquet', "
            "'cifar10' and 'hub' has it",
        ),
    ],
)
def test_two_ways_to_say_which_images_are_used_are_refused(data: dict[str, object], line: str) -> None:
    assert problems(changed(FINETUNE, "data", data)) == [line]
