"""Networks in Python: load, quantize, calibrate, freeze, save."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import torch

from qat.checkpoints.format import Checkpoint, load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.data.batches import normalized_images
from qat.errors import QuantizationError, first_line
from qat.models.bnext import Architecture, BNext
from qat.models.facts import per_channel
from qat.ops.batch_norm import BatchNorm2d
from qat.quantize import calibration, preparation
from qat.quantize.image_grid import image_grid
from qat.recipe.schema import Data, Model, Quantization, Recipe
from qat.runs import find_run

#: Where a checkpoint that no run wrote says that its network came from.
_BY_HAND = "trained in Python"


def load(path: str | os.PathLike[str], *, state_key: str | None = None) -> BNext:
    """The network of a checkpoint, or of a run's best checkpoint, in evaluation mode on the CPU.

    Args:
        path: a file of this project, one with a state dict of a BNext, or the folder of a run.
        state_key: which weights to take where the file holds several, such as ``state_dict`` beside
            ``state_dict_ema``; by default an average over training steps, else those in the usual place.

    Returns:
        The network; fake-quantized if it was saved so. ``model.facts`` has what the file knows about its
        images and classes.

    Raises:
        CheckpointError: it can't be read, or is no BNext. No code in the file is ever run.
        QatError: the folder is no run.
    """
    place = Path(path)
    return build(load_checkpoint(find_run(place).best if place.is_dir() else place, state_key=state_key))


def save(
    model: BNext,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> None:
    """Write a network to a checkpoint that every command reads.

    Args:
        model: on any device; binary weights are stored as one bit each.
        path: file to create or replace, atomically.
        class_names: in the order of the logits; by default those that the model knows.
        image_size: side of the images in pixels; by default what the model knows, from its checkpoint or its
            calibration.

    Raises:
        CheckpointError: a tensor holds NaN, or a value too large for its stored type.
        QuantizationError: names or size can't be those of the network.
        OutputError: the file can't be written.
    """
    known = described(model, class_names, image_size)
    save_checkpoint(Path(path), model, recipe=known.recipe, metadata=known.metadata)


def prepare(
    model: BNext,
    quantization: Quantization | Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BNext:
    """Insert fake quantization into a float-rest network, in place.

    Args:
        model: the network.
        quantization: what is quantized and how, as the recipes' section says it, such as
            ``{"se": {"weight_bits": 4}}``; by default 8 bits everywhere.
        mean, std: normalization ``(x − mean) / std`` of pixels in 0 to 1, one number per channel. The image's
            grid follows from it. By default what the model's checkpoint knows.

    Returns:
        The same network. Calibrate it before it is trained or evaluated.

    Raises:
        QuantizationError: the settings or the normalization can't be used, the normalization isn't known, or
            the network is prepared already.
    """
    if quantization is None:
        quantization = Quantization()
    elif not isinstance(quantization, Quantization):
        try:
            quantization = Quantization.model_validate(dict(quantization))
        except (pydantic.ValidationError, TypeError, ValueError) as error:
            raise QuantizationError(f"quantization: {_first_problem(error)}") from error
    mean, std = mean or model.facts.mean, std or model.facts.std
    if mean is None or std is None:
        raise QuantizationError(
            "the normalization of the images isn't known: give prepare(model, mean=(…), std=(…)), one number "
            "per channel"
        )
    facts = replace(model.facts, mean=per_channel(mean, "mean"), std=per_channel(std, "std", positive=True))
    preparation.prepare(model, quantization, image_grid(mean, std))
    model.facts = facts
    return model


def calibrate(model: BNext, batches: Iterable[Any]) -> None:
    """Find the ranges of a prepared network's activations from some batches of training images.

    Args:
        model: prepared; its mode stays.
        batches: of normalized float images (N, 3, H, W), or of tuples that begin with them, such as (images,
            labels). A few hundred images are enough.

    Raises:
        QuantizationError: nothing to calibrate, or the batches reach not all points (as without any batch).
        DataError: a batch holds no such images.
    """
    device = model.fc.weight.device
    sizes: list[int] = []

    def forward() -> None:
        for images, _ in normalized_images(batches):
            sizes.append(int(images.shape[-1]))
            model(images.to(device))

    calibration.calibrate(model, forward)
    if model.facts.image_size is None:
        model.facts = replace(model.facts, image_size=sizes[0])


def freeze(model: torch.nn.Module, *, observers: bool = True, batch_norm: bool = True) -> None:
    """Let ranges and batch-norm statistics stay as they are from here on, in training mode, too.

    What remains to be trained are the weights. The recipes do it after half of the steps, and for batch norm
    from the start.

    Args:
        model: prepared, or a float-rest network.
        observers: fix the grids.
        batch_norm: fix the running statistics, which then normalize in training as well.
    """
    if observers:
        calibration.freeze_observers(model)
    if batch_norm:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.frozen = True
                module.eval()


def described(
    model: BNext, class_names: Sequence[str] | None = None, image_size: int | None = None
) -> Checkpoint:
    """What is known about ``model``, as a checkpoint without tensors. See :func:`save` for the arguments.

    A model that no run trained gets a recipe that says what it is; it names no images.
    """
    facts, architecture = model.facts, model.architecture
    names = tuple(map(str, class_names if class_names is not None else facts.class_names))
    if names and len(names) != architecture.num_classes:
        raise QuantizationError(
            f"class_names: found {len(names)} names, the network has {architecture.num_classes} classes"
        )
    side = image_size if image_size is not None else facts.image_size
    if side is not None and (type(side) is not int or side < 8):
        raise QuantizationError(f"image_size: found {side!r}, allowed: a whole number of pixels, at least 8")
    quantization: Quantization | None = getattr(model, "quantization", None)
    recipe = facts.recipe
    known = facts.mean is not None and facts.std is not None and side is not None
    if known and (recipe is None or (recipe.task == "pretrain" and quantization is not None)):
        recipe = _recipe(architecture, quantization, recipe)
    if known and recipe is not None:
        data = {"mean": facts.mean, "std": facts.std, "image_size": side}
        changes: dict[str, Any] = {"data": recipe.data.model_copy(update=data)}
        if quantization is not None:
            changes["quantization"] = quantization
        recipe = recipe.model_copy(update=changes)
    metadata = {"class_names": json.dumps(names)} if names else {}
    return Checkpoint(architecture, {}, recipe, quantization, metadata=metadata, source="the network")


def _recipe(architecture: Architecture, quantization: Quantization | None, of_start: Recipe | None) -> Recipe:
    """A recipe for a network that a user's own loop trained; ``of_start`` is that of what it began with."""
    section = Model(
        widths=list(architecture.widths),
        num_classes=architecture.num_classes,
        stem_stride=architecture.stem_stride,  # type: ignore[arg-type]  # 1 or 2
        elm_attention=architecture.elm_attention,
        infor_recoupling=architecture.infor_recoupling,
        checkpoint=None if quantization is None else _BY_HAND,
    )
    return Recipe(
        task="pretrain" if quantization is None else "finetune",
        model=section,
        data=Data(dataset="imagefolder") if of_start is None else of_start.data,
        quantization=quantization,
    )


def _first_problem(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return first_line(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
