"""Load, check and run an exported model in onnxruntime on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.errors import CheckpointError, DataError, NativeLibraryError, first_line, nearest
from qat.recipe.schema import Data
from qat_export.graphs.metadata import INPUT, OUTPUT, InputKind
from qat_export.verify.sessions import create_session


class OnnxModel:
    """An exported model, loaded into onnxruntime on the CPU.

    Attributes:
        metadata: the model's metadata properties.
        input_kind: type and layout of the images it takes.
        image_size: side of its input in pixels.
        num_classes: number of logits per image.

    Raises:
        CheckpointError: the file is absent, damaged, or not a model that this project exported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        self.session = open_session(path, path)
        try:
            self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
            inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: metadata or names are damaged: {error}") from error
        ours = [value.name for value in inputs] == [INPUT] and [value.name for value in outputs] == [OUTPUT]
        if not ours or not self.metadata.get("format", "").startswith("bnext-qat"):
            raise CheckpointError(
                f"{path}: not exported by this tool: expected input {INPUT!r}, output {OUTPUT!r} and "
                f"metadata 'format', found inputs {[value.name for value in inputs]}"
            )
        self.input_kind = input_kind(self.metadata, path)
        shape, logits = list(inputs[0].shape), list(outputs[0].shape)
        side = shape[2] if len(shape) == 4 else None
        image = [side, side, 3] if self.input_kind == "uint8 NHWC" else [3, side, side]
        if not isinstance(side, int) or shape[1:] != image or not isinstance(logits[-1], int):
            raise CheckpointError(
                f"{path}: input {shape} and output {logits} are not {self.input_kind} images and logits of "
                "fixed sizes"
            )
        if inputs[0].type != ("tensor(uint8)" if self.takes_pixels else "tensor(float)"):
            raise CheckpointError(
                f"{path}: metadata 'input' is {self.input_kind!r}, the graph takes {inputs[0].type}"
            )
        self.image_size: int = side
        self.num_classes: int = logits[-1]

    @property
    def takes_pixels(self) -> bool:
        """Whether it is called with raw uint8 pixels; :func:`qat.evaluation.input_for` reads this."""
        return takes_pixels(self.input_kind)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the logits; empty where the metadata have none, or not as many."""
        try:
            names = json.loads(self.metadata.get("class_names", "[]"))
        except (ValueError, RecursionError):
            return ()
        fits = isinstance(names, list) and len(names) == self.num_classes
        return tuple(map(str, names)) if fits else ()

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S), raw uint8 or normalized float32 → logits (N, classes).

        Raises:
            ValueError: the images have the other type.
            CheckpointError: onnxruntime can't run the model.
        """
        (logits,) = run_session(self.session, [OUTPUT], input_array(images, self.input_kind), self.path)
        return torch.from_numpy(logits)

    def check_data(self, data: Data) -> None:
        """Refuse data with another image size or normalization than the model's.

        Raises:
            DataError: the message names the key that differs.
        """
        if data.image_size != self.image_size:
            raise DataError(
                f"data.image_size is {data.image_size}, {self.path} takes "
                f"{self.image_size}×{self.image_size} pixels"
            )
        theirs = normalization(self.metadata, self.path)
        for key, ours in (("mean", data.mean), ("std", data.std)):
            if not np.allclose(ours, theirs[key], atol=1e-6):
                raise DataError(f"data.{key} is {list(ours)}, {self.path} was made for {list(theirs[key])}")


# Reading of metadata. `source` is what error messages call the model.


def normalization(metadata: Mapping[str, str], source: object) -> dict[str, tuple[float, ...]]:
    """The normalization in the metadata: ``mean`` and ``std``, three numbers each.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        stored = json.loads(metadata["normalization"])
        found = {key: tuple(float(value) for value in stored[key]) for key in ("mean", "std")}
        if {len(values) for values in found.values()} != {3}:
            raise ValueError("not one value per channel")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: metadata 'normalization' is missing or damaged") from error
    return found


def input_kind(metadata: Mapping[str, str], source: object) -> InputKind:
    """Type and layout of the images that the metadata name; ``float32 NCHW`` if they name none.

    Raises:
        CheckpointError: they name a kind that no export writes.
    """
    kinds: tuple[InputKind, ...] = get_args(InputKind)
    text = metadata.get("input", "float32 NCHW")
    for kind in kinds:
        if text == kind:
            return kind
    allowed = ", ".join(map(repr, kinds))
    raise CheckpointError(f"{source}: metadata 'input' is {text!r}, allowed: {allowed}{nearest(text, kinds)}")


def require_integers(metadata: Mapping[str, str], source: object) -> None:
    """Refuse a float export by its ``format``: it has no integers to compare.

    Raises:
        CheckpointError: the message names the format.
    """
    found = metadata.get("format", "")
    if found.startswith("bnext-qat float"):
        raise CheckpointError(f"{source}: a float export ({found!r}) has no integers to verify")


# Running.


def takes_pixels(kind: InputKind) -> bool:
    """Whether images of this kind are raw uint8 pixels, which the model normalizes itself."""
    return kind != "float32 NCHW"


def input_array(images: Tensor, kind: InputKind) -> NDArray[Any]:
    """Convert ``images`` (N, 3, H, W) to the type and layout that a model takes.

    Raises:
        ValueError: the model takes pixels but the images are not uint8, or it takes normalized images but
            they are uint8.
    """
    if takes_pixels(kind) != (images.dtype == torch.uint8):
        raise ValueError(f"a model with input {kind!r} was given {images.dtype} images")
    array = images.detach().cpu().numpy()
    if kind == "uint8 NHWC":
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array, dtype=np.uint8 if takes_pixels(kind) else np.float32)


def open_session(model: Path | bytes, source: object, *, optimize: bool = True) -> ort.InferenceSession:
    """Open a model, from its file or its content, in onnxruntime on the CPU.

    Args:
        model: path or bytes of the model.
        source: what error messages call it.
        optimize: whether onnxruntime optimizes the graph with all it has, or not at all.

    Raises:
        CheckpointError: it is not a model, or onnxruntime can't run it.
        NativeLibraryError: it has native operators, and their library is missing.
    """

    def options() -> ort.SessionOptions:
        chosen = ort.SessionOptions()
        chosen.log_severity_level = 4  # don't print errors: onnxruntime raises them as well
        if not optimize:
            chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return chosen

    try:
        return create_session(str(model) if isinstance(model, Path) else model, options)
    except NativeLibraryError as error:
        raise NativeLibraryError(f"{source}: has native operators; {error}") from error
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise CheckpointError(
            f"{source}: not a model that onnxruntime can load: {first_line(error)}"
        ) from error


def run_session(
    session: ort.InferenceSession, names: Sequence[str], images: NDArray[Any], source: object
) -> list[NDArray[Any]]:
    """Run a model on ``images``, an array from :func:`input_array`; returns the outputs called ``names``.

    Raises:
        CheckpointError: onnxruntime failed; the message names ``source``.
    """
    options = ort.RunOptions()
    options.only_execute_path_to_fetches = True
    try:
        found: list[NDArray[Any]] = session.run(list(names), {INPUT: images}, options)
    except Exception as error:
        raise CheckpointError(f"{source}: onnxruntime can't run it: {first_line(error)}") from error
    return found
