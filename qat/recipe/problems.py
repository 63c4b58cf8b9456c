"""Says what is wrong with a recipe, one line per problem, in the words of a recipe file.

It explains pydantic's errors, and adds the contradictions between keys (:mod:`qat.recipe.contradictions`).
The recipe's JSON schema and defaults are arguments, so that this module doesn't import
:mod:`qat.recipe.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qat.errors import nearest
from qat.recipe.contradictions import contradictions
from qat.recipe.files import Override
from qat.recipe.wording import KeyPath, dotted, found

__all__ = ["not_a_mapping", "problem_lines"]

Schema = dict[str, Any]  # a JSON schema, or one node of it

# Keys that a neighbouring group has. For these the message says why this group doesn't have them, in place of
# a "did you mean".
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
    """A line for each problem, which begins with the override that caused it, else with ``source``.

    Args:
        error: pydantic's errors about ``raw``.
        raw: content of the recipe, after overrides.
        source: name of the recipe for messages.
        overrides: the overrides that were applied.
        schema: JSON schema of a recipe.
        defaults: see :func:`qat.recipe.contradictions.contradictions`.
    """
    details = error.errors(include_url=False)
    problems: list[tuple[KeyPath, str]] = []
    for detail in details:
        if detail["type"] == "contradiction":
            problems += detail["ctx"]["problems"]
        else:
            problems.append(_explain(detail, schema))
    # pydantic compares keys with each other only if each is valid by itself. Readers want all problems at
    # once, so the comparison is done here in the other case.
    if not any(detail["type"] == "contradiction" for detail in details):
        reported = {path for path, _ in problems}
        problems += [(path, why) for path, why in contradictions(raw, defaults) if path not in reported]

    def origin(path: KeyPath) -> str:
        setting = (item.source for item in reversed(overrides) if path[: len(item.touched)] == item.touched)
        return next(setting, source)

    lines = [f"{origin(path)}: {dotted(path)}: {why}" for path, why in problems]
    return list(dict.fromkeys(lines))


def _explain(detail: ErrorDetails, schema: Schema) -> tuple[KeyPath, str]:
    """Key path and message of one pydantic error."""
    path, kind, value = detail["loc"], detail["type"], detail["input"]
    if kind == "missing" and isinstance(path[-1], int):
        path, kind = path[:-1], "too_short"  # a list with too few entries; the message is about the list
    if kind in ("extra_forbidden", "invalid_key"):
        path = (*path[:-1], str(path[-1]))  # a number is a key here, not a position in a list
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
    """The schema that ``node`` refers to, without the alternative `null`."""
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            node = option
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _schema_at(path: KeyPath, schema: Schema) -> Schema:
    """The JSON schema of the value at ``path``. It is empty for a key that the schema doesn't have."""
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
    """What a node of a JSON schema allows, in words, such as "an integer from 2 to 8, or null"."""
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


def not_a_mapping(value: object, source: str, schema: Schema) -> str:
    """The message for a recipe that is a list, a number, a text or empty."""
    what = "nothing" if value is None else found(value)
    return f"{source}: found {what} at the top level, allowed: {_allowed(schema, schema)}"
