"""Finds contradictions between keys of a recipe that are valid each by itself.

The defaults of the sections are an argument, because :mod:`qat.recipe.schema` imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from qat.recipe.wording import KeyPath, found

__all__ = ["contradictions"]

#: Below this temperature weights are exactly binary. It repeats the constant of :mod:`qat.ops.binary`,
#: because importing that would load torch.
_BINARY_TEMPERATURE: Final = 1e-7


def contradictions(
    raw: Mapping[Any, object], defaults: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and the message of each contradiction.

    Args:
        raw: content of a recipe. It need not be valid, so that contradictions are reported together with
            values that are wrong by themselves.
        defaults: default values of the sections ``data``, ``schedule`` and ``distillation``.
    """

    def section(value: object) -> Mapping[Any, Any]:
        return value if isinstance(value, Mapping) else {}

    model, data, schedule = (section(raw.get(name)) for name in ("model", "data", "schedule"))
    fixed, distillation = defaults["schedule"], section(raw.get("distillation"))
    if raw.get("task") == "finetune":
        if raw.get("quantization") is None:
            yield (
                ("quantization",),
                "missing; task 'finetune' needs it (write 'quantization: {}' for 8 bits everywhere)",
            )
        if model.get("checkpoint") is None:
            yield ("model", "checkpoint"), "missing; task 'finetune' starts from a trained network"
        if raw.get("parallel") == "fsdp":
            yield (
                ("parallel",),
                "found 'fsdp', allowed for task 'finetune': 'ddp' (quantized networks are trained whole)",
            )
        temperature = section(schedule.get("temperature"))
        usual = fixed["temperature"]
        for key in (key for key in usual if temperature.get(key, usual[key]) != usual[key]):
            yield (
                ("schedule", "temperature", key),
                "only task 'pretrain' anneals the temperature; remove it, or set task: pretrain",
            )
    if raw.get("task") == "pretrain":
        if raw.get("quantization") is not None:
            yield (
                ("quantization",),
                "task 'pretrain' trains in float; remove the section, or set task: finetune",
            )
        if type(epochs := schedule.get("epochs")) is int and epochs == 0:
            yield ("schedule", "epochs"), "found 0, allowed for task 'pretrain': an integer of at least 1"
        for key in (
            *("float_epochs", "calibration_batches"),
            *("freeze_observers", "freeze_batch_norm", "freeze_binary"),
        ):
            if schedule.get(key, fixed[key]) != fixed[key]:
                yield ("schedule", key), "only task 'finetune' uses it; remove it, or set task: finetune"
        yield from _never_binary(schedule, fixed)
        if distillation.get("teacher") == "self":
            yield (
                ("distillation", "teacher"),
                "found 'self', allowed for task 'pretrain': 'none' (no trained network to learn from; others "
                "are named with distillation.teachers)",
            )
        if not distillation.get("teachers") and distillation.get("teacher") is None:
            usual = defaults["distillation"]
            for key in ("weight", "temperature"):
                if distillation.get(key, usual[key]) != usual[key]:
                    yield (
                        ("distillation", key),
                        "not used without a teacher; name some with distillation.teachers, or remove it",
                    )
    yield from _teachers(distillation)
    yield from _of_another_data_set(data, defaults["data"])
    side, resize = data.get("image_size", defaults["data"]["image_size"]), data.get("resize")
    if type(side) is int and type(resize) is int and 0 < resize < side:
        yield ("data", "resize"), f"found {resize}, allowed: at least data.image_size, which is {side}"


def _teachers(distillation: Mapping[Any, Any]) -> Iterator[tuple[KeyPath, str]]:
    teachers, weights = distillation.get("teachers", []), distillation.get("teacher_weights")
    if teachers and (named := distillation.get("teacher")) is not None:
        yield (
            ("distillation", "teacher"),
            f"found {found(named)}, allowed beside distillation.teachers: null",
        )
    if isinstance(teachers, list) and isinstance(weights, list) and len(teachers) != len(weights):
        yield (
            ("distillation", "teacher_weights"),
            f"found {len(weights)} weights, allowed: one for each of distillation.teachers, which are "
            f"{len(teachers)}",
        )


def _never_binary(schedule: Mapping[Any, Any], fixed: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems with ``schedule.temperature.decay``, such as epochs too few for exactly binary weights."""
    temperature = schedule.get("temperature")
    chosen = {**fixed["temperature"], **(temperature if isinstance(temperature, Mapping) else {})}
    decay, start, epochs = chosen["decay"], chosen["start"], schedule.get("epochs", fixed["epochs"])
    if decay is None:
        return
    if chosen["share"] != fixed["temperature"]["share"]:
        yield (
            ("schedule", "temperature", "share"),
            "not used beside schedule.temperature.decay; remove one of both",
        )
    numbers = all(type(value) in (int, float) for value in (decay, start))
    if not numbers or not 0 < decay < 1 or start <= 0 or type(epochs) is not int or epochs < 1:
        return  # a value that is wrong by itself is reported elsewhere
    # The power is computed as in training, because its rounding can decide which epoch is the first binary
    # one.
    if start * decay**epochs >= _BINARY_TEMPERATURE:
        needed = math.ceil(math.log(_BINARY_TEMPERATURE / start) / math.log(decay))
        needed += start * decay**needed >= _BINARY_TEMPERATURE
        yield (
            ("schedule", "epochs"),
            f"found {epochs}, allowed: at least {needed}; a temperature that falls from {found(start)} by a "
            f"factor of {found(decay)} per epoch makes the weights binary after {needed}",
        )


#: Keys of `data` that only some data sets have.
_DATA_SETS: dict[str, tuple[str, ...]] = {
    "root": ("imagefolder", "parquet", "cifar10"),
    "name": ("hub",),
    "config": ("hub",),
    "revision": ("hub",),
    "image_column": ("parquet", "hub"),
    "label_column": ("parquet", "hub"),
    "streaming": ("parquet", "hub"),
    "validation_share": ("imagefolder", "parquet"),
    "final_split": ("imagefolder", "parquet", "cifar10", "hub"),
}


def _of_another_data_set(
    data: Mapping[Any, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Keys of ``data`` that the chosen data set doesn't have, and a missing ``name`` of the Hub's."""
    chosen = data.get("dataset", defaults["dataset"])
    if chosen == "hub" and data.get("name") is None:
        yield ("data", "name"), "missing; dataset 'hub' needs a repository, such as 'uoft-cs/cifar10'"
    for key, names in _DATA_SETS.items():
        if data.get(key, defaults[key]) != defaults[key] and chosen not in names:
            listed = ", ".join(map(repr, names[:-1])) + (" and " if len(names) > 1 else "") + repr(names[-1])
            hint = "; set data.dataset=imagefolder for a folder of images" if key == "root" else ""
            yield ("data", key), f"found {found(data[key])}, but only data.dataset {listed} has it{hint}"
    yield from _choices_of_images(data)


def _choices_of_images(data: Mapping[Any, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that say in two ways which images are used, or what streamed images can't do."""
    share, split, on_error = (data.get(key) for key in ("validation_share", "test_split", "on_error"))
    if share is not None and split is not None:
        yield (
            ("data", "validation_share"),
            f"found {found(share)}, allowed beside data.test_split, which is {found(split)}: null",
        )
    if data.get("streaming") is True:
        if share is not None:
            yield (
                ("data", "validation_share"),
                f"found {found(share)}, allowed where images are streamed: null",
            )
        if on_error == "skip":
            yield ("data", "on_error"), "found 'skip', allowed where images are streamed: 'stop'"
