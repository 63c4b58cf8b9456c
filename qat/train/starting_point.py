"""The network that a run starts from: a checkpoint's, with its classifier or a new one, or random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.checkpoints.header import FORMAT
from qat.checkpoints.loading import architecture_of, highest_temperature, load_state, without_quantizers
from qat.data.split import Split
from qat.errors import CheckpointError, DataError
from qat.models.bnext import BNext, is_binary
from qat.recipe.loading import LoadedRecipe, resolve_checkpoint
from qat.recipe.schema import FLOAT_EPOCHS, Model, Recipe
from qat.train.reporter import Reporter

#: Stem stride of a published network whose checkpoint has no classifier: all that were published for large
#: images have it.
_WITHOUT_CLASSIFIER: Final = 2


@dataclass(frozen=True)
class StartingPoint:
    """A float-rest network before its training.

    Attributes:
        loaded: the recipe with everything filled in that it left to the checkpoint and the images.
        checkpoint: file of the weights; ``None`` where they are random.
        network: on the CPU.
        new_classifier: whether the classifier has random weights while the rest is a checkpoint's.
    """

    loaded: LoadedRecipe
    checkpoint: Path | None
    network: BNext
    new_classifier: bool

    @property
    def recipe(self) -> Recipe:
        """The recipe of ``loaded``."""
        return self.loaded.recipe

    @property
    def float_epochs(self) -> int:
        """Epochs in float before quantization."""
        return self.recipe.schedule.float_epochs or 0


def starting_point(loaded: LoadedRecipe, train: Split, reporter: Reporter) -> StartingPoint:
    """The network that the recipe's run starts from. A new classifier is drawn from torch's random numbers.

    Args:
        loaded: the recipe.
        train: its training images, whose classes a recipe without ``model.num_classes`` takes.
        reporter: told what becomes of the classifier, and of what was chosen for want of a record.

    Raises:
        RecipeError: there is no such checkpoint.
        CheckpointError: it can't be read, or does not fit the recipe.
        DataError: the classes can't be those of the network.
    """
    recipe = loaded.recipe
    model = recipe.model
    classes = _class_count(model, train)
    if model.checkpoint is None:
        network = BNext.from_architecture(architecture_of(model, classes))
        return StartingPoint(_filled_in(loaded, network, new=None), None, network, new_classifier=False)
    path = resolve_checkpoint(loaded)
    checkpoint = load_checkpoint(
        path,
        latent=model.latent,
        stem_stride=model.stem_stride,
        num_classes=classes,
        state_key=model.state_key,
    )
    for note in checkpoint.notes:
        reporter.message(f"{path}: {note}")
    checkpoint = _with_stride(checkpoint, recipe, reporter)
    new = _starts_anew(checkpoint, model, classes, train, reporter)
    network = BNext.from_architecture(architecture_of(model, classes, checkpoint.architecture.stem_stride))
    load_state(network, without_quantizers(checkpoint), classifier="new" if new else "keep")
    if recipe.task == "finetune":
        _check_trained(path, checkpoint, network, recipe, reporter)
    return StartingPoint(_filled_in(loaded, network, new), path, network, new)


def _class_count(model: Model, train: Split) -> int:
    """The recipe's number of classes, or that of the images where the recipe leaves it open."""
    if model.num_classes is not None:
        return model.num_classes
    classes = train.num_classes
    if classes > len(train):
        raise DataError(
            f"the data has {classes:,} classes, but only {len(train):,} training images: are the labels "
            "something else, such as numbers of images? Name another column with data.label_column, or set "
            "model.num_classes"
        )
    if classes < 2:
        raise DataError(
            f"the data has {classes} class, {train.class_names[0]!r}; a classifier needs at least 2: "
            "one folder or label for each"
        )
    return classes


def _with_stride(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Checkpoint:
    """``checkpoint`` with the stem stride that its network is going to have."""
    asked, known = recipe.model.stem_stride, checkpoint.architecture.stem_stride
    chosen: int
    if asked is not None:
        if checkpoint.format == FORMAT and asked != known:
            reporter.warning(
                f"{checkpoint.source}: was trained with stem stride {known}, model.stem_stride is {asked}"
            )
        chosen = asked
    elif checkpoint.has_classifier:  # recorded, or by the classifier's rows: see infer_architecture
        chosen = known
    else:
        chosen = _WITHOUT_CLASSIFIER
        reporter.message(
            f"{checkpoint.source}: doesn't tell its stem stride; {chosen} is taken, as for 1000 classes "
            "(set another with model.stem_stride)"
        )
    return replace(checkpoint, architecture=replace(checkpoint.architecture, stem_stride=chosen))


def _starts_anew(
    checkpoint: Checkpoint, model: Model, classes: int, train: Split, reporter: Reporter
) -> bool:
    """Whether the classifier starts from random weights; the reporter is told why."""
    found = checkpoint.architecture.num_classes
    same = checkpoint.has_classifier and found == classes
    if checkpoint.has_classifier:
        has = f"its classifier tells {found} classes apart"
    else:
        has = "it has no classifier"
    if model.classifier == "keep" and not same:
        raise CheckpointError(
            f"{checkpoint.source}: {has}, the images have {classes}, and model.classifier is 'keep'; set it "
            "to 'auto' or 'new' to start with a new one"
        )
    if model.classifier == "new" or not same:
        why = "as model.classifier asks" if same else f"{has}, the images have {classes}"
        reporter.message(f"{checkpoint.source}: the classifier starts anew: {why}")
        return True
    names = checkpoint.metadata.get("class_names")
    if names is not None and json.loads(names) != train.class_names:
        reporter.warning(
            f"{checkpoint.source}: its {classes} classes have other names than those of the images; start "
            "the classifier anew with --set model.classifier=new if they are other classes"
        )
    return False


def _check_trained(
    path: Path, checkpoint: Checkpoint, network: BNext, recipe: Recipe, reporter: Reporter
) -> None:
    """Refuse a network that isn't binary yet; say what is unusual about a checkpoint to fine-tune from."""
    if not is_binary(network):
        raise CheckpointError(
            f"{path}: the weights in use are not binary yet: the temperature is "
            f"{highest_temperature(network):.3g}, binary means below 1e-7. Train on until it has annealed "
            "(qat pretrain)"
        )
    if checkpoint.quantization is not None:
        reporter.warning(f"{path}: already fine-tuned; starting from its weights, its ranges are found anew")
    if checkpoint.recipe is not None:
        for key in ("image_size", "mean", "std", "exif_orientation"):
            trained, asked = getattr(checkpoint.recipe.data, key), getattr(recipe.data, key)
            if trained != asked:
                reporter.warning(f"data.{key} is {asked}, the checkpoint was trained with {trained}")


def _filled_in(loaded: LoadedRecipe, network: BNext, new: bool | None) -> LoadedRecipe:
    """The recipe with the keys that it leaves open as they were decided, so that it can be run again.

    Args:
        loaded: the recipe.
        network: what it describes.
        new: whether the classifier starts anew; ``None`` without a checkpoint.
    """
    recipe, architecture = loaded.recipe, network.architecture
    schedule = recipe.schedule
    model = {
        "num_classes": architecture.num_classes,
        "stem_stride": architecture.stem_stride,
        "classifier": recipe.model.classifier if new is None else "new" if new else "keep",
    }
    if recipe.task == "finetune" and schedule.float_epochs is None:
        schedule = schedule.model_copy(update={"float_epochs": FLOAT_EPOCHS if new else 0})
    changed = {"model": recipe.model.model_copy(update=model), "schedule": schedule}
    return replace(loaded, recipe=recipe.model_copy(update=changed))
