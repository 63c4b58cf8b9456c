"""Exporting and verifying in Python."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from qat_export.graphs.metadata import InputKind
from qat_export.verify.agreement import Comparison, compare
from qat_export.verify.exactness import check_exactness, sample
from qat_export.verify.model import OnnxModel, require_integers

from qat.api.networks import described
from qat.checkpoints.format import Checkpoint
from qat.checkpoints.loading import float_network
from qat.commands.exporting import Exported, Form, Target, write_verified, write_verified_float
from qat.commands.lowering import Source, lowered
from qat.commands.sources import verification_images
from qat.commands.verification import Verified, verify_model
from qat.data.batches import split_of_batches
from qat.data.split import Split
from qat.errors import QuantizationError, nearest
from qat.evaluation import predictor
from qat.models.bnext import BNext
from qat.native.library import native_library_path
from qat.quantize.preparation import model_is_prepared
from qat.recipe.schema import Data

_INPUTS: Final[dict[str, InputKind]] = {
    "float32": "float32 NCHW",
    "uint8": "uint8 NCHW",
    "uint8 NHWC": "uint8 NHWC",
}
_TARGETS: Final = ("portable", "native", "strict", "float32")


def export_onnx(
    model: BNext,
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    target: Literal["portable", "native", "strict", "float32"] = "portable",
    input: Literal["float32", "uint8", "uint8 NHWC"] = "float32",
    images: Iterable[Any] | None = None,
) -> Exported | Comparison:
    """Write a network as ONNX, and compare the file with the network and with the integer reference.

    Args:
        model: prepared and calibrated; for ``target="float32"`` also a float-rest network.
        path: file to create or replace. An earlier one stays if the new one is not good.
        image_size: side of the images that the model takes, in pixels; by default what the network knows.
        class_names: in the order of the logits; by default those that the network knows, else numbers.
        target: ``portable`` (standard operators), ``native`` (this project's), ``strict`` (standard
            operators of integers alone, for other runtimes) or ``float32``.
        input: normalized ``float32`` (N, 3, S, S), or raw ``uint8`` pixels of that shape or (N, S, S, 3).
        images: batches of (images, labels) to compare on, pixels as :func:`qat.finetune` takes them; by
            default the test images of the network's run, or noise where no run is known.

    Returns:
        The comparisons; ``print(*result.comparison.rows(), sep="\\n")`` shows them.

    Raises:
        VerificationError: the file does not compute what the network does; it was not written.
        QuantizationError: something that can't be exported, naming the layer, or isn't known.
        OutputError: the file can't be written.
    """
    _allowed("target", target, _TARGETS)
    _allowed("input", input, _INPUTS)
    known = described(model, class_names, image_size)
    data = _data(known)
    place = Path(path)
    if target == "float32":
        split = _images(known, data, images)
        comparison = write_verified_float(model, _float_rest(model), known, split, data, place)
        comparison.require()
        return comparison
    if not model_is_prepared(model):
        raise QuantizationError(
            "a float-rest network has no integers: qat.prepare and qat.calibrate it first, or export it with "
            "target='float32'"
        )
    if target == "native":
        native_library_path()  # without it the model could not be verified
    network = lowered(model, known, data)
    split = _images(known, data, images)
    settings = Target(place, data.image_size, _INPUTS[input], Form(target))
    exported = write_verified(model, network, split, data, place, settings)
    exported.require()
    return exported


def verify(path: str | os.PathLike[str], source: BNext | str | os.PathLike[str]) -> Verified:
    """Compare an exported model with the network it came from, and with the integer reference.

    Args:
        path: the .onnx file.
        source: the network, or the run or checkpoint that it was exported from.

    Returns:
        The comparisons.

    Raises:
        VerificationError: they differ; the message names the tensors.
        CheckpointError: a file can't be read, or the model was made from another network.
    """
    place = Path(path)
    if isinstance(source, BNext):
        model = OnnxModel(place)
        require_integers(model.metadata, place)
        known = described(source, image_size=model.image_size)
        data = _data(known)
        model.check_data(data)
        network, split = lowered(source, known, data), _images(known, data, None)
        exact = check_exactness(place, network, sample(split, model.image_size))
        found = Verified(place, exact, compare(predictor(source), model, network, split, data))
    else:
        folder = Path(source)
        run, checkpoint = (folder, None) if folder.is_dir() else (None, folder)
        found = verify_model(place, Source(run, checkpoint), None)
    found.require()
    return found


def _data(known: Checkpoint) -> Data:
    if known.recipe is None:
        raise QuantizationError(
            "image size or normalization isn't known: give image_size=, and mean= and std= to qat.prepare"
        )
    return known.recipe.data


def _images(known: Checkpoint, data: Data, images: Iterable[Any] | None) -> Split:
    """What a file is compared on."""
    count = known.architecture.num_classes
    names = [str(number) for number in range(count)]
    if images is not None:
        return split_of_batches(images, data.image_size, names)
    return verification_images(data, names)


def _float_rest(model: BNext) -> BNext:
    if not model_is_prepared(model):
        return model
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    quantization = getattr(model, "quantization", None)
    return float_network(Checkpoint(model.architecture, state, quantization=quantization))


def _allowed(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        hint = nearest(value, allowed)
        raise QuantizationError(f"{name}: found {value!r}, allowed: {choices}{hint}")
