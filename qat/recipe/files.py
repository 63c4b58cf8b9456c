"""Recipe files: where they are, how their YAML is read, and how ``--set`` changes it.

Nothing here knows which keys a recipe has; that is `qat.recipe.loading`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qat.errors import OutputError, RecipeError, nearest
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

# What PyYAML's constructors let through for scalars such as `!!int x` or `!!bool x`.
_SCALAR_FAILURES = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number and notes keys written twice in one mapping."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before merge keys (`<<`) are expanded: a key may override a merged one.
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
    """SafeDumper that quotes the texts `_Loader` would read as numbers, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(kind: type[WrittenInt] | type[WrittenFloat], construct: Any) -> Any:
    def made(loader: _Loader, node: yaml.ScalarNode) -> object:
        number = kind(construct(loader, node))
        number.text = node.value
        return number

    return made


_INT, _FLT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
# No recipe holds a date, and a folder may be named like one.
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
    """Parse ``text`` as one YAML document; ``source`` opens every line of the error.

    Raises `RecipeError` for broken syntax (with line and column) and for keys written twice (all of them).
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
    """``value`` as YAML text that `read_yaml` reads back to the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_recipe_file(path: Path) -> object:
    """The YAML value in ``path``. Raises `RecipeError` when it cannot be read as UTF-8 or parsed."""
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
    """``path`` as messages print it: relative to the working directory where it lies under it."""
    try:
        return str(path.resolve().relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return str(path)


def recipes_dir() -> Path:
    """Folder of the recipes that come with the package (a checkout keeps them at its top level)."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The recipe file meant by a path, a packaged name (``tiny_int8``) or ``recipes/NAME.yaml``.

    A file that exists wins. `RecipeError` names the nearest packaged recipe when nothing is found.
    """
    typed = Path(name_or_path)
    try:
        if typed.exists() and not typed.is_dir():
            return typed
        packaged = _packaged(typed)
        is_directory = bool(str(name_or_path)) and typed.is_dir()
    except (OSError, ValueError) as error:  # a name too long, a folder without permission, a null character
        raise RecipeError(f"{str(typed)!r}: cannot be read: {getattr(error, 'strerror', error)}") from error
    # Looked at before refusing a directory: an output folder may well be called like its recipe.
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
    # `recipes/NAME.yaml` is what the documentation shows; it must work outside a checkout too. Any other
    # folder is taken literally: loading a different file than the one typed would be worse than an error.
    if typed.parts not in ((typed.name,), ("recipes", typed.name)) or not typed.name:
        return None
    name = typed.name if typed.suffix == ".yaml" else f"{typed.name}.yaml"
    path = recipes_dir() / name
    return path if path.is_file() else None


def copy_recipe(name: str, destination: str | Path, force: bool = False) -> Path:
    """Copy a recipe, comments included, to a file or into a folder; returns the file written.

    Raises `RecipeError` for an unknown name, `OutputError` when the file exists (unless ``force``) or cannot
    be written.
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


KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """A key path as messages print it: ``("data", "mean", 1)`` is ``data.mean[1]``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Override:
    """One ``a.b=c``: the keys to follow, the value read as YAML, and the text for messages.

    ``touched`` is the shortest path that this override put there: shorter than ``path`` where it created a
    section, so that a section that should not exist is blamed on the override.
    """

    path: tuple[str, ...]
    value: object
    source: str
    touched: tuple[str, ...] = ()


def parse_override(text: str) -> Override:
    """Read one ``section.key=value``. Raises `RecipeError` for a missing ``=``, key or value."""
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
    """A copy of ``mapping`` with the override's value in place, and the override with ``touched`` filled in.

    Missing sections are created. Only the mappings along the path are copied, so sections that share a YAML
    anchor stay independent. Raises `RecipeError` when the path leads through a value that is not a section.
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
    """Apply ``--set`` texts in order; returns the new mapping, those applied, and the problems met."""
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
