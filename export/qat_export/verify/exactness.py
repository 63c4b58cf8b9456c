"""Compare every integer of an exported model with the interpreter's, tensor by tensor.

The model runs in onnxruntime with every named integer tensor as an additional output, without and with
optimizations. It runs once more for its logits alone, since additional outputs keep operators from being
fused. Integers must be equal as integers, logits bit for bit. The constants in the file are compared too
(:mod:`qat_export.verify.constants`).

The int32 sum of a binary convolution is not a tensor of the portable graph, since QLinearConv computes
``saturate(float32(sum + bias) * multiplier)`` in one operator. Two comparisons together show that the sum is
the interpreter's. For "binary sums", a ConvInteger is added beside each QLinearConv. It reads the signs and
unpacked weights of the graph, and must give the sums that the interpreter computes from the graph's own trunk
tensor; one wrong bit of a weight changes them by 2 products at nearly every pixel. For "binary convolutions",
the requantized results must equal those of the interpreter, which starts from the image.
(tests/export/verify/test_exactness.py also reads the sums out of QLinearConv itself.)
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.data.augment import normalize
from qat.data.split import Split
from qat.errors import CheckpointError, DataError
from qat.grid import Grid
from qat.quantize.dyadic import ACCUMULATOR_UNIT
from qat_export.graphs.metadata import OUTPUT, InputKind
from qat_export.integer.network import IntegerNetwork
from qat_export.integer.reference import Interpreter, convolve, signs
from qat_export.verify.agreement import REFERENCE_IMAGES, reference_count
from qat_export.verify.constants import compare_constants
from qat_export.verify.figures import Exactness, Optimizations, TensorExactness
from qat_export.verify.model import (
    OnnxModel,
    input_array,
    input_kind,
    normalization,
    open_session,
    require_integers,
    run_session,
    takes_pixels,
)
from qat_export.verify.probes import (
    inside_operators,
    integers,
    sub_block_inputs,
    tensor_names,
    with_outputs,
    with_sums,
)

__all__ = ["check_exactness", "sample"]

Array = NDArray[Any]
#: Number of pixels, over all images of a batch, whose tensors are in memory at the same time.
SLICE_PIXELS: Final = 32 * 32**2
#: Number of batches of each batch size except the largest, at which all images are run.
FEW_BATCHES: Final = 4
#: Number of images whose binary sums are compared.
SUM_IMAGES: Final = 2


def check_exactness(
    model: Path | onnx.ModelProto,
    network: IntegerNetwork,
    images: Tensor,
    *,
    batches: Sequence[int] = (1, 32),
) -> Exactness:
    """Compare every integer of ``model`` on ``images`` with the interpreter of ``network``.

    The interpreter takes seconds for a large image; :func:`sample` chooses a suitable number. At the largest
    batch size all images are run, at the others a few. When all tensors are compared, batches are limited by
    memory. When only the logits are, images are repeated until a batch is full.

    Args:
        model: an exported model, or its file.
        network: the integer network that it was exported from.
        images: (N, 3, S, S), raw uint8 pixels, or normalized float32 if the model takes those.
        batches: batch sizes to run.

    Raises:
        CheckpointError: the model is damaged, was not exported by this project, is a float export, or was
            made from another network.
        DataError: the images have another size than the model takes.
    """
    source: Path | str = "the model"
    if isinstance(model, Path):
        source, alone = model, OnnxModel(model).session
        try:
            model = onnx.load(source)
        except Exception as error:  # protobuf's own exception, which has no type annotations
            raise CheckpointError(f"{source}: not an ONNX model: {error}") from error
    else:
        alone = open_session(model.SerializeToString(), source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    _require_origin(metadata, network, source)
    kind = input_kind(metadata, source)
    _require_size(model, images, kind, source)
    floats = normalize(images, network.mean, network.std) if images.dtype == torch.uint8 else images
    fed = input_array(images if takes_pixels(kind) else floats, kind)
    check = _Check(model, source, network, floats.numpy(), fed)
    at_once = max(1, min(max(batches), SLICE_PIXELS // images[0, 0].numel(), len(images)))
    sizes = sorted({min(size, at_once) for size in batches})
    missing = check.sums(min(SUM_IMAGES, at_once))
    check.logits(alone, check.tensors(sizes), batches)
    absent = [*(name for name in network.grids if name not in check.names), *missing]
    inside = inside_operators(model, network)
    return Exactness(
        images=len(images),
        batches=tuple(sizes),
        logit_batches=tuple(sorted(set(batches))),
        tensors=(*compare_constants(model, network, kind, images.shape[2]), *check.figures.values()),
        missing=tuple(name for name in absent if name not in inside),
    )


def sample(split: Split, image_size: int, seed: int = 0) -> Tensor:
    """Images for :func:`check_exactness`: uint8 (N, 3, S, S).

    Half of them are from ``split``, the others are noise of random contrast and brightness. Their number is
    limited by the time of the interpreter: 32 up to 32×32 pixels, 2 at 224×224.
    """
    count = reference_count(image_size, REFERENCE_IMAGES)
    images, _ = next(iter(split.batches(-(-count // 2), shuffle_seed=seed)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count // 2, 3, image_size, image_size, generator=generator)
    contrast, brightness = torch.rand(2, count // 2, 1, 1, 1, generator=generator)
    noise = brightness + contrast * (noise - brightness)
    return torch.cat([images, (255 * noise).round().to(torch.uint8)])


def _require_origin(metadata: Mapping[str, str], network: IntegerNetwork, source: object) -> None:
    """Refuse a float export, and a model whose metadata show that it was not made from ``network``."""
    require_integers(metadata, source)
    images = normalization(metadata, source)
    try:
        grids = {name: Grid(**grid) for name, grid in json.loads(metadata["grids"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: metadata 'grids' is missing or damaged") from error
    pairs: list[tuple[str, object, object]] = [
        ("architecture", metadata.get("architecture"), network.architecture),
        ("mean", images["mean"], network.mean),
        ("std", images["std"], network.std),
        ("list of classes", metadata.get("class_names"), json.dumps(list(network.class_names))),
    ]
    named = dict.fromkeys((*network.grids, *grids))
    pairs += [(f"grid of {name!r}", grids.get(name), network.grids.get(name)) for name in named]
    for what, theirs, ours in pairs:
        if theirs != ours:
            its, given = (textwrap.shorten(str(value), 120, placeholder=" …") for value in (theirs, ours))
            raise CheckpointError(
                f"{source}: exported from another network: its {what} is {its}, the given network's {given}"
            )


def _require_size(model: onnx.ModelProto, images: Tensor, kind: InputKind, source: object) -> None:
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    side = dims[0] if kind == "uint8 NHWC" else dims[-1]
    if tuple(images.shape[1:]) != (3, side, side):
        raise DataError(
            f"{source}: takes 3×{side}×{side} images, given {'×'.join(map(str, images.shape[1:]))}"
        )


def _batches(count: int, size: int, *, few: bool = False) -> Iterator[slice]:
    """Slices that divide ``count`` images into batches of ``size``; with ``few``, only the first few."""
    end = min(count, FEW_BATCHES * size) if few else count
    return (slice(start, min(start + size, count)) for start in range(0, end, size))


class _Check:
    """Runs a model in every setting of onnxruntime, and counts differences from the interpreter.

    Attributes:
        names: name of a tensor in the network → its name in the graph.
        figures: the result of each tensor in each setting.
    """

    def __init__(
        self, model: onnx.ModelProto, source: object, network: IntegerNetwork, normalized: Array, fed: Array
    ) -> None:
        self.source, self.network = source, network
        self.normalized, self.fed = normalized, fed
        self.figures: dict[tuple[str, Optimizations], TensorExactness] = {}
        self.names = tensor_names(model, network)
        extended, self.sum_names = with_sums(model, network)
        content = with_outputs(extended, [*self.names.values(), *self.sum_names.values()]).SerializeToString()
        self.sessions: dict[Optimizations, ort.InferenceSession] = {
            "off": open_session(content, source, optimize=False),
            "on": open_session(content, source),
        }

    def add(self, name: str, setting: Optimizations, found: Array, expected: Array) -> None:
        """Compare one part of the tensor ``name``, and add it to the figures."""
        self.figures.setdefault((name, setting), TensorExactness(name, setting)).add(found, expected)

    def sums(self, count: int) -> list[str]:
        """Compare the sums of the binary convolutions on the first ``count`` images.

        Returns:
            Names of the sums for which the model has no tensor.
        """
        subs = [(sub, trunk) for sub, trunk in sub_block_inputs(self.network) if sub.name in self.sum_names]
        missing = {f"{sub.name}/sum" for sub in self.network.sub_blocks()}
        wanted = list(dict.fromkeys((*self.sum_names.values(), *(trunk for _, trunk in subs))))
        for setting, session in self.sessions.items() if subs else ():
            values = run_session(session, wanted, self.fed[:count], self.source)
            found = dict(zip(wanted, values, strict=True))
            for sub, trunk in subs:
                x = integers(found[trunk], self.network.grids[trunk])
                if x.ndim != 4 or x.shape[1] != sub.conv.channels:
                    continue
                name, sums = f"{sub.name}/sum", found[self.sum_names[sub.name]]
                expected = convolve(signs(x, sub.conv), sub.conv.weight(), sub.conv.stride)
                self.add(name, setting, sums, expected * ACCUMULATOR_UNIT)
                missing.discard(name)
        return sorted(missing)

    def tensors(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """Compare all other tensors in batches of ``sizes`` (ascending); returns the interpreter's logits."""
        interpreter, logits = Interpreter(self.network), []
        for images in _batches(len(self.fed), sizes[-1]):
            logits.append(interpreter(self.normalized[images]))
            expected = {OUTPUT: logits[-1], **{name: interpreter.tensors[name] for name in self.names}}
            fed = self.fed[images]
            for size in sizes if images.start == 0 else sizes[-1:]:
                for part in _batches(len(fed), size, few=size != sizes[-1]):
                    for setting, session in self.sessions.items():
                        self.compare(setting, session, fed[part], {k: v[part] for k, v in expected.items()})
        return np.concatenate(logits)

    def compare(
        self, setting: Optimizations, session: ort.InferenceSession, fed: Array, expected: Mapping[str, Array]
    ) -> None:
        """Run the batch ``fed``, and compare each tensor that is in ``expected``."""
        found = run_session(session, [self.names.get(name, name) for name in expected], fed, self.source)
        for (name, reference), values in zip(expected.items(), found, strict=True):
            grid = self.network.grids.get(name)
            self.add(name, setting, values if grid is None else integers(values, grid), reference)

    def logits(
        self, session: ort.InferenceSession, expected: NDArray[np.float32], sizes: Sequence[int]
    ) -> None:
        """Compare the logits of the unchanged model, in full batches of ``sizes``."""
        for size in sizes:
            for part in _batches(len(expected), size, few=size != max(sizes)):
                chosen = np.arange(part.start, part.start + size) % len(expected)
                (found,) = run_session(session, [OUTPUT], self.fed[chosen], self.source)
                self.add(OUTPUT, "on, logits alone", found, expected[chosen])
