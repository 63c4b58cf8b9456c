"""Keys that depend on the task: each valid case stands beside a broken one."""

from __future__ import annotations

from typing import Any

import pytest

from qat.recipe.loading import parse_recipe
from tests.helpers.recipes import FINETUNE, PRETRAIN, changed, problems, value_at


def test_finetuning_needs_quantization_and_pretraining_refuses_it() -> None:
    assert parse_recipe(FINETUNE, "r.yaml").quantization is not None
    assert parse_recipe({**PRETRAIN, "quantization": None}, "r.yaml").quantization is None
    [missing] = problems({key: value for key, value in FINETUNE.items() if key != "quantization"})
    assert missing.startswith("r.yaml: quantization: missing; task 'finetune' needs it")
    [extra] = problems({**PRETRAIN, "quantization": {}})
    assert extra.startswith("r.yaml: quantization: task 'pretrain' trains in float")


def test_finetuning_needs_a_checkpoint_and_pretraining_does_not() -> None:
    assert parse_recipe(PRETRAIN, "r.yaml").model.checkpoint is None
    [line] = problems({**FINETUNE, "model": {}})
    assert line == "r.yaml: model.checkpoint: missing; task 'finetune' starts from a trained network"


@pytest.mark.parametrize(
    ("key", "value", "used"),
    [
        ("temperature.start", 2.0, "pretrain"),
        ("temperature.end", 1e-9, "pretrain"),
        ("temperature.share", 0.3, "pretrain"),
        ("temperature.decay", 1e-3, "pretrain"),
        ("calibration_batches", 4, "finetune"),
        ("freeze_observers", 0.1, "finetune"),
        ("freeze_batch_norm", 0.1, "finetune"),
        ("freeze_binary", True, "finetune"),
    ],
)
def test_a_schedule_key_that_the_task_would_ignore_is_refused(key: str, value: object, used: str) -> None:
    fitting, other = (PRETRAIN, FINETUNE) if used == "pretrain" else (FINETUNE, PRETRAIN)
    assert (
        value_at(parse_recipe(changed(fitting, f"schedule.{key}", value), "r.yaml"), f"schedule.{key}")
        == value
    )
    [line] = problems(changed(other, f"schedule.{key}", value))
    assert line.startswith(f"r.yaml: schedule.{key}: only task '{used}' ")


@pytest.mark.parametrize(
    ("base", "named", "teacher"),
    [
        (FINETUNE, None, "self"),
        (FINETUNE, "none", "none"),
        (FINETUNE, "self", "self"),
        (PRETRAIN, None, "none"),
        (PRETRAIN, "none", "none"),
    ],
)
def test_the_teacher_follows_the_task_unless_named(
    base: dict[str, Any], named: str | None, teacher: str
) -> None:
    assert parse_recipe(changed(base, "distillation.teacher", named), "r.yaml").teacher == teacher


def test_named_teachers_stand_alone_and_each_may_have_a_weight() -> None:
    named = changed(PRETRAIN, "distillation.teachers", ["a.pth", "timm:net"])
    assert parse_recipe(named, "r.yaml").teacher == "named"
    assert parse_recipe(changed(named, "distillation.teacher_weights", [1, 2.5]), "r.yaml")
    assert problems(changed(named, "distillation.teacher_weights", [1])) == [
        "r.yaml: distillation.teacher_weights: found 1 weights, allowed: one for each of "
        "distillation.teachers, which are 2"
    ]
    assert problems(changed(named, "distillation.teacher", "none")) == [
        "r.yaml: distillation.teacher: found 'none', allowed beside distillation.teachers: null"
    ]


@pytest.mark.parametrize("key", ["weight", "temperature"])
def test_distillation_without_a_teacher_is_refused(key: str) -> None:
    named = changed(PRETRAIN, "distillation.teachers", ["a.pth"])
    assert parse_recipe(changed(named, f"distillation.{key}", 0.9), "r.yaml")
    assert problems(changed(PRETRAIN, f"distillation.{key}", 0.9)) == [
        f"r.yaml: distillation.{key}: not used without a teacher; name some with distillation.teachers, "
        "or remove it"
    ]


def test_a_temperature_that_falls_by_steps_must_end_binary() -> None:
    stepped = changed(PRETRAIN, "schedule.temperature.decay", 0.9)
    assert parse_recipe(changed(stepped, "schedule.epochs", 153), "r.yaml").schedule.epochs == 153
    for epochs in (1, 152):
        assert problems(changed(stepped, "schedule.epochs", epochs)) == [
            f"r.yaml: schedule.epochs: found {epochs}, allowed: at least 153; a temperature that falls from "
            "1.0 by a factor of 0.9 per epoch makes the weights binary after 153"
        ]
    [line] = problems(changed(changed(stepped, "schedule.epochs", 153), "schedule.temperature.share", 0.5))
    assert line.startswith("r.yaml: schedule.temperature.share: not used beside schedule.temperature.decay")


@pytest.mark.parametrize(("start", "decay"), [(1.0, 0.1), (1.0, 0.5), (2.0, 0.97), (1e-7, 0.9)])
def test_the_number_of_epochs_named_is_the_smallest_that_is_enough(start: float, decay: float) -> None:
    raw = changed(changed(PRETRAIN, "schedule.temperature.start", start), "schedule.temperature.decay", decay)
    needed = next(n for n in range(1, 1000) if start * decay**n < 1e-7)
    assert parse_recipe(changed(raw, "schedule.epochs", needed), "r.yaml")
    if needed > 1:
        [line] = problems(changed(raw, "schedule.epochs", needed - 1))
        assert f"allowed: at least {needed};" in line
