"""What is wrong with a recipe, in lines a reader can act on.

Explains pydantic's errors in the words of a recipe file, and finds the contradictions between its keys.
The recipe's JSON schema and defaults come as arguments, because `qat.recipe.schema` imports this module.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qat.errors import nearest
from qat.recipe.files import KeyPath, Override, dotted

__all__ = ["contradictions", "found", "not_a_mapping", "problem_lines"]

#: That of :mod:`qat.ops.binary`, which imports torch.
_BINARY_TEMPERATURE: Final = 1e-7

Schema = dict[str, Any]  # a JSON schema, or one node of it

# Keys that exist in a neighbouring group: "did you mean" would not say why they are absent here.
_STEM_READS_PIXELS = (
    "only the stem's weights are quantized: its input is fixed 8-bit pixels, "
    "and its output belongs to quantization.trunk"
)
_ABSENT_ON_PURPOSE: dict[KeyPath, str] = {
    ("quantization", "trunk", "weight_bits"): "the trunk has no weights of its own beyond the 1 bit of the "
    "binary convolutions",
    **{
        ("quantization", "stem", key): _STEM_READS_PIXELS
        for key in ("activation_bits", "observer", "averaging_constant", "percentile", "clip")
    },
}


def problem_lines(
    error: ValidationError,
    raw: Mapping[Any, object],
    source: str,
    overrides: Sequence[Override],
    *,
    schema: Schema,
    defaults: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """One line per problem of ``raw``; it opens with the override it comes from, else with ``source``.

    ``schema`` is the JSON schema of a recipe; ``defaults`` are those `contradictions` takes.
    """
    details = error.errors(include_url=False)
    problems: list[tuple[KeyPath, str]] = []
    for detail in details:
        if detail["type"] == "contradiction":
            problems += detail["ctx"]["problems"]
        else:
            problems.append(_explain(detail, schema))
    # pydantic compares keys only once each is valid by itself; a reader wants to hear of both at once.
    if not any(detail["type"] == "contradiction" for detail in details):
        reported = {path for path, _ in problems}
        problems += [(path, why) for path, why in contradictions(raw, defaults) if path not in reported]

    def origin(path: KeyPath) -> str:
        setting = (item.source for item in reversed(overrides) if path[: len(item.touched)] == item.touched)
        return next(setting, source)

    lines = [f"{origin(path)}: {dotted(path)}: {why}" for path, why in problems]
    return list(dict.fromkeys(lines))


def contradictions(
    raw: Mapping[Any, object], defaults: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[KeyPath, str]]:
    """Key path and message of each problem between keys of ``raw``.

    Works on the plain mapping, so that these show beside problems within keys. ``defaults`` holds those of
    the sections ``data``, ``schedule`` and ``distillation``.
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
    """What keeps a temperature that falls by a factor per epoch from making the weights exactly binary."""
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
        return  # found by itself
    # The steps are multiplied out as in training, where rounding decides about the last one.
    if start * decay**epochs >= _BINARY_TEMPERATURE:
        needed = math.ceil(math.log(_BINARY_TEMPERATURE / start) / math.log(decay))
        needed += start * decay**needed >= _BINARY_TEMPERATURE
        yield (
            ("schedule", "epochs"),
            f"found {epochs}, allowed: at least {needed}; a temperature that falls from {found(start)} by a "
            f"factor of {found(decay)} per epoch makes the weights binary after {needed}",
        )


#: Keys of `data` that some data sets alone have.
_DATA_SETS: dict[str, tuple[str, ...]] = {
    "root": ("imagefolder", "parquet", "cifar10"),
    "name": ("hub",),
    "config": ("hub",),
    "revision": ("hub",),
    "image_column": ("parquet", "hub"),
    "label_column": ("parquet", "hub"),
    "streaming": ("parquet", "hub"),
}


