"""What `qat export` and `qat evaluate` do: find the model and its data, then call the floors below."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from export.integer import IntegerNetwork
from export.lower import lower
from export.portable import emit
from export.verify import Comparison, OnnxModel, compare
from qat import __version__
from qat.bnext import is_binary
from qat.checkpoint import Checkpoint, load_checkpoint
from qat.data import Split, check_fits, load_split
from qat.errors import CheckpointError, DataError, QuantizationError, RecipeError
from qat.evaluate import Accuracy, evaluate, predictor
from qat.files import write_atomically
from qat.loading import architecture_of, build, highest_temperature
from qat.recipe import Data, LoadedRecipe, Recipe, load_recipe, parse_recipe
from qat.rundir import RunDirectory, find_run, newest_run


def export_onnx(
    onnx_path: Path | None,
    run_path: Path | None,
    checkpoint_path: Path | None,
    runs: Path,
    image_size: int | None,
    overrides: Sequence[str],
) -> tuple[Path, IntegerNetwork, Comparison]:
    """Export a fine-tuned checkpoint to ONNX and compare the written file with the network.

    Args:
        onnx_path: file to write; ``None`` writes ``model.onnx`` beside the checkpoint.
        run_path: run directory; ``None`` means the newest one under ``runs``.
        checkpoint_path: checkpoint file instead of a run.
        runs: folder of run directories.
        image_size: side of the model's input; ``None`` is what it was trained on.
        overrides: ``data.key=value`` texts for the data of the comparison.

    Returns:
        The path, the lowered network, and the comparison; the file is only written if no bound is broken.

    Raises:
        QatError: nothing to export, something that can't be lowered, or missing data.
    """
    if checkpoint_path is None:
        run: RunDirectory = find_run(run_path) if run_path is not None else newest_run(runs)
        checkpoint_path = run.best
    checkpoint = load_checkpoint(checkpoint_path)
    if checkpoint.quantization is None:
        raise QuantizationError(
            f"{checkpoint_path}: a float-rest network has no integers to export: "
            "fine-tune it first (qat finetune)"
        )
    fixed = "fixed by the checkpoint, which was trained with it"
    if checkpoint.recipe is None:
        raise RecipeError(
            f"{checkpoint_path}: carries no recipe; export needs a checkpoint that qat finetune wrote"
        )
    _only_data(overrides, {"mean": fixed, "std": fixed, "image_size": "say it with --image-size"})
    recipe = _own_recipe(checkpoint, overrides)
    data = recipe.data if image_size is None else recipe.data.model_copy(update={"image_size": image_size})
    model = build(checkpoint)
    try:
        network = lower(
            model,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            class_names=_class_names(checkpoint),
            metadata=_metadata(checkpoint, data.image_size),
        )
    except QuantizationError as error:
        raise QuantizationError(f"{checkpoint_path}: {error}") from error
    # The data first: without it the model could not be verified, and should not be written.
    split = _test_split(data, len(network.class_names))
    path = onnx_path or checkpoint_path.with_name("model.onnx")
    # Under its name only once it is verified: an earlier good model stays if this one is not.
    candidate = path.with_name(f".{path.stem}.unverified.onnx")
    write_atomically(candidate, emit(network).SerializeToString(deterministic=True))
    try:
        comparison = compare(predictor(model), OnnxModel(candidate), network, split, data)
        if not comparison.problems():
            write_atomically(path, candidate.read_bytes())
    finally:
        candidate.unlink(missing_ok=True)
    return path, network, comparison


def evaluate_model(
    path: Path, recipe: str | None, overrides: Sequence[str], warn: Callable[[str], None]
) -> Accuracy:
    """Accuracy of a run directory's best checkpoint, a checkpoint file or an exported model.

    Args:
        path: the model.
        recipe: take the data section of this recipe rather than of the model's own. For published weights it
            tells the stem's stride, too.
        overrides: ``data.key=value`` texts that change the recipe.
        warn: told what makes the accuracy another than the one asked for.

    Raises:
        QatError: the model, its data or the recipe cannot be read, or don't fit each other.
    """
    _only_data(overrides, {})
    chosen = load_recipe(recipe, overrides) if recipe is not None else None
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        model = OnnxModel(path)
        data = (chosen.recipe if chosen else _recipe_of_onnx(model, overrides)).data
        model.check_data(data)
        return evaluate(model, _test_split(data, model.num_classes), data)
    checkpoint = load_checkpoint(
        find_run(path).best if path.is_dir() else path,
        stem_stride=chosen.recipe.model.stem_stride if chosen else None,
    )
    if chosen is not None:
        _check_model(checkpoint, chosen, warn)
    data = (chosen.recipe if chosen else _own_recipe(checkpoint, overrides)).data
    _check_data(checkpoint, data, warn)
    network = build(checkpoint)
    if not is_binary(network):
        warn(
            f"{checkpoint.source}: the weights in use are not binary: the temperature is "
            f"{highest_temperature(network):.3g}, binary means below 1e-7"
        )
    split = _test_split(data, network.architecture.num_classes)
    return evaluate(predictor(network), split, data)


def _only_data(overrides: Sequence[str], refused: Mapping[str, str]) -> None:
    """Refuse overrides of other sections, which change nothing here, and of ``data`` keys for a reason."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        section, _, name = key.partition(".")
        if section != "data":
            raise RecipeError(f"--set {override}: {key}: no effect here; only keys of `data` may be set")
        if name in refused:
            raise RecipeError(f"--set {override}: {key}: {refused[name]}")


