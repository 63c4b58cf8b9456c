"""onnxruntime's own ``quantize_static`` on a float32 model: the strongest baseline an integer export has.

The settings are the fastest of those tried on BNext: QDQ, uint8 activations, weights of 7 bits per channel,
and convolutions and matrix products alone. Quantizing sums, products and concatenations too adds conversions
that cost more than they save, and ``quant_pre_process`` folds batch normalizations, after which onnxruntime
moves PReLU and means into a slower layout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from qat.errors import QuantizationError
from qat.system.child_process import ChildFailedError, run_isolated
from qat.system.files import write_atomically

#: Metadata ``format`` of the result. Its integers are onnxruntime's, so for this project it is a float model.
FORMAT: Final = "bnext-qat float32 quantized by onnxruntime"
OPERATORS: Final = ("Conv", "Gemm", "MatMul")


def quantize_static(source: Path, target: Path, images: NDArray[np.float32]) -> None:
    """Write the statically quantized model of a float32 model.

    The work is done in a process of its own: it prints, warns, and needs several times the model's size.

    Args:
        source: float32 model with one input.
        target: file to write.
        images: what its ranges are taken from, (N, 3, S, S); they are fed one by one.

    Raises:
        QuantizationError: onnxruntime refused, or ran out of memory.
        OutputError: ``target`` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="qat-") as folder:
        result, samples = Path(folder) / "result.onnx", Path(folder) / "images.npy"
        np.save(samples, images)
        request = {"source": str(source.resolve()), "target": str(result), "images": str(samples)}
        try:
            run_isolated(__name__, request)
        except ChildFailedError as error:
            raise QuantizationError(f"{source}: onnxruntime's quantize_static failed: {error}") from error
        write_atomically(target, result.read_bytes())


def main(request: dict[str, Any]) -> None:
    """What the child process does: quantize ``request["source"]``."""
    from onnxruntime import quantization  # loaded in the child alone: it pulls in much

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self, name: str, images: NDArray[np.float32]) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter([{name: image[None]} for image in images])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    model = onnx.load(request["source"])
    name = model.graph.input[0].name
    set_format(model, FORMAT)
    # onnxruntime writes its inferred shapes beside the file it reads.
    copy = Path(request["target"]).with_name("float32.onnx")
    onnx.save(model, copy)
    del model
    quantization.quantize_static(
        copy,
        request["target"],
        Images(name, np.load(request["images"])),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # Without VNNI onnxruntime adds two products in 16 bits, where 255 · 127 · 2 saturates: with 8 bits
        # the model answered otherwise there. 7 bits take the same time (docs/LOG.md, 2026-11-23).
        reduce_range=True,
        op_types_to_quantize=list(OPERATORS),
    )


def set_format(model: onnx.ModelProto, text: str) -> None:
    """Replace the metadata property ``format``, in place."""
    properties = {prop.key: prop.value for prop in model.metadata_props} | {"format": text}
    onnx.helper.set_model_props(model, properties)
