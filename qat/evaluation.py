"""Accuracy of anything that maps images to logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.data.augment import normalize
from qat.data.split import Split
from qat.quantize.constant_cache import keeping_constants
from qat.recipe.schema import Data
from qat.system.collectives import rows_of_all
from qat.system.launch import WHOLE

#: Maps images (N, 3, H, W) to logits (N, classes). It is given normalized float32 images, unless it has a
#: true attribute ``takes_pixels``: then it normalizes by itself, and is given the raw uint8 pixels.
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Result of an evaluation.

    Attributes:
        top1, top5: percent of the images whose true class is ranked first, or among the first five.
        n: number of images.
        loss: mean cross-entropy, in nats.
    """

    top1: float
    top5: float
    n: int
    loss: float

    def to_json(self) -> str:
        """A JSON object with ``top1``, ``top5``, ``n`` and ``loss``. A loss that is not finite is null."""
        return json.dumps(asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None})


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes are ranked before the true one: 0 where top-1 is right, below 5 where top-5 is right.

    Equal logits, which are common in quantized networks, are ranked by class index: the lower one is first.
    An image with a NaN among its logits gets the largest int64 as its rank, and so counts as wrong for every
    ``k``.

    Args:
        logits: (N, classes).
        labels: int64 (N,).

    Returns:
        int64 (N,).
    """
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=labels.device) < labels[:, None]
    before = ((logits > own) | ((logits == own) & lower)).sum(1)
    return before.masked_fill(logits.isnan().any(1), torch.iinfo(torch.int64).max)


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> int:
    """How many rows of ``logits`` (N, classes) have their label among the top ``k``; see :func:`ranks`."""
    return int((ranks(logits, labels) < k).sum())


def percent(share: float, digits: int = 2) -> str:
    """A percentage as text, such as ``99.87 %``. It is never rounded up to 100: 99.999 becomes ``99.99 %``.

    Args:
        share: in percent.
        digits: digits behind the point.
    """
    text = f"{share:.{digits}f}"
    if share < 100 and float(text) >= 100:
        text = f"99.{'9' * digits}".rstrip(".")
    return f"{text} %"


def points(change: float) -> str:
    """A change in percentage points as text with its sign: ``+0.28``, ``−0.28``, ``0.00``."""
    text = f"{change:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def input_for(predict: Predict, images: Tensor, data: Data) -> Tensor:
    """The input of ``predict`` for uint8 images (N, 3, H, W): normalized float32, or the images themselves.

    ``predict`` is given the images themselves if it has a true attribute ``takes_pixels``.
    """
    if getattr(predict, "takes_pixels", False):
        return images
    return normalize(images, data.mean, data.std)


def collect_logits(
    predict: Predict,
    split: Split,
    data: Data,
    device: torch.device | str = "cpu",
    before_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits (N, classes) of every image of ``split`` in its fixed order, as float32 on the CPU.

    Several processes, each with its ``share`` of the split, divide the images between them. Every image is
    computed once, and all processes get the logits of all images.

    Args:
        predict: must not change the network that it calls, since integer constants of networks are computed
            once for all batches.
        split: the images.
        data: says how images are normalized, and how many are in a batch.
        device: where images are moved before ``predict`` is called.
        before_batch: called before each batch, in every process. It must not change a network either.
    """
    rows = []
    with keeping_constants():
        for images, _ in split.batches(data.eval_batch_size):
            before_batch()
            # A process that has no image of this batch contributes no logits. It doesn't know the number of
            # classes either, which `rows_of_all` takes from the other processes.
            logits = (
                predict(input_for(predict, images.to(device), data)) if len(images) else torch.empty(0, 0)
            )
            logits = logits.float().cpu()
            rows.append(logits if split.share == WHOLE else rows_of_all(logits))
    return torch.cat(rows)


def accuracy_of(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of float32 logits (N, classes) against int64 labels (N,)."""
    n = len(labels)
    return Accuracy(
        top1=100.0 * correct_in_top(logits, labels, 1) / n,
        top5=100.0 * correct_in_top(logits, labels, 5) / n,
        n=n,
        loss=float(F.cross_entropy(logits, labels)),
    )


def evaluate(
    predict: Predict,
    split: Split,
    data: Data,
    device: torch.device | str = "cpu",
    before_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Accuracy of ``predict`` on ``split``. The arguments are those of :func:`collect_logits`."""
    return accuracy_of(collect_logits(predict, split, data, device, before_batch), split.labels)


def predictor(model: nn.Module) -> Predict:
    """A function that calls ``model`` in evaluation mode without gradients.

    After each call ``model`` is back in the mode that it was in before.
    """

    def predict(images: Tensor) -> Tensor:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                logits: Tensor = model(images)
        finally:
            model.train(was_training)
        return logits

    return predict
