"""Small runs of the real commands: a toy binary checkpoint, and what tests do with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from qat.cli.group import main
from qat.recipe.loading import LoadedRecipe, load_recipe

#: Widths and image size of a network that trains in a second.
TOY = ("model.widths=[8,8,16]", "data.image_size=8", "threads=1", "device=cpu")


class Silent:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.epochs: list[dict[str, Any]] = []
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.started: tuple[int, int] | None = None
        self.stopped = 0

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        self.done = done
        self.started = epochs, steps

    def step(self, epoch: int, metrics: Any) -> None:
        self.steps.append((epoch, dict(metrics)))

    def epoch(self, metrics: Any) -> None:
        self.epochs.append(dict(metrics))

    def stop(self) -> None:
        self.stopped += 1


def recipe(name: str, out: Path, *overrides: str, checkpoint: Path | None = None) -> LoadedRecipe:
    """A packaged recipe, made small, writing below ``out``."""
    start = [f"model.checkpoint={json.dumps(str(checkpoint))}"] if checkpoint else []
    return load_recipe(name, [*TOY, f"output.dir={json.dumps(str(out))}", *start, *overrides])


def settings(overrides: Sequence[str]) -> list[str]:
    """``--set`` for each override."""
    return [word for override in overrides for word in ("--set", override)]


def finetune_arguments(out: Path, checkpoint: Path, *overrides: str) -> list[str]:
    """Arguments of a toy `qat finetune` that takes a second, before ``overrides``."""
    fixed = [
        *TOY,
        f"output.dir={json.dumps(str(out))}",
        f"model.checkpoint={json.dumps(str(checkpoint))}",
        "schedule.epochs=0",
        "schedule.calibration_batches=2",
    ]
    keys = {override.partition("=")[0] for override in overrides}
    return [
        "finetune",
        *settings([one for one in fixed if one.partition("=")[0] not in keys] + list(overrides)),
    ]


def tune(toys: Path, out: Path, *overrides: str) -> list[str]:
    """Arguments of a toy `qat finetune` that starts from the float checkpoint of the fixture ``toys``."""
    return finetune_arguments(out, toys / "float.safetensors", *overrides)


def tuned(toys: Path) -> Path:
    """The fine-tuned checkpoint of the fixture ``toys``."""
    (path,) = (toys / "runs").glob("*/best.safetensors")
    return path


def qat(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Run a command that must succeed; its standard output."""
    result = qat(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def fail(code: int, *arguments: object) -> str:
    """Run a command that must fail with ``code`` and without a traceback; its standard error."""
    result = qat(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    assert result.stderr.strip()
    assert "rror: " in result.stderr
    return result.stderr


def image_folder(
    root: Path, train: int = 14, test: int = 6, classes: Sequence[str] = ("dark", "light")
) -> Path:
    """``root/{train,validation}/CLASS/*.png``: noise around one brightness per class."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", test)):
        for index, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            level = 60 + 120 * index
            for number in range(count):
                size = (20 + number % 5, 24, 3)
                pixels = random.normal(level, 30, size).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


def pretrain_toy(out: Path, *overrides: str) -> Path:
    """A binary toy checkpoint, trained on the digits for a second."""
    from qat.train.pretraining import pretrain

    return pretrain(recipe("tiny_digits_pretrain", out, "schedule.epochs=1", *overrides), Silent()).best
