"""Whole runs in Python, as `qat pretrain`, `qat finetune` and `qat evaluate` do them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from qat_export.verify.model import OnnxModel

from qat.api.networks import load
from qat.commands.evaluation import evaluate_model
from qat.data.batches import images_of, labels_of, split_of_batches
from qat.errors import DataError
from qat.evaluation import Accuracy, Predict, accuracy_of, predictor
from qat.models.bnext import BNext
from qat.quantize.constant_cache import keeping_constants
from qat.recipe.loading import LoadedRecipe, load_recipe
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory
from qat.train import finetuning, pretraining
from qat.train.job import Splits
from qat.train.reporter import Reporter

AnyRecipe = str | os.PathLike[str] | LoadedRecipe | Recipe


def pretrain(
    recipe: AnyRecipe,
    train: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> RunDirectory:
    """Train a binary network from random weights. Arguments and errors are those of :func:`finetune`."""
    loaded = _loaded(recipe)
    return pretraining.pretrain(loaded, reporter, splits=_splits(loaded, train, test, class_names))


def finetune(
    recipe: AnyRecipe,
    train: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> RunDirectory:
    """Quantize a binary network and fine-tune it.

    Args:
        recipe: a name such as ``"tiny_int8"``, a file, or what :func:`qat.load_recipe` gave.
        train: batches of (images, labels) in place of the recipe's data: pixels (N, 3, S, S), uint8 or floats
            from 0 to 1, not normalized and of the recipe's ``data.image_size``; labels (N,). They are read
            once and kept in memory, a byte for each value; order, augmentation and normalization are the
            recipe's. Such a run can't be resumed from the shell, which has no such batches.
        test: the same, to measure accuracy on; required with ``train``.
        class_names: by label, with ``train``; by default numbers.
        reporter: told about progress; nobody by default.

    Returns:
        The run's folder: ``qat.load(run.path)`` is its best network.

    Raises:
        QatError: see the tree in :mod:`qat.errors`.
    """
    loaded = _loaded(recipe)
    return finetuning.finetune(loaded, reporter, splits=_splits(loaded, train, test, class_names))


def evaluate(model: BNext | str | os.PathLike[str], batches: Iterable[Any] | None = None) -> Accuracy:
    """Accuracy of a network, a checkpoint, a run or an exported model.

    Args:
        model: the network, or a path.
        batches: of (images, labels): normalized float images (N, 3, H, W), or uint8 pixels for an exported
            model that takes those; labels (N,). By default the test images that the recipe of a path names.

    Raises:
        DataError: a batch holds something else, or there are no images.
        CheckpointError: a file can't be read.
    """
    if batches is None:
        if isinstance(model, BNext):
            raise DataError("evaluate(model, batches): a network in memory has no images; give batches")
        return evaluate_model(Path(model), None, (), lambda text: None)
    predict, device = _predictor(model)
    rows, labels = [], []
    with keeping_constants():
        for number, batch in enumerate(batches, start=1):
            images = images_of(batch, number)
            if images.is_floating_point() == getattr(predict, "takes_pixels", False):
                wanted = "normalized float images" if not images.is_floating_point() else "uint8 pixels"
                raise DataError(f"batch {number}: found {images.dtype}, allowed: {wanted}")
            labels.append(labels_of(batch, len(images), number))
            rows.append(predict(images.to(device)).float().cpu())
    if not rows:
        raise DataError("no images: the batches are empty (an iterator can be read only once)")
    return accuracy_of(torch.cat(rows), torch.cat(labels))


def _predictor(model: BNext | str | os.PathLike[str]) -> tuple[Predict, torch.device]:
    if not isinstance(model, BNext):
        path = Path(model)
        if path.suffix.lower() == ".onnx" and not path.is_dir():
            return OnnxModel(path), torch.device("cpu")
        model = load(path)
    return predictor(model), model.fc.weight.device


def _loaded(recipe: AnyRecipe) -> LoadedRecipe:
    if isinstance(recipe, LoadedRecipe):
        return recipe
    if isinstance(recipe, Recipe):
        return LoadedRecipe("python", Path("recipe"), recipe)
    return load_recipe(Path(recipe))


def _splits(
    loaded: LoadedRecipe,
    train: Iterable[Any] | None,
    test: Iterable[Any] | None,
    class_names: Sequence[str] | None,
) -> Splits | None:
    if train is None and test is None:
        return None
    if train is None or test is None:
        raise DataError("give both train and test, or neither")
    side = loaded.recipe.data.image_size
    first = split_of_batches(train, side, class_names)
    return Splits(first, split_of_batches(test, side, first.class_names))
