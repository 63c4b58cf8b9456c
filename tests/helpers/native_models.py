"""Models of one native operator, run by onnxruntime. Knows no torch, so that a sanitizer build can use it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from qat_export.nativelibrary import DOMAIN, register

from qat.errors import NativeLibraryError
from qat.native.library import available_kernels

Array = NDArray[Any]
INT8, INT32 = TensorProto.INT8, TensorProto.INT32
#: Outputs of each operator, in order.
OUTPUTS = {
    "BinaryConv": {"y": INT8, "y_sum": INT32, "x_sum": INT32},
    "ChannelAttention": {"gain": INT8},
    "TrunkUpdate": {"out": INT8},
    "Stem": {"out": INT8},
    "ChannelSums": {"sums": INT32},
}


def _kernels() -> tuple[str, ...]:
    try:
        return available_kernels()
    except NativeLibraryError:
        if os.environ.get("BNEXT_QAT_NATIVE") == "require":
            raise
        return ()


#: Every set that runs here, best first; none where the library was not built.
KERNELS = _kernels()
needs_library = pytest.mark.skipif(not KERNELS, reason="the native operators are not built here: make native")


@dataclass(frozen=True)
class Fed:
    """An input that is fed when the model runs; all others are constants."""

    value: Array


@dataclass
class Node:
    """One operator: inputs in order (an array is a constant, ``None`` is absent) and attributes."""

    operator: str
    inputs: list[Fed | Array | None]
    attributes: dict[str, int | float] = field(default_factory=dict)

    def feeds(self) -> dict[str, Array]:
        """What `session` has to be run with."""
        return {f"i{i}": x.value for i, x in enumerate(self.inputs) if isinstance(x, Fed)}

    def model(self, outputs: Sequence[str] | None = None) -> bytes:
        """The model with the outputs of these names, or all."""
        known = OUTPUTS[self.operator]
        wanted = list(known) if outputs is None else list(outputs)
        names = [name if name in wanted else "" for name in known]
        while not names[-1]:
            names.pop()
        inputs = ["" if x is None else f"i{i}" for i, x in enumerate(self.inputs)]
        graph = helper.make_graph(
            [helper.make_node(self.operator, inputs, names, domain=DOMAIN, **self.attributes)],
            "node",
            [
                # No shape: what arrives is for the operator to check.
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
                for name, value in self.feeds().items()
            ],
            [helper.make_tensor_value_info(name, known[name], None) for name in names if name],
            [
                numpy_helper.from_array(x, f"i{i}")
                for i, x in enumerate(self.inputs)
                if x is not None and not isinstance(x, Fed)
            ],
        )
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid(DOMAIN, 1)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        data: bytes = model.SerializeToString()
        return data

    def session(self, threads: int = 1, outputs: Sequence[str] | None = None) -> ort.InferenceSession:
        """A session of the model, with the kernels that BNEXT_QAT_KERNELS names now."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # refusals are raised as well as logged
        register(options)
        return ort.InferenceSession(self.model(outputs), options, providers=["CPUExecutionProvider"])

    def run(self, threads: int = 1, outputs: Sequence[str] | None = None) -> list[Array]:
        """The outputs."""
        results: list[Array] = self.session(threads, outputs).run(None, self.feeds())
        return results


def pack(weight: Array) -> Array:
    """Weights of ±1 (O, I, k, k) as the operator takes them: (O, k, k, ceil(I / 8)) uint8."""
    return np.packbits(weight.transpose(0, 2, 3, 1) > 0, axis=-1, bitorder="little")


def channels_last(x: Array) -> Array:
    """(N, C, H, W) → (N, H, W, C), contiguous."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def channels_first(x: Array) -> Array:
    """(N, H, W, C) → (N, C, H, W)."""
    return x.transpose(0, 3, 1, 2)
