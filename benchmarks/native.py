"""Compare the speed of native binary convolutions with that of float32 convolutions, shape by shape.

    python -m benchmarks.native [--threads N] [--repeats N] [--side PIXELS]

For each convolution of BNext-Tiny, onnxruntime's Conv in float32 is compared with the operator BinaryConv,
which also packs its input, requantizes, applies PReLU and computes the sums for the attention. Each is a
model of one node; they run by turns, and times are medians. Bytes are those of input, weights and result. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from qat_export.bench.measurement import alternate
from qat_export.graphs.native import DOMAIN_VERSION
from qat_export.nativelibrary import DOMAIN
from qat_export.verify.sessions import create_session

from qat.models.bnext import WIDTHS
from qat.native.library import kernels_in_use

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """A binary convolution with ``channels`` input and output channels, on images of ``side`` pixels."""

    channels: int
    kernel: int
    stride: int
    side: int

    @property
    def out_side(self) -> int:
        """Side of the result in pixels."""
        return -(-self.side // self.stride)

    @property
    def products(self) -> int:
        """Number of multiplications for one image."""
        return self.channels**2 * self.kernel**2 * self.out_side**2

    @property
    def bytes(self) -> int:
        """Bytes of int8 input and result, and of binary weights."""
        pixels = self.side**2 + self.out_side**2
        return self.channels * pixels + self.channels**2 * self.kernel**2 // 8

    def __str__(self) -> str:
        """The shape as text for a table."""
        stride = ", stride 2" if self.stride == 2 else ""
        return f"{self.kernel}×{self.kernel}{stride}, {self.channels} channels, {self.side}×{self.side}"


def shapes(side: int) -> Iterator[Shape]:
    """The distinct convolutions of BNext-Tiny on images of ``side`` pixels, with a stem of stride 2."""
    side = -(-side // 2)
    seen: set[Shape] = set()
    for block, (before, after) in enumerate(pairwise(WIDTHS["tiny"])):
        stride = 2 if block > 0 and after != before else 1
        spatial = Shape(before, 3, stride, side)
        side = spatial.out_side
        for shape in (spatial, Shape(before, 1, 1, side)):
            if shape not in seen:
                seen.add(shape)
                yield shape


def model(nodes: Sequence[onnx.NodeProto], x: int, y: int, constants: dict[str, Array]) -> bytes:
    """A serialized model of ``nodes``, from input ``x`` to output ``y``, whose element types are given."""
    graph = helper.make_graph(
        list(nodes),
        "one",
        [helper.make_tensor_value_info("x", x, [None] * 4)],
        [helper.make_tensor_value_info("y", y, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 13), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    content: bytes = helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString()
    return content


def float_model(shape: Shape, rng: np.random.Generator) -> bytes:
    """A model of one Conv in float32, with weights ±1."""
    size = (shape.channels, shape.channels, shape.kernel, shape.kernel)
    weight = rng.choice(np.array([-1, 1], np.float32), size)
    pads = [shape.kernel // 2] * 4
    node = helper.make_node("Conv", ["x", "weight"], ["y"], strides=[shape.stride] * 2, pads=pads)
    return model([node], TensorProto.FLOAT, TensorProto.FLOAT, {"weight": weight})


def binary_model(shape: Shape, rng: np.random.Generator) -> bytes:
    """A model of one BinaryConv, with everything that it does in a network."""
    channels, kernel = shape.channels, shape.kernel
    constants: dict[str, Array] = {
        "weight": rng.integers(0, 256, (channels, kernel, kernel, channels // 8), np.uint8),
        "threshold": rng.integers(-20, 20, channels, np.int16),
        "bias": rng.integers(-1000, 1000, channels, np.int32),
        "multiplier": np.full(channels, 1 / (64 * kernel * np.sqrt(channels)), np.float32),
        "slopes": rng.integers(0, 64, channels, np.int8),
    }
    node = helper.make_node(
        "BinaryConv",
        ["x", *constants],
        ["y", "y_sum", "x_sum"],
        domain=DOMAIN,
        stride=shape.stride,
        low=-128,
        high=127,
        slope_shift=7,
    )
    return model([node], TensorProto.INT8, TensorProto.INT8, constants)


def session(content: bytes, threads: int) -> ort.InferenceSession:
    """A session with the options of `qat bench`."""

    def options() -> ort.SessionOptions:
        chosen = ort.SessionOptions()
        chosen.intra_op_num_threads = threads
        chosen.log_severity_level = 3
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
        return chosen

    return create_session(content, options)


def measure(shape: Shape, threads: int, repeats: int) -> dict[str, Any]:
    """Median times of both models in milliseconds, and figures computed from them."""
    rng = np.random.default_rng(0)
    images = rng.integers(-128, 128, (1, shape.side, shape.side, shape.channels), np.int8)
    floats = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    runs = [
        partial(session(float_model(shape, rng), threads).run, ["y"], {"x": floats}),
        partial(session(binary_model(shape, rng), threads).run, ["y"], {"x": images}),
    ]
    float_seconds, seconds = map(statistics.median, alternate(runs, repeats))
    return asdict(shape) | {
        "float32_ms": 1e3 * float_seconds,
        "native_ms": 1e3 * seconds,
        "ratio": float_seconds / seconds,
        "giga_products_per_second": shape.products / seconds / 1e9,
        "gigabytes_per_second": shape.bytes / seconds / 1e9,
    }


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description="Native binary convolutions against float32 ones.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--side", type=int, default=224, help="of the network's images, in pixels")
    arguments = parser.parse_args()
    print(f"kernels: {kernels_in_use()}, threads: {arguments.threads}")
    print(f"{'convolution':42}{'float32 ms':>11}{'native ms':>10}{'ratio':>7}{'G products/s':>14}{'GB/s':>7}")
    results = []
    for shape in shapes(arguments.side):
        found = measure(shape, arguments.threads, arguments.repeats)
        results.append(found)
        print(
            f"{shape!s:42}{found['float32_ms']:11.3f}{found['native_ms']:10.3f}{found['ratio']:7.1f}"
            f"{found['giga_products_per_second']:14.0f}{found['gigabytes_per_second']:7.1f}"
        )
    facts = {"kernels": kernels_in_use(), "threads": arguments.threads, "shapes": results}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
