"""Baselines as files: one JSON object with a key per line, to be kept in a repository.

The file repeats figures that follow from the bits in ``correct``, such as ``top1``. They are compared when a
file is read, so that damage and edits by hand are found.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pydantic

from qat import __version__
from qat.errors import BaselineError, first_line, nearest
from qat.gate.baseline import FORMAT, FORMAT_VERSION, Baseline, percentage, unpack
from qat.system.files import write_atomically


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write ``baseline`` to ``path`` atomically, over an older baseline.

    Two baselines that differ in ``recorded`` alone give files that differ in that line alone.

    Raises:
        BaselineError: ``path`` exists and is not a baseline.
        OutputError: it cannot be written.
    """
    check_replaceable(path)
    write_atomically(path, json.dumps(baseline.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def check_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that is not a baseline (of any version).

    Raises:
        BaselineError: ``path`` exists and is not a baseline.
    """
    if not path.exists():
        return
    try:
        _read(path)
    except BaselineError as error:
        raise BaselineError(f"{error}; it is not overwritten: delete it, or name another file") from error


def read_baseline(path: Path) -> Baseline:
    """Read a baseline, and check that its figures agree with its bits.

    Raises:
        BaselineError: the file is absent, of another kind or version, damaged or edited; the message is one
            line that names the key.
    """
    content = _read(path)
    version = content["format"].removeprefix(f"{FORMAT} ")
    if version != str(FORMAT_VERSION):
        raise BaselineError(
            f"{path}: format: found {content['format']!r}; this bnext-qat {__version__} reads "
            f"{f'{FORMAT} {FORMAT_VERSION}'!r}: record it again"
        )
    try:
        baseline = Baseline.model_validate(content)
    except pydantic.ValidationError as error:
        raise BaselineError(f"{path}: {_first_problem(error)}") from error
    if problem := _contradiction(baseline):
        raise BaselineError(f"{path}: {problem}")
    return baseline


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, whose ``format`` says that it is a baseline of some version."""
    if not path.exists():
        raise BaselineError(f"{path}: no such file; `qat gate record MODEL -o {path}` writes it")
    if not path.is_file():
        raise BaselineError(f"{path}: not a file")
    try:
        content = json.loads(_text(path.read_bytes()), object_pairs_hook=_object, parse_constant=_constant)
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"{path}: not a baseline, or a damaged one: {first_line(error)}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or not found.startswith(f"{FORMAT} "):
        raise BaselineError(f"{path}: not a baseline: its 'format' is not {FORMAT!r} and a version")
    return dict(content)


def _text(content: bytes) -> str:
    """UTF-8, or what a byte order mark says: editors and shells on Windows write one."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:  # after an edit or a merge, nobody knows which of the two is meant
            raise ValueError(f"{key}: is there twice")
        content[key] = value
    return content


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    # For a union, pydantic's location also names the member type that it tried: leave that out.
    where = ".".join(str(part) for part in first["loc"] if part not in ("list[str]", "constrained-str"))
    if first["type"] == "missing":
        return f"{where}: is missing"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where, Baseline.model_fields)}"
    text = repr(first["input"])
    return f"{where}: found {text if len(text) <= 40 else text[:40] + '…'}: {first['msg']}"


def _contradiction(baseline: Baseline) -> str | None:
    """A sentence on the first key that does not agree with the others; None if all agree."""
    n = baseline.images
    try:
        correct = int(unpack(baseline.correct, n).sum())
    except ValueError as error:
        return f"correct: {error}"
    exact = percentage(correct, n)
    if baseline.top1 != exact:
        return f"top1: found {baseline.top1}, but {correct} of {n} bits of 'correct' are set, {exact}"
    if baseline.top5 < baseline.top1 or baseline.top5 != percentage(round(baseline.top5 * n / 100), n):
        return f"top5: found {baseline.top5}: not a share of {n} images from top1, {baseline.top1}, to 100"
    names = baseline.class_names
    if isinstance(names, list) and len(names) != baseline.num_classes:
        return f"class_names: found {len(names)} names, num_classes is {baseline.num_classes}"
    return None
