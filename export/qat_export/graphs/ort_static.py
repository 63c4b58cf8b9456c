"""The float32 model quantized by onnxruntime's ``quantize_static``: the strongest baseline for exports.

The settings are the fastest that were found for BNext: QDQ format, uint8 activations, weights of 7 bits with
a scale per channel, and only convolutions and matrix products quantized. If sums, products and concatenations
are quantized too, the added conversions cost more than is saved. ``quant_pre_process`` is not used, since it
folds batch normalizations, after which onnxruntime runs PReLU and means in a slower layout.
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

#: Metadata property ``format`` of the result. To this project it is a float model: it has no integer network.
FORMAT: Final = "bnext-qat float32 quantized by onnxruntime"
OPERATORS: Final = ("Conv", "Gemm", "MatMul")


def quantize_static(source: Path, target: Path, images: NDArray[np.float32]) -> None:
    """Write the statically quantized model of a float32 model.

    This runs in a child process, since onnxruntime prints, warns, and needs several times the memory of the
    model.

    Args:
        source: float32 model with one input.
        target: file to write.
        images: images (N, 3, S, S) for calibration; they are fed one by one.

    Raises:
        QuantizationError: onnxruntime failed, or ran out of memory.
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
    """Entry point of the child process: quantize the model ``request["source"]``."""
    from onnxruntime import quantization  # imported in the child only, since it imports many modules

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self, name: str, images: NDArray[np.float32]) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter([{name: image[None]} for image in images])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    model = onnx.load(request["source"])
    name = model.graph.input[0].name
    set_format(model, FORMAT)
    # onnxruntime writes a file beside the one that it reads: give it a copy in the target's folder.
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
        # Weights of 7 bits. On processors without VNNI, onnxruntime adds two products in 16 bits, in which
        # 255 · 127 · 2 saturates, so that weights of 8 bits gave other answers there. 7 bits take the same
        # time (docs/LOG.md, 2026-11-23).
        reduce_range=True,
        op_types_to_quantize=list(OPERATORS),
    )


def set_format(model: onnx.ModelProto, text: str) -> None:
    """Replace the metadata property ``format``, in place."""
    properties = {prop.key: prop.value for prop in model.metadata_props} | {"format": text}
    onnx.helper.set_model_props(model, properties)
