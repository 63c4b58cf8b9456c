"""Find the recipe of a model, and the test images that the recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from qat_export.verify.model import OnnxModel

from qat.checkpoints.format import Checkpoint
from qat.data.loading import check_fits, load_split
from qat.data.split import NoiseSplit, Split
from qat.errors import CheckpointError, RecipeError
from qat.recipe.loading import parse_recipe
from qat.recipe.schema import Data, Recipe


def only_data(overrides: Sequence[str], refused: Mapping[str, str]) -> None:
    """Refuse overrides of sections other than ``data``, which have no effect, and of some keys of ``data``.

    Args:
        overrides: texts such as ``data.root=DIR``.
        refused: keys of ``data`` that must not be set, each with the reason, which the message gives.

    Raises:
        RecipeError: the first override that is refused.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        section, _, name = key.partition(".")
        if section != "data":
            raise RecipeError(f"--set {override}: {key}: no effect here; only keys of `data` may be set")
        if "=" in override and not name:
            raise RecipeError(f"--set {override}: {key}: set its keys one by one, as data.KEY=VALUE")
        if reason := refused.get(name.partition(".")[0]):
            raise RecipeError(f"--set {override}: {key}: {reason}")


def own_recipe(checkpoint: Checkpoint, overrides: Sequence[str]) -> Recipe:
    """The recipe a checkpoint carries, with ``overrides`` applied.

    Raises:
        RecipeError: it carries none, or an override is wrong.
    """
    if checkpoint.recipe is None:
        raise RecipeError(
            f"{checkpoint.source}: carries no recipe, so its data is unknown: give one with --recipe"
        )
    return parse_recipe(checkpoint.recipe.model_dump(mode="json"), checkpoint.source, overrides)


def recipe_of_onnx(model: OnnxModel, overrides: Sequence[str], otherwise: str) -> Recipe:
    """The recipe an exported model carries, with ``overrides`` applied.

    Args:
        model: the model.
        overrides: texts such as ``data.root=DIR``.
        otherwise: what the message advises if the model carries no recipe.

    Raises:
        CheckpointError: it carries no recipe, or one that can't be read.
        RecipeError: an override is wrong.
    """
    try:
        mapping = json.loads(model.metadata["recipe"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{model.path}: metadata 'recipe' is missing or damaged: {otherwise}"
        ) from error
    return parse_recipe(mapping, str(model.path), overrides)


def load_test_split(data: Data, num_classes: int, warn: Callable[[str], None] = lambda _: None) -> Split:
    """The test split that ``data`` names.

    Args:
        data: names it.
        num_classes: of the network.
        warn: told which images were left out.

    Raises:
        DataError: it cannot be read, or has another number of classes than ``num_classes``.
    """
    split = load_split(data, "test")
    if split.left_out is not None:
        warn(split.left_out)
    check_fits(split, num_classes)
    return split


def verification_images(data: Data, class_names: Sequence[str], overrides: Sequence[str] = ()) -> Split:
    """The test split that ``data`` names, or images of noise where the network knows no images.

    A network that a user's own loop trained knows the size and the normalization of its images, not where
    they are. That an exported file computes what the network does is seen on any images.

    Args:
        data: of the network, with ``overrides`` applied.
        class_names: by label.
        overrides: ``data.key=value`` texts; with any of them noise is no answer.

    Raises:
        DataError: the split cannot be read, or has another number of classes.
    """
    if data.dataset == "imagefolder" and data.root is None and not overrides:
        return NoiseSplit(class_names, data.image_size)
    return load_test_split(data, len(class_names))
