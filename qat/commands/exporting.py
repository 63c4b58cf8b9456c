"""What `qat export` does: lower a checkpoint, emit an ONNX graph, verify it and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import onnx
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.native import emit_native
from qat_export.graphs.portable import emit_portable
from qat_export.integer.file import load_network, save_network
from qat_export.integer.network import IntegerNetwork
from qat_export.verify.agreement import Comparison, compare
from qat_export.verify.exactness import check_exactness, sample
from qat_export.verify.figures import Exactness
from qat_export.verify.model import OnnxModel

from qat.checkpoints.format import Checkpoint
from qat.checkpoints.loading import build, class_names, float_network, highest_temperature
from qat.commands.lowering import Source, build_and_lower, facts, load
from qat.commands.sources import verification_images
from qat.data.split import Split
from qat.errors import CheckpointError, OutputError
from qat.evaluation import predictor
from qat.models.bnext import BNext, is_binary
from qat.native.library import native_library_path
from qat.recipe.schema import Data
from qat.system.files import write_atomically


class Form(Enum):
    """Which operators an exported integer model is made of."""

    #: Standard operators, chosen for their speed in onnxruntime.
    PORTABLE = "portable"
    #: Standard operators that all runtimes compute alike.
    STRICT = "strict"
    #: This project's own operators for onnxruntime.
    NATIVE = "native"


@dataclass(frozen=True)
class Target:
    """What to write.

    Attributes:
        onnx: file to write the model to; ``None`` means a file beside the checkpoint.
        image_size: side of the model's input in pixels; ``None`` means the size used in training.
        input_kind: type and layout of the images that the model takes.
        form: operators of the graph.
        network: file to write the integer network to as well; ``None`` writes none.
    """

    onnx: Path | None
    image_size: int | None = None
    input_kind: InputKind = "float32 NCHW"
    form: Form = Form.PORTABLE
    network: Path | None = None


class _Result(Protocol):
    def problems(self) -> list[str]: ...


Result = TypeVar("Result", bound=_Result)


@dataclass(frozen=True)
class Exported:
    """An exported integer model.

    Attributes:
        path: file of the model; it was written only if :meth:`problems` is empty.
        network: the integer network that the model computes.
        comparison: the model compared with the fake-quantized network.
        exactness: the model compared with the integer reference.
    """

    path: Path
    network: IntegerNetwork
    comparison: Comparison
    exactness: Exactness

    def problems(self) -> list[str]:
        """Each bound that is broken, in words."""
        return self.exactness.problems() + self.comparison.problems()

    def require(self) -> None:
        """Raise ``VerificationError`` if a bound is broken.

        The exactness comes first, since its message names the tensor that is wrong.
        """
        self.exactness.require()
        self.comparison.require()


def export_onnx(source: Source, target: Target) -> Exported:
    """Export a fine-tuned checkpoint to ONNX and compare the written file with the network.

    Raises:
        QatError: there is no checkpoint, it can't be lowered, its data is missing, or a file can't be
            written.
    """
    if target.network is not None:
        _require_network_file(target.network)
    if target.form is Form.NATIVE:
        native_library_path()  # raises if the library is missing, without which nothing can be verified
    checkpoint, data = load(source, target.image_size)
    model, network = build_and_lower(checkpoint, data)
    # The data first: without it the model could not be verified, and should not be written.
    split = verification_images(data, network.class_names, source.overrides)
    name = "native.onnx" if target.form is Form.NATIVE else "model.onnx"
    path = target.onnx or Path(checkpoint.source).with_name(name)
    return write_verified(model, network, split, data, path, target)


def write_verified(
    model: BNext, network: IntegerNetwork, split: Split, data: Data, path: Path, target: Target
) -> Exported:
    """Write the integers of a network as ONNX, unless the file does not compute what the network does.

    Args:
        model: the fake-quantized network.
        network: its integers.
        split: images to compare the file on.
        data: how they are preprocessed.
        path: file to write.
        target: its form and its input; a file for the integer network, too.

    Raises:
        QatError: a file can't be written.
    """

    def check(candidate: Path) -> Exported:
        comparison = compare(predictor(model), OnnxModel(candidate), network, split, data)
        images = sample(split, data.image_size)
        return Exported(path, network, comparison, check_exactness(candidate, network, images))

    if target.form is Form.NATIVE:
        graph = emit_native(network, input_kind=target.input_kind)
    else:
        graph = emit_portable(network, input_kind=target.input_kind, strict=target.form is Form.STRICT)
    if target.network is None:
        return _write_if_good(path, graph, check)
    with _unverified(target.network, partial(save_network, network)):
        exported = _write_if_good(path, graph, check)
        if not exported.problems():
            save_network(network, target.network)
    return exported


def export_float32(source: Source, target: Target, warn: Callable[[str], None]) -> tuple[Path, Comparison]:
    """Export the float32 network of a checkpoint: the baseline that integer exports are measured against.

    Args:
        source: where the checkpoint and its data are.
        target: what to write; only ``onnx`` and ``image_size`` are used.
        warn: called with a sentence if the network is not binary yet.

    Returns:
        The file, which is written only if no bound is broken, and its comparison with the network.

    Raises:
        QatError: there is no checkpoint, a value of it is not finite, or its data is missing.
    """
    checkpoint, data = load(source, target.image_size)
    network = float_network(checkpoint)
    if not is_binary(network):
        warn(
            f"{checkpoint.source}: the weights in use are not binary: the temperature is "
            f"{highest_temperature(network):.3g}, binary means below 1e-7"
        )
    names = class_names(checkpoint) or tuple(map(str, range(network.architecture.num_classes)))
    split = verification_images(data, names, source.overrides)
    path = target.onnx or Path(checkpoint.source).with_name("float32.onnx")
    return path, write_verified_float(build(checkpoint), network, checkpoint, split, data, path)


def write_verified_float(
    model: BNext, network: BNext, checkpoint: Checkpoint, split: Split, data: Data, path: Path
) -> Comparison:
    """Write a network's float32 layers as ONNX, unless the file does not compute what the network does.

    Args:
        model: the network, fake-quantized or not.
        network: the same without quantizers.
        checkpoint: what is known about it.
        split: images to compare the file on.
        data: how they are preprocessed.
        path: file to write.

    Raises:
        QatError: a value is not finite, or the file can't be written.
    """
    graph = emit_float(
        model,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        class_names=class_names(checkpoint),
        metadata=facts(checkpoint, data.image_size, as_float=True),
    )

    def check(candidate: Path) -> Comparison:
        return compare(predictor(network), OnnxModel(candidate), None, split, data)

    return _write_if_good(path, graph, check)


def _write_if_good(path: Path, graph: onnx.ModelProto, check: Callable[[Path], Result]) -> Result:
    """Check ``graph`` as a temporary file, then write ``path`` only if the check finds no problem.

    So a model that fails does not replace an earlier one that was good.
    """
    content = graph.SerializeToString(deterministic=True)
    with _unverified(path, lambda candidate: write_atomically(candidate, content)) as candidate:
        result = check(candidate)
        if not result.problems():
            write_atomically(path, content)
    return result


@contextmanager
def _unverified(path: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    """Write a temporary file beside ``path`` and delete it when the block ends; yields its path.

    Raises:
        OutputError: it can't be written, and so neither can ``path``: found out before the long part starts.
    """
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder")
    candidate = path.with_name(f".{path.stem}.unverified{path.suffix}")
    try:
        write(candidate)
    except OutputError as error:  # name the file that the user asked for, not the temporary one
        raise OutputError(str(error).replace(str(candidate), str(path))) from error
    try:
        yield candidate
    finally:
        candidate.unlink(missing_ok=True)


def _require_network_file(path: Path) -> None:
    """Refuse to replace a file that is no integer network, such as a checkpoint: both end in .safetensors."""
    if not path.is_file():
        return
    try:
        load_network(path)
    except CheckpointError as error:
        raise OutputError(f"{path}: not replaced: it is no integer network that qat export wrote") from error
