"""Run directories: what a training command leaves behind, and how other commands find it.

A run directory holds ``recipe.yaml`` (with absolute paths, so that it can be run again from any folder),
``metrics.jsonl`` (one JSON object per epoch), ``best.safetensors`` and ``last.safetensors``. Fine-tuning adds
``quantization.json``, and a finished run has ``summary.json``. Until a run has finished, ``state/`` holds the
states from which :mod:`qat.train.resume` resumes it. Where the network was trained in
float first, ``float/`` holds the same of that stage.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import OutputError, QatError
from qat.recipe.loading import LoadedRecipe, recipe_yaml, resolve_checkpoint, resolve_teachers
from qat.recipe.schema import Recipe
from qat.system.collectives import from_main, is_main
from qat.system.files import write_atomically

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run. Where several processes train together, the first one alone writes to it.

    Attributes:
        path: the folder.
        part_of: the run that this one is a stage of, in a folder of its own; ``None`` for a whole run.
    """

    path: Path
    part_of: Path | None = None

    @property
    def whole(self) -> Path:
        """The folder that ``--resume`` takes."""
        return self.path if self.part_of is None else self.part_of

    @property
    def float_stage(self) -> RunDirectory:
        """The stage that trains in float before quantization; its folder need not be there."""
        return RunDirectory(self.path / "float", self.path)

    @classmethod
    def create(cls, loaded: LoadedRecipe, folder: Path | None = None) -> RunDirectory:
        """A new folder with the resolved recipe inside.

        Args:
            loaded: the recipe.
            folder: the folder to make; by default ``<output.dir>/<name>-<date>-<time>``, where the name is
                ``output.name`` or the recipe's.

        Raises:
            RecipeError: the checkpoint to start from, or a teacher, isn't there.
            OutputError: the folder can't be made or written, or it is there already and not empty.
        """
        return cls(Path(from_main(str(cls._create(loaded, folder)) if is_main() else "")))

    @staticmethod
    def _create(loaded: LoadedRecipe, folder: Path | None) -> Path:
        recipe = _with_absolute_paths(loaded)
        path = _new_folder(loaded) if folder is None else _made(folder)
        write_atomically(path / "recipe.yaml", recipe_yaml(recipe))
        return path

    @property
    def best(self) -> Path:
        """Checkpoint of the epoch with the best test accuracy."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """Checkpoint of the last epoch that was completed."""
        return self.path / "last.safetensors"

    def log(self, metrics: dict[str, Any]) -> None:
        """Append ``metrics`` to ``metrics.jsonl`` as one line.

        Raises:
            OutputError: the file can't be written.
        """
        if not is_main():
            return
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path / 'metrics.jsonl'}: {error.strerror or error}") from error

    def rewrite_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace ``metrics.jsonl`` by one line per row, atomically; without rows the file is removed."""
        if not is_main():
            return
        path = self.path / "metrics.jsonl"
        if rows:
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.unlink(missing_ok=True)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write ``content`` as JSON to the file ``name`` in the run directory, atomically."""
        if is_main():
            write_atomically(self.path / name, json.dumps(content, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``.

        Raises:
            QatError: the run has not finished, or the file is damaged.
        """
        path = self.path / SUMMARY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise QatError(f"{self.path}: not a finished run (it has no {SUMMARY})") from error
        except (OSError, ValueError, RecursionError) as error:
            raise QatError(f"{path}: cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise QatError(f"{path}: not a JSON object")
        return content


def _new_folder(loaded: LoadedRecipe) -> Path:
    root = Path(loaded.recipe.output.dir)
    stem = f"{loaded.recipe.output.name or loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        path = root / (stem if attempt == 0 else f"{stem}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.is_dir():
                continue
            raise OutputError(f"{root}: output.dir is not a folder") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot make the run directory: {error.strerror or error}") from error
        return path
    raise OutputError(f"{root / stem}: a hundred runs of this second exist already")


def _made(folder: Path) -> Path:
    """The folder, new or empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder}: exists already and is not empty; name another folder with --output")
    except FileExistsError as error:
        raise OutputError(f"{folder}: is a file; name another folder with --output") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the run directory: {error.strerror or error}") from error
    return folder


def find_run(path: Path) -> RunDirectory:
    """The run directory at ``path``.

    Raises:
        QatError: the folder doesn't exist, or has no best checkpoint.
    """
    run = RunDirectory(path)
    if not path.is_dir():
        raise QatError(f"{path}: no such run directory")
    if not run.best.is_file():
        raise QatError(f"{path}: not a run directory (it has no {run.best.name})")
    return run


def newest_run(root: Path) -> RunDirectory:
    """The fine-tuning run under ``root`` that finished last. Damaged and unfinished runs are ignored.

    Raises:
        QatError: no fine-tuning run under ``root`` has finished.
    """
    finished: list[tuple[float, str, RunDirectory]] = []
    for summary in root.glob(f"*/{SUMMARY}") if root.is_dir() else ():
        run = RunDirectory(summary.parent)
        try:
            content = find_run(run.path).summary()
        except QatError:
            continue  # a damaged run must not hide the others
        when = content.get("finished")
        if content.get("task") == "finetune" and isinstance(when, float) and math.isfinite(when):
            finished.append((when, summary.parent.name, run))
    if not finished:
        raise QatError(
            f"{root}: no finished finetune run here; run `qat finetune` first, or name one with --run DIR"
        )
    return max(finished, key=lambda item: item[:2])[2]


def _with_absolute_paths(loaded: LoadedRecipe) -> Recipe:
    """The recipe with absolute paths for all files that it reads, so that it can be run from any folder."""
    recipe = loaded.recipe
    if recipe.model.checkpoint is not None:
        model = recipe.model.model_copy(update={"checkpoint": str(resolve_checkpoint(loaded))})
        recipe = recipe.model_copy(update={"model": model})
    if recipe.distillation.teachers:
        named = recipe.distillation.model_copy(update={"teachers": resolve_teachers(loaded)})
        recipe = recipe.model_copy(update={"distillation": named})
    if recipe.data.root is not None:
        # Expanded as `qat.data.paths.found_root` expands it.
        root = Path(recipe.data.root).expanduser().absolute()
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(root)})})
    return recipe
