"""Recipe files: where they are found, how their YAML is read, and how ``--set`` changes it.

This module doesn't know which keys a recipe has; :mod:`qat.recipe.schema` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qat.errors import OutputError, RecipeError, nearest
from qat.recipe.wording import dotted
from qat.recipe.written_numbers import WrittenFloat, WrittenInt
from qat.system.files import write_atomically

# Numbers as people write them: decimal, an exponent with or without a dot. YAML 1.1 also has 010 for 8, 1:30
# for 90 and 0x10 for 16, which would be recorded as numbers that nobody meant; here they are texts.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_NUMBER_STARTS = list("-+.0123456789")

# Exceptions that PyYAML's constructors don't catch for scalars such as `!!int x` or `!!bool x`.
_SCALAR_FAILURES = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number and records keys that a mapping has twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Keys are compared before merge keys (`<<`) are expanded, since a key may override a merged one.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first_lines:
                first = first_lines[name]
                self.duplicates.append((line, f"key {key.value!r} appears twice (first on line {first})"))
            else:
                first_lines[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which `_Loader` would read as numbers, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(kind: type[WrittenInt] | type[WrittenFloat], construct: Any) -> Any:
    def made(loader: _Loader, node: yaml.ScalarNode) -> object:
        number = kind(construct(loader, node))
        number.text = node.value
        return number

    return made


_INT, _FLT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
# Dates are read as text: no key takes a date, but the name of a folder can look like one.
_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLT, _TIME)]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, _INTEGER, _NUMBER_STARTS)
_Loader.add_implicit_resolver(_FLT, _FLOAT, _NUMBER_STARTS)
_Loader.add_constructor(_INT, _written(WrittenInt, yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor(_FLT, _written(WrittenFloat, yaml.SafeLoader.construct_yaml_float))
_Dumper.add_implicit_resolver(_FLT, _FLOAT, _NUMBER_STARTS)


def read_yaml(text: str, source: str) -> object:
    """Parse ``text`` as one YAML document.

    Args:
        text: the document.
        source: what the text is called at the start of every line of an error.

    Raises:
        RecipeError: the syntax is broken (the message has line and column), or a mapping has keys twice (the
            message lists all of them).
    """
    try:
        loader = _Loader(text)
        value: object = loader.get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise RecipeError(f"{source}: line {line}, column {column}: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{source}: {where}not valid YAML: {what}") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: not valid YAML: nested too deeply") from error
    except _SCALAR_FAILURES as error:
        raise RecipeError(f"{source}: not valid YAML: a value does not fit its type: {error}") from error
    if loader.duplicates:
        lines = (f"{source}: line {line}: {what}" for line, what in sorted(loader.duplicates))
        raise RecipeError("\n".join(lines))
    return value


def write_yaml(value: object) -> str:
    """``value`` as YAML text, with keys in their order. `read_yaml` turns it into an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_recipe_file(path: Path) -> object:
    """The value of the YAML document in the file at ``path``.

    Raises:
        RecipeError: the file can't be read, is not UTF-8, or can't be parsed.
    """
    source = shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{source}: line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"
        ) from error
    return read_yaml(text, source)


