"""The files of a run directory that a report reads.

If one is missing or damaged, the report lacks only the part that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qat.errors import QatError, first_line
from qat.runs import RunDirectory

#: File with the output of `qat bench --json`, if the user put it there.
BENCH: Final = "bench.json"
MODEL: Final = "model.onnx"


@dataclass(frozen=True)
class RunFiles:
    """The parsed text files of a run directory.

    Attributes:
        run: the directory.
        summary: content of ``summary.json``; empty if the run has not finished.
        metrics: content of ``metrics.jsonl``, one object per epoch.
        bench: content of :data:`BENCH`; ``None`` if there is no such file.
        recipe: text of ``recipe.yaml``.
        problems: sentences on what is missing or damaged.
    """

    run: RunDirectory
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    bench: Mapping[str, Any] | None
    recipe: str
    problems: Sequence[str]

    @property
    def model(self) -> Path:
        """Path to which `qat export --onnx` writes the model."""
        return self.run.path / MODEL

    @property
    def data(self) -> Mapping[str, Any]:
        """What the summary says about the data: the fingerprint of each split."""
        return mapping(self.summary.get("data"))

    @property
    def test_fingerprint(self) -> str | None:
        """Fingerprint of the test images that the run was evaluated on."""
        found = self.data.get("test")
        return found if isinstance(found, str) else None

    @property
    def pretrained_sha256(self) -> str | None:
        """SHA-256 of the checkpoint that training started from."""
        found = self.summary.get("pretrained_sha256")
        return found if isinstance(found, str) else None


def read_run(run: RunDirectory) -> RunFiles:
    """Read the text files of ``run``.

    Raises:
        QatError: ``recipe.yaml`` cannot be read.
    """
    problems = []
    try:
        summary = run.summary()
    except QatError as error:
        summary = {}
        problems.append(f"{error}. This is its best checkpoint so far.")
    metrics, damaged = _lines(run.path / "metrics.jsonl")
    if damaged:
        lines = "1 line" if damaged == 1 else f"{damaged} lines"
        problems.append(
            f"{lines} of metrics.jsonl cannot be read and {'is' if damaged == 1 else 'are'} left out."
        )
    bench = None
    if (run.path / BENCH).exists():
        try:
            bench = mapping(json.loads((run.path / BENCH).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{BENCH} cannot be read: {first_line(error)}.")
    path = run.path / "recipe.yaml"
    try:
        recipe = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise QatError(f"{path}: cannot be read: {error}") from error
    return RunFiles(run, summary, metrics, bench, recipe, problems)


def mapping(value: object) -> Mapping[str, Any]:
    """``value`` if it is a JSON object, else an empty object."""
    return value if isinstance(value, Mapping) else {}


def _lines(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The objects of a JSON Lines file, and the number of lines that are not JSON objects.

    The last line may be cut off, if the run was killed while it wrote.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # there is no file if no epoch was trained
        return [], 0
    rows: list[Mapping[str, Any]] = []
    damaged = 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, Mapping):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged
