"""Open any ONNX model that takes one batch of images in onnxruntime, with random images that fit its input.

:class:`qat_export.verify.model.OnnxModel` opens only exports of this project. This module doesn't import
torch, so that :mod:`qat_export.bench.peak_memory` can measure the memory of the model alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qat.errors import CheckpointError, NativeLibraryError, VerificationError, first_line
from qat_export.verify.sessions import create_session

Array = NDArray[Any]
#: Types of images that a model may take, by onnxruntime's names.
_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
}
_MOST_CHANNELS: Final = 4


@dataclass(frozen=True)
class ImageInput:
    """The one input of a model: its name, and the shape and type of the images that it is fed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def random(self, seed: int) -> Array:
        """Random images of this shape and type: uint8 from 0 to 255, or floats of mean 0 and variance 1."""
        rng = np.random.default_rng(seed)
        if self.dtype.kind == "f":
            return rng.standard_normal(self.shape, np.float32).astype(self.dtype)
        bounds = np.iinfo(self.dtype)
        return rng.integers(bounds.min, bounds.max, self.shape, self.dtype, endpoint=True)


class AnyModel:
    """An ONNX file in onnxruntime on the CPU, and images for it.

    Attributes:
        path: the file.
        session: session with onnxruntime's default optimizations that runs one operator at a time.
        input: the model's input.
        metadata: the file's metadata properties.

    Args:
        path: the file.
        threads: threads per operator.
        batch: images per run.
        resolution: side of the images in pixels, if the model takes any size.

    Raises:
        CheckpointError: the file is absent or damaged, or the model has no single input for such images.
    """

    def __init__(
        self, path: Path, *, threads: int = 1, batch: int = 1, resolution: int | None = None
    ) -> None:
        self.path = path
        self.session = open_session(path, threads)
        try:
            self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
            self.input = _image_input(self.session, path, batch, resolution)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: damaged: its texts are not UTF-8") from error

    def run(self, images: Array) -> list[Any]:
        """Run the model on ``images``, which have the shape and type of :attr:`input`; returns all outputs.

        Raises:
            CheckpointError: onnxruntime failed.
        """
        try:
            outputs: list[Any] = self.session.run(None, {self.input.name: images})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise CheckpointError(f"{self.path}: onnxruntime can't run it: {first_line(error)}") from error
        return outputs

    def check(self, images: Array) -> None:
        """Run the model once, and check that all its outputs are finite.

        Raises:
            CheckpointError: onnxruntime failed.
            VerificationError: an output has a NaN or an infinity; the time of such a model means nothing.
        """
        for value, output in zip(self.session.get_outputs(), self.run(images), strict=True):
            numeric = isinstance(output, np.ndarray) and output.dtype.kind == "f"
            if numeric and not np.isfinite(output).all():
                raise VerificationError(
                    f"{self.path}: output {value.name!r} holds NaN or infinity on random images"
                )


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """Open a session with the options that all measurements share; it prints nothing.

    Raises:
        CheckpointError: the file is absent or not a model, or onnxruntime can't run it.
        NativeLibraryError: it has native operators, and their library is missing.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")

    def options() -> ort.SessionOptions:
        chosen = ort.SessionOptions()
        chosen.intra_op_num_threads = threads
        chosen.inter_op_num_threads = 1
        chosen.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        chosen.log_severity_level = 4  # don't print errors: onnxruntime raises them as well
        # Threads that spin while they wait would slow down the model that runs next.
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
        return chosen

    try:
        return create_session(str(path), options)
    except NativeLibraryError as error:
        raise NativeLibraryError(f"{path}: has native operators; {error}") from error
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f"{path}: not a model that onnxruntime can load: {reason}") from error


def _image_input(session: ort.InferenceSession, path: Path, batch: int, resolution: int | None) -> ImageInput:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise CheckpointError(f"{path}: need a model with one input, its inputs are: {names}")
    name, shape = inputs[0].name, list(inputs[0].shape)
    described = f"{path}: input {name!r} {inputs[0].type} {shape}"
    if inputs[0].type not in _TYPES:
        allowed = ", ".join(_TYPES)
        raise CheckpointError(f"{described}: not a type of images, allowed: {allowed}")
    if len(shape) != 4:
        raise CheckpointError(f"{described}: need a batch of images, four dimensions")
    sides = _sides(shape)
    if sides is None:
        raise CheckpointError(
            f"{described}: neither the second nor the last dimension counts channels (1 to {_MOST_CHANNELS})"
        )
    if isinstance(shape[0], int) and shape[0] != batch:
        raise CheckpointError(f"{described}: takes batches of {shape[0]}, not of {batch}")
    for axis in sides:
        if not isinstance(shape[axis], int):
            if resolution is None:
                raise CheckpointError(f"{described}: takes images of any size: give a resolution")
            shape[axis] = resolution
        elif resolution is not None and shape[axis] != resolution:
            raise CheckpointError(f"{described}: takes sides of {shape[axis]}, not of {resolution}")
    return ImageInput(name, (batch, *shape[1:]), _TYPES[inputs[0].type])


def _sides(shape: list[Any]) -> tuple[int, int] | None:
    """The axes of height and width in ``shape``: after the channels (NCHW), or before them (NHWC).

    ``None`` if it is no shape of images.
    """
    for channels, sides in ((1, (2, 3)), (3, (1, 2))):
        if isinstance(shape[channels], int) and 1 <= shape[channels] <= _MOST_CHANNELS:
            return sides
    return None
