"""What `qat evaluate` does: the accuracy of a run, a checkpoint or an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qat.commands.opening import open_model
from qat.commands.sources import load_test_split
from qat.evaluation import Accuracy, evaluate
from qat.system.collectives import world


def evaluate_model(
    path: Path, recipe: str | None, overrides: Sequence[str], warn: Callable[[str], None]
) -> Accuracy:
    """Accuracy of the model ``path`` on its test split.

    Where several processes were launched, each evaluates a share of the images, and all return the accuracy
    on all of them. The arguments are those of :func:`qat.commands.opening.open_model`.

    Raises:
        QatError: the model, its data or the recipe cannot be read, or don't fit each other.
    """
    model = open_model(path, recipe, overrides, warn)
    split = load_test_split(model.data, model.num_classes, warn)
    split.share = world().share
    return evaluate(model.predict, split, model.data)
