"""Opening any model whose accuracy can be measured: a run, a checkpoint or an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qat_export.verify.model import OnnxModel

from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.checkpoints.loading import architecture_of, build, class_names, highest_temperature
from qat.commands.sources import only_data, own_recipe, recipe_of_onnx
from qat.errors import DataError, QatError
from qat.evaluation import Predict, predictor
from qat.models.bnext import is_binary
from qat.recipe.loading import LoadedRecipe, load_recipe
from qat.recipe.schema import Data, Model, Recipe
from qat.runs import find_run


@dataclass(frozen=True)
class Opened:
    """A model, ready to predict.

    Attributes:
        predict: function from images (N, 3, S, S) to logits (N, classes).
        data: the images to measure it on, and how they are preprocessed.
        num_classes: number of logits per image.
        recipe: recipe of the run it came from, as stored in the file; ``None`` if it has none.
        format: format of the file, such as ``bnext-qat`` or ``bnext-qat portable 1``.
        architecture: description of the network, one line of text.
        file: the file that was read; of a run directory, its best checkpoint.
        class_names: in the order of the logits; empty where they aren't known.
    """

    predict: Predict
    data: Data
    num_classes: int
    recipe: Recipe | None
    format: str
    architecture: str
    file: Path
    class_names: tuple[str, ...] = ()

    def name_of(self, label: int) -> str:
        """Name of the class with this number; the number where names aren't known."""
        return self.class_names[label] if self.class_names else str(label)


def open_model(
    path: Path, recipe: str | None, overrides: Sequence[str], warn: Callable[[str], None]
) -> Opened:
    """Open a run directory's best checkpoint, a checkpoint file or an exported model.

    Args:
        path: the model.
        recipe: take the data section of this recipe rather than of the model's own. For published weights it
            tells the stem's stride, too, and which of several to take.
        overrides: ``data.key=value`` texts that change the recipe.
        warn: told what makes the accuracy another than the one asked for.

    Raises:
        QatError: the model or the recipe cannot be read, or don't fit each other.
    """
    only_data(overrides, {})
    chosen = load_recipe(recipe, overrides) if recipe is not None else None
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        return _open_onnx(OnnxModel(path), chosen, overrides)
    file = find_run(path).best if path.is_dir() else path
    model = chosen.recipe.model if chosen else Model()
    checkpoint = load_checkpoint(file, stem_stride=model.stem_stride, state_key=model.state_key)
    for note in checkpoint.notes:
        warn(f"{file}: {note}")
    if chosen is not None:
        _check_model(checkpoint, chosen, warn)
    data = (chosen.recipe if chosen else own_recipe(checkpoint, overrides)).data
    _check_data(checkpoint, data, warn)
    network = build(checkpoint)
    if not is_binary(network):
        warn(
            f"{checkpoint.source}: the weights in use are not binary: the temperature is "
            f"{highest_temperature(network):.3g}, binary means below 1e-7"
        )
    return Opened(
        predictor(network),
        data,
        network.architecture.num_classes,
        checkpoint.recipe,
        checkpoint.format,
        str(checkpoint.architecture),
        file,
        class_names(checkpoint),
    )


def _open_onnx(model: OnnxModel, chosen: LoadedRecipe | None, overrides: Sequence[str]) -> Opened:
    data = (chosen.recipe if chosen else recipe_of_onnx(model, overrides, "give --recipe")).data
    model.check_data(data)
    try:
        recipe = recipe_of_onnx(model, (), "")
    except QatError:  # --recipe was given, so the model's own recipe is not needed
        recipe = None
    return Opened(
        model,
        data,
        model.num_classes,
        recipe,
        model.metadata["format"],
        model.metadata.get("architecture", "unknown"),
        model.path,
        model.class_names,
    )


def _check_model(checkpoint: Checkpoint, loaded: LoadedRecipe, warn: Callable[[str], None]) -> None:
    """Warn if a recipe that was chosen for its data describes another network than the checkpoint's."""
    held = checkpoint.architecture
    asked = architecture_of(loaded.recipe.model, held.num_classes, held.stem_stride)
    if asked != checkpoint.architecture:
        warn(
            f"{loaded.path}: model: describes {asked}; evaluated is what {checkpoint.source} holds, "
            f"{checkpoint.architecture}"
        )


def _check_data(checkpoint: Checkpoint, data: Data, warn: Callable[[str], None]) -> None:
    """Compare the preprocessing in ``data`` with that of training, and warn of differences.

    Raises:
        DataError: a quantized network was trained with another normalization. The grid of its input was
            chosen for that one, so its answers would mean nothing.
    """
    if checkpoint.recipe is None:
        return
    trained = checkpoint.recipe.data
    for key, ours, theirs in (("mean", data.mean, trained.mean), ("std", data.std, trained.std)):
        if not np.allclose(ours, theirs, atol=1e-6):
            if checkpoint.quantization is not None:
                raise DataError(
                    f"data.{key} is {list(ours)}, {checkpoint.source} was made for {list(theirs)}"
                )
            warn(f"data.{key} is {list(ours)}, {checkpoint.source} was trained with {list(theirs)}")
    for key in ("image_size", "exif_orientation"):
        if (given := getattr(data, key)) != (theirs := getattr(trained, key)):
            warn(f"data.{key} is {given}, {checkpoint.source} was trained with {theirs}")
