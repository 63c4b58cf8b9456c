"""Compare the answers of an exported model and of the network it came from, on a whole data set.

:mod:`qat_export.verify.exactness` compares the model with the interpreter, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qat.data.augment import normalize
from qat.data.split import NoiseSplit, Split
from qat.errors import VerificationError
from qat.evaluation import Predict, accuracy_of, collect_logits, percent
from qat.recipe.schema import Data
from qat_export.integer.network import IntegerNetwork
from qat_export.integer.reference import Interpreter
from qat_export.verify.model import OnnxModel, require_integers

__all__ = ["Comparison", "compare", "reference_count"]

#: Bounds of the difference between an exported integer model and its fake-quantized network: smallest share
#: of images with the same top-1, in percent, and largest ratio of the root mean square of the logits'
#: difference to that of the logits. In evaluation mode the torch network computes the exported integers
#: itself, so both agree exactly wherever onnxruntime's kernels are exact. A wrong constant breaks the bounds.
TOP1_AGREEMENT: Final = 99.9
#: Smallest share of images with the same top-1 for a float export, in percent. onnxruntime adds floats in
#: another order than torch. Now and then this moves the input of a sign across 0, which changes the logits.
FLOAT_AGREEMENT: Final = 99.0
LOGIT_DIFFERENCE: Final = 1e-3
#: Largest number of images for the interpreter, which is much slower than onnxruntime.
REFERENCE_IMAGES: Final = 32


def reference_count(image_size: int, available: int) -> int:
    """Number of images for the interpreter: up to 32 of 32×32 pixels, fewer if they are larger.

    There are at least 2, and no more than ``available``.
    """
    return min(max(REFERENCE_IMAGES * 32**2 // image_size**2, 2), REFERENCE_IMAGES, available)


@dataclass(frozen=True)
class Comparison:
    """An exported model compared with the network it came from, on one data set.

    Attributes:
        n: number of images.
        network_top1, model_top1: percent of the images that each has right.
        agreement: percent of the images that both put into the same class.
        median, percentile_99, largest: median, 99th percentile and maximum of the absolute differences
            between the logits.
        rms: root mean square of the differences.
        relative: ``rms`` divided by the root mean square of the network's logits.
        reference_n: number of images on which the interpreter ran too; 0 for a float export.
        reference_equal: percent of the logits of these images that equal the interpreter's bit for bit.
        noise: whether the images are noise without a true class; both top-1 mean nothing then.
    """

    n: int
    network_top1: float
    model_top1: float
    agreement: float
    median: float
    percentile_99: float
    largest: float
    rms: float
    relative: float
    reference_n: int
    reference_equal: float
    noise: bool = False

    @property
    def title(self) -> str:
        """What the table is about."""
        where = "images of noise" if self.noise else "the whole test set"
        return f"Against the network, on {where}"

    @property
    def _least_agreement(self) -> float:
        return TOP1_AGREEMENT if self.reference_n else FLOAT_AGREEMENT

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of the printed table: description, value, bound."""
        accuracies = [
            ("top-1, torch network", f"{self.network_top1:.2f} %", ""),
            ("top-1, ONNX model", f"{self.model_top1:.2f} %", ""),
        ]
        rows = [
            ("images", f"{self.n}", ""),
            *([] if self.noise else accuracies),
            ("same top-1", percent(self.agreement), f"≥ {self._least_agreement:g} %"),
            ("logit difference, median", f"{self.median:.4g}", ""),
            ("logit difference, 99 % of the logits at most", f"{self.percentile_99:.4g}", ""),
            ("logit difference, largest", f"{self.largest:.4g}", ""),
            ("logit difference, RMS", f"{self.rms:.4g}", ""),
            (
                "logit difference, RMS relative",
                f"{100 * self.relative:.3g} %",
                f"≤ {100 * LOGIT_DIFFERENCE:g} %" if self.reference_n else "",
            ),
        ]
        if self.reference_n:
            name = f"logits equal to the reference ({self.reference_n} images)"
            rows.append((name, percent(self.reference_equal), "100 %"))
        return rows

    def problems(self) -> list[str]:
        """Each bound that is broken, in words."""
        problems = []
        if not self.agreement >= self._least_agreement:
            problems.append(
                f"top-1 agrees on {self.agreement:.2f}% of the images, "
                f"at least {self._least_agreement:g}% expected"
            )
        if not self.reference_n:
            return problems
        if not self.relative <= LOGIT_DIFFERENCE:
            problems.append(
                f"logits differ by {100 * self.relative:.3g}% RMS, "
                f"at most {100 * LOGIT_DIFFERENCE:g}% expected"
            )
        if not self.reference_equal >= 100.0:
            problems.append(f"only {self.reference_equal:.2f}% of the logits equal the integer reference")
        return problems

    def require(self) -> None:
        """Raise if a bound is broken.

        Raises:
            VerificationError: the message names each broken bound.
        """
        if problems := self.problems():
            raise VerificationError("the exported model does not match: " + "; ".join(problems))


def compare(
    predict: Predict, model: OnnxModel, network: IntegerNetwork | None, split: Split, data: Data
) -> Comparison:
    """Compare an exported ``model`` with the torch network ``predict`` and with the lowered ``network``.

    Args:
        predict: the torch network, a function from images (N, 3, S, S) to logits (N, classes).
        model: the exported model, of integers or of floats.
        network: its integer network; ``None`` for a float export.
        split: the test set.
        data: preprocessing and batch size.

    Raises:
        CheckpointError: a network is given, but the model is a float export; or the model can't be run.
    """
    if network is not None:
        require_integers(model.metadata, model.path)
    ours = collect_logits(predict, split, data)
    theirs = collect_logits(model, split, data)
    specified = np.empty((0, theirs.shape[1]), np.float32)
    if network is not None:
        images, _ = next(iter(split.batches(reference_count(data.image_size, len(split)))))
        specified = Interpreter(network)(normalize(images, data.mean, data.std).numpy())
    found = theirs[: len(specified)].numpy()
    difference = np.abs((ours - theirs).double().numpy())
    median, percentile_99, largest = np.quantile(difference, (0.5, 0.99, 1.0)).tolist()
    rms = float(np.sqrt(np.square(difference).mean()))
    scale = float(ours.double().square().mean().sqrt())
    return Comparison(
        n=len(split),
        network_top1=accuracy_of(ours, split.labels).top1,
        model_top1=accuracy_of(theirs, split.labels).top1,
        agreement=100.0 * float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        median=median,
        percentile_99=percentile_99,
        largest=largest,
        rms=rms,
        relative=rms / scale if scale else rms,
        reference_n=len(specified),
        reference_equal=100.0 * float((found == specified).mean()) if len(specified) else 100.0,
        noise=isinstance(split, NoiseSplit),
    )
