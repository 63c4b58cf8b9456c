"""Runs exported models in onnxruntime and compares them with the network and the specification."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from export.integer import IntegerNetwork
from export.portable import INPUT, OUTPUT
from export.reference import Interpreter
from qat.data import Split, normalize
from qat.errors import CheckpointError, DataError, VerificationError
from qat.evaluate import Predict, accuracy_of, collect_logits
from qat.recipe import Data

#: Bounds that a freshly exported model must keep against the fake-quantized network: share of images with
#: the same top-1 (percent), and root mean square of the logits' difference over that of the logits. In
#: evaluation mode the network computes the integers that it exports, so both are exact on a machine whose
#: integer kernels are; what is allowed here is less than any wrong constant causes.
TOP1_AGREEMENT: Final = 99.9
LOGIT_DIFFERENCE: Final = 1e-3
#: Most images compared with the interpreter, which is much slower than onnxruntime; of larger ones, fewer.
REFERENCE_IMAGES: Final = 32


class OnnxModel:
    """An exported model, loaded into onnxruntime on the CPU.

    Attributes:
        metadata: the model's metadata properties.
        image_size: side of its input in pixels.
        num_classes: width of its logits.

    Raises:
        CheckpointError: absent, damaged, or not a model that this project exported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exception classes share no base of their own
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: not a model that onnxruntime can load: {reason}") from error
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        ours = [value.name for value in inputs] == [INPUT] and [value.name for value in outputs] == [OUTPUT]
        if not ours or not self.metadata.get("format", "").startswith("bnext-qat"):
            raise CheckpointError(
                f"{path}: not exported by this tool: expected input {INPUT!r}, output {OUTPUT!r} and "
                f"metadata 'format', found inputs {[value.name for value in inputs]}"
            )
        shapes = list(inputs[0].shape), list(outputs[0].shape)
        if [len(shape) for shape in shapes] != [4, 2] or not all(
            isinstance(shape[-1], int) for shape in shapes
        ):
            raise CheckpointError(f"{path}: input {shapes[0]} and output {shapes[1]} have no fixed sizes")
        self.image_size, self.num_classes = shapes[0][-1], shapes[1][-1]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalized float32 images (N, 3, S, S) → logits (N, classes)."""
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: array})[0])

    def check_data(self, data: Data) -> None:
        """Refuse data of another size or normalization than the model's.

        Raises:
            DataError: naming the key that differs.
        """
        if data.image_size != self.image_size:
            raise DataError(
                f"data.image_size is {data.image_size}, {self.path} takes "
                f"{self.image_size}×{self.image_size} pixels"
            )
        try:
            normalization = json.loads(self.metadata["normalization"])
            theirs = {key: tuple(float(value) for value in normalization[key]) for key in ("mean", "std")}
            if {len(values) for values in theirs.values()} != {3}:
                raise ValueError("not one value per channel")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: metadata 'normalization' is missing or damaged") from error
        for key, ours in (("mean", data.mean), ("std", data.std)):
            if not np.allclose(ours, theirs[key], atol=1e-6):
                raise DataError(f"data.{key} is {list(ours)}, {self.path} was made for {list(theirs[key])}")


@dataclass(frozen=True)
class Comparison:
    """An exported model against the network it came from, on one data set.

    Attributes:
        n: images.
        network_top1, model_top1: percent of the images each gets right.
        agreement: percent of the images on which both name the same class.
        largest, rms: largest absolute, and root mean square difference of the logits.
        relative: ``rms`` over the root mean square of the network's logits.
        reference_n: images also given to the interpreter.
        reference_equal: percent of their logits that equal the interpreter's, bit for bit.
    """

    n: int
    network_top1: float
    model_top1: float
    agreement: float
    largest: float
    rms: float
    relative: float
    reference_n: int
    reference_equal: float

    def rows(self) -> list[tuple[str, str, str]]:
        """Table for people: what, value, bound."""
        return [
            ("images", f"{self.n}", ""),
            ("top-1, fake-quantized network", f"{self.network_top1:.2f} %", ""),
            ("top-1, ONNX model", f"{self.model_top1:.2f} %", ""),
            ("same top-1", f"{self.agreement:.2f} %", f"≥ {TOP1_AGREEMENT:g} %"),
            ("logit difference, largest", f"{self.largest:.4g}", ""),
            ("logit difference, RMS", f"{self.rms:.4g}", ""),
            (
                "logit difference, RMS relative",
                f"{100 * self.relative:.3g} %",
                f"≤ {100 * LOGIT_DIFFERENCE:g} %",
            ),
            (
                f"logits equal to the reference ({self.reference_n} images)",
                f"{self.reference_equal:.2f} %",
                "100 %",
            ),
        ]

    def problems(self) -> list[str]:
        """Each bound that is broken, in words."""
        problems = []
        if not self.agreement >= TOP1_AGREEMENT:
            problems.append(
                f"top-1 agrees on {self.agreement:.2f}% of the images, at least {TOP1_AGREEMENT:g}% expected"
            )
        if not self.relative <= LOGIT_DIFFERENCE:
            problems.append(
                f"logits differ by {100 * self.relative:.3g}% RMS, "
                f"at most {100 * LOGIT_DIFFERENCE:g}% expected"
            )
        if not self.reference_equal >= 100.0:
            problems.append(f"only {self.reference_equal:.2f}% of the logits equal the integer reference")
        return problems

    def require(self) -> None:
        """Raise where a bound is broken.

        Raises:
            VerificationError: naming each broken bound.
        """
        if problems := self.problems():
            raise VerificationError("the exported model does not match: " + "; ".join(problems))


def compare(
    predict: Predict, model: OnnxModel, network: IntegerNetwork, split: Split, data: Data
) -> Comparison:
    """Compare an exported ``model`` with the torch network ``predict`` and with the lowered ``network``."""
    ours = collect_logits(predict, split, data)
    theirs = collect_logits(model, split, data)
    count = min(max(REFERENCE_IMAGES * 32**2 // data.image_size**2, 2), REFERENCE_IMAGES, len(split))
    images, _ = next(iter(split.batches(count)))
    specified = Interpreter(network)(normalize(images, data.mean, data.std).numpy())
    found = theirs[: len(specified)].numpy()
    difference = (ours - theirs).double()
    rms = float(difference.square().mean().sqrt())
    scale = float(ours.double().square().mean().sqrt())
    return Comparison(
        n=len(split),
        network_top1=accuracy_of(ours, split.labels).top1,
        model_top1=accuracy_of(theirs, split.labels).top1,
        agreement=100.0 * float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        largest=float(difference.abs().max()),
        rms=rms,
        relative=rms / scale if scale else rms,
        reference_n=len(specified),
        reference_equal=100.0 * float((found == specified).mean()),
    )