def _of_another_data_set(
    data: Mapping[Any, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Keys of ``data`` that its data set doesn't have, and the one that the Hub needs."""
    chosen = data.get("dataset", defaults["dataset"])
    if chosen == "hub" and data.get("name") is None:
        yield ("data", "name"), "missing; dataset 'hub' needs a repository, such as 'uoft-cs/cifar10'"
    for key, names in _DATA_SETS.items():
        if data.get(key, defaults[key]) != defaults[key] and chosen not in names:
            listed = " and ".join(map(repr, names))
            hint = "; set data.dataset=imagefolder for a folder of images" if key == "root" else ""
            yield ("data", key), f"found {found(data[key])}, but only data.dataset {listed} has it{hint}"


def _explain(detail: ErrorDetails, schema: Schema) -> tuple[KeyPath, str]:
    """Key path and message of one pydantic error."""
    path, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "missing" and isinstance(path[-1], int):
        path, kind = path[:-1], "too_short"  # a list with too few entries: speak of the list
    if kind in ("extra_forbidden", "invalid_key"):
        path = (*path[:-1], str(path[-1]))  # a bare number is a key here, not a position in a list
        if why := _ABSENT_ON_PURPOSE.get(path):
            return path, f"not a key of this group: {why}"
        keys = list(_plain(_schema_at(path[:-1], schema), schema).get("properties", {}))
        return path, "unknown key" + (nearest(str(path[-1]), keys) or f"; allowed: {', '.join(keys)}")
    if kind == "refused":
        return path, detail["msg"]
    node = _schema_at(path, schema)
    allowed = _allowed(node, schema)
    if kind == "missing":
        return path, f"missing; allowed: {allowed}"
    if kind == "finite_number":
        allowed = allowed.replace("a number", "a finite number")
    hint = (
        nearest(value, [str(choice) for choice in _plain(node, schema).get("enum", [])])
        if isinstance(value, str)
        else ""
    )
    return path, f"found {found(value)}, allowed: {allowed}{hint}"


def _plain(node: Schema, schema: Schema) -> Schema:
    """``node`` without the `null` alternative and with its reference followed."""
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            node = option
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _schema_at(path: KeyPath, schema: Schema) -> Schema:
    """The JSON schema of the value at ``path``; empty for a key that is not in the schema."""
    node = schema
    for key in path:
        node = _plain(node, schema)
        if isinstance(key, int):
            entries = node.get("prefixItems", [])
            node = entries[key] if key < len(entries) else node.get("items", {})
        else:
            node = node.get("properties", {}).get(key, {})
    return node


def _allowed(node: Schema, schema: Schema) -> str:
    """What a JSON schema node allows, in words: "an integer from 2 to 8, or null"."""
    plain = _plain(node, schema)
    null = ", or null" if any(option.get("type") == "null" for option in node.get("anyOf", [])) else ""
    match plain.get("type"):
        case _ if "enum" in plain or "const" in plain:
            choices = plain.get("enum", [plain.get("const")])
            text = ", ".join(found(choice) for choice in choices)
        case "integer":
            text = f"an integer{_range(plain)}"
        case "number":
            text = f"a number{_range(plain)}"
        case "boolean":
            text = "true or false"
        case "string":
            text = "a text" + (" that is not empty" if plain.get("minLength") else "")
        case "array":
            entries = plain.get("prefixItems", [])
            count = f" of {len(entries)}" if entries else ""
            if not entries and "minItems" in plain:
                count = f" of at least {plain['minItems']}"
            text = f"a list{count}, each {_allowed(entries[0] if entries else plain['items'], schema)}"
        case _:
            text = f"a section with keys {', '.join(plain.get('properties', {}))}"
    return text + null


def _range(node: Schema) -> str:
    bounds = [
        f"{sign} {node[key]}"
        for sign, key in (
            (">=", "minimum"),
            (">", "exclusiveMinimum"),
            ("<=", "maximum"),
            ("<", "exclusiveMaximum"),
        )
        if key in node
    ]
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {node['maximum']}"
    return f" {' and '.join(bounds)}" if bounds else ""


def found(value: object) -> str:
    """A value as a reader of YAML knows it; long ones are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)


def not_a_mapping(value: object, source: str, schema: Schema) -> str:
    """Message for a recipe that is a list, a number, a text or nothing."""
    what = "nothing" if value is None else found(value)
    return f"{source}: found {what} at the top level, allowed: {_allowed(schema, schema)}"