def _check_model(checkpoint: Checkpoint, loaded: LoadedRecipe, warn: Callable[[str], None]) -> None:
    """Say that a recipe, taken for its data, describes another network than the checkpoint holds."""
    asked = architecture_of(loaded.recipe.model)
    if asked != checkpoint.architecture:
        warn(
            f"{loaded.path}: model: describes {asked}; evaluated is what {checkpoint.source} holds, "
            f"{checkpoint.architecture}"
        )


def _check_data(checkpoint: Checkpoint, data: Data, warn: Callable[[str], None]) -> None:
    """Compare ``data`` with what the network was trained on.

    Another normalization is refused for a quantized network, whose image grid is made for one, as it is for
    an exported model. Anything else is merely unusual.
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
    if data.image_size != trained.image_size:
        warn(
            f"data.image_size is {data.image_size}, {checkpoint.source} was trained with {trained.image_size}"
        )


def _test_split(data: Data, num_classes: int) -> Split:
    split = load_split(data, "test")
    check_fits(split, num_classes)
    return split


def _own_recipe(checkpoint: Checkpoint, overrides: Sequence[str]) -> Recipe:
    """The recipe a checkpoint carries, with ``overrides`` applied."""
    if checkpoint.recipe is None:
        raise RecipeError(
            f"{checkpoint.source}: carries no recipe, so its data is unknown: give one with --recipe"
        )
    return parse_recipe(checkpoint.recipe.model_dump(mode="json"), checkpoint.source, overrides)


def _recipe_of_onnx(model: OnnxModel, overrides: Sequence[str]) -> Recipe:
    try:
        mapping = json.loads(model.metadata["recipe"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{model.path}: metadata 'recipe' is missing or damaged: give --recipe"
        ) from error
    return parse_recipe(mapping, str(model.path), overrides)


def _class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Class names a checkpoint carries; empty where it carries none or not as many as classes."""
    try:
        names = json.loads(checkpoint.metadata.get("class_names", "[]"))
    except ValueError:
        return ()
    fits = isinstance(names, list) and len(names) == checkpoint.architecture.num_classes
    return tuple(str(name) for name in names) if fits else ()


def _metadata(checkpoint: Checkpoint, image_size: int) -> Mapping[str, str]:
    """Facts for the exported file: recipe (with the size it takes), versions, accuracy of the network."""
    assert checkpoint.recipe is not None
    data = checkpoint.recipe.data.model_copy(update={"image_size": image_size})
    recipe = checkpoint.recipe.model_copy(update={"data": data})
    facts = {"recipe": recipe.model_dump_json(), "exporter": f"bnext-qat {__version__}"}
    for key in ("versions", "accuracy", "test_fingerprint"):
        if key in checkpoint.metadata:
            facts[key] = checkpoint.metadata[key]
    return facts