def shown(path: Path) -> str:
    """``path`` as messages print it: relative to the working directory if it lies below that."""
    try:
        return str(path.resolve().relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return str(path)


def recipes_dir() -> Path:
    """Folder of the packaged recipes, which in a checkout is the folder ``recipes`` at its top level."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Sorted names of the packaged recipes."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe that a user named.

    Args:
        name_or_path: a path, or a packaged recipe as a name (``tiny_int8``) or ``recipes/NAME.yaml``. If a
            file of that path exists, it is taken rather than the packaged recipe.

    Raises:
        RecipeError: there is no such file. The message suggests the packaged recipe with the nearest name.
    """
    typed = Path(name_or_path)
    try:
        if typed.exists() and not typed.is_dir():
            return typed
        packaged = _packaged(typed)
        is_directory = bool(str(name_or_path)) and typed.is_dir()
    except (OSError, ValueError) as error:  # a name too long, a folder without permission, a null character
        raise RecipeError(f"{str(typed)!r}: cannot be read: {getattr(error, 'strerror', error)}") from error
    # The packaged recipe goes before the refusal of a directory, since an output folder may have its name.
    if packaged is not None:
        return packaged
    if is_directory:
        raise RecipeError(f"{typed}: is a directory; a recipe is a YAML file")
    known = recipe_names()
    raise RecipeError(
        f"{str(name_or_path)!r}: no such recipe file{nearest(typed.stem, known)}; "
        f"recipes known by name: {', '.join(known) or 'none'} (see `qat recipe list`)"
    )


def _packaged(typed: Path) -> Path | None:
    # The documentation shows `recipes/NAME.yaml`, which must work outside of a checkout, too. A path in any
    # other folder never means a packaged recipe: an error is better than loading another file than the one
    # typed.
    if typed.parts not in ((typed.name,), ("recipes", typed.name)) or not typed.name:
        return None
    name = typed.name if typed.suffix == ".yaml" else f"{typed.name}.yaml"
    path = recipes_dir() / name
    return path if path.is_file() else None


def copy_recipe(name: str, destination: str | Path, force: bool = False) -> Path:
    """Copy a recipe, comments included, to a file or into a folder.

    Args:
        name: see :func:`find_recipe`.
        destination: path of the new file, or a folder that exists.
        force: whether to overwrite a file that exists.

    Returns:
        The file that was written.

    Raises:
        RecipeError: there is no such recipe.
        OutputError: the file exists already, and ``force`` is false, or it can't be written.
    """
    source = find_recipe(name)
    target = Path(destination)
    try:
        if target.is_dir():
            target = target / source.name
        content = source.read_bytes()
        if force:
            write_atomically(target, content)
        else:
            # Mode "x" refuses an existing file in the same step that creates it.
            with target.open("xb") as file:
                file.write(content)
    except FileExistsError as error:
        raise OutputError(f"{target}: exists already; overwrite it with --force") from error
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


@dataclass(frozen=True)
class Override:
    """One ``--set section.key=value``.

    Attributes:
        path: the keys that lead to the value.
        value: the value, read as YAML.
        source: the option as it was typed, for messages.
        touched: path of the outermost section or value that applying the override created or changed. It is
            shorter than ``path`` where a section had to be created. A problem with that section is then
            reported for the override, not for the recipe file.
    """

    path: tuple[str, ...]
    value: object
    source: str
    touched: tuple[str, ...] = ()


def parse_override(text: str) -> Override:
    """Parse one ``section.key=value``.

    Raises:
        RecipeError: the ``=``, a key or the value is missing, or the value is not valid YAML.
    """
    source = f"--set {text}"
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals:
        raise RecipeError(f"{source}: has no '='; write section.key=value")
    if not all(path):
        raise RecipeError(f"{source}: has an empty key; write section.key=value")
    if not value.strip():
        raise RecipeError(f"{source}: has no value; write {key.strip()}=null for none")
    return Override(path, read_yaml(value, source), source)


def apply_override(
    mapping: Mapping[Any, object], override: Override, depth: int = 0
) -> tuple[dict[Any, object], Override]:
    """Set the override's value in a copy of ``mapping``.

    Missing sections are created. The mappings along the path are copied, so that other sections which share a
    YAML anchor with them don't change.

    Args:
        mapping: the recipe, or with ``depth`` the section at the first ``depth`` keys of the path.
        override: the override to apply.
        depth: number of keys of the path that were followed already.

    Returns:
        The copy, and the override with ``touched`` filled in.

    Raises:
        RecipeError: the path leads through a value that is not a section.
    """
    key, changed = override.path[depth], dict(mapping)
    here = override.path[: depth + 1]
    if here == override.path:
        changed[key] = override.value
        return changed, replace(override, touched=here)
    section = changed.get(key)
    created = section is None
    if section is None:  # absent, or an empty `section:` in the file
        section = {}
    if not isinstance(section, Mapping):
        raise RecipeError(
            f"{override.source}: {dotted(here)} holds a value, not a section: it has no keys to set"
        )
    changed[key], override = apply_override(section, override, depth + 1)
    return changed, replace(override, touched=here) if created else override


def apply_overrides(
    mapping: Mapping[Any, object], texts: Sequence[str]
) -> tuple[dict[Any, object], list[Override], list[str]]:
    """Apply the texts of ``--set`` options in their order.

    Returns:
        The changed copy of ``mapping``, the overrides that were applied, and a message for each other text.
    """
    changed = dict(mapping)
    applied: list[Override] = []
    problems: list[str] = []
    for text in texts:
        try:
            changed, override = apply_override(changed, parse_override(text))
        except RecipeError as error:
            problems.append(str(error))
        else:
            applied.append(override)
    return changed, applied, problems
