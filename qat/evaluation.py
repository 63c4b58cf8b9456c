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

#: Images (N, 3, H, W) → logits (N, classes). The images are normalized float32; a callable with a true
#: attribute ``takes_pixels`` normalizes by itself and is given the raw uint8 pixels.
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Accuracy:
    """Result of an evaluation.

    Attributes:
        top1, top5: percent of images whose class is the first, or among the first five.
        n: images.
        loss: mean cross-entropy, in nats.
    """

    top1: float
    top5: float
    n: int
    loss: float

    def to_json(self) -> str:
        """One JSON object with ``top1``, ``top5``, ``n`` and ``loss``; a loss that is not finite is null."""
        return json.dumps(asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None})


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the label, int64 (N,): 0 where top-1 is right, below 5 for top-5.

    Of equal logits, which quantized networks have, the lower class stands first. With a NaN among the logits
    of an image its rank is beyond every number of classes: such an answer is wrong.

    Args:
        logits: (N, classes).
        labels: int64 (N,).
    """
    own = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=labels.device) < labels[:, None]
    before = ((logits > own) | ((logits == own) & lower)).sum(1)
    return before.masked_fill(logits.isnan().any(1), torch.iinfo(torch.int64).max)


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> int:
    """Number of rows of ``logits`` (N, classes) whose label is among the ``k`` largest, see :func:`ranks`."""
    return int((ranks(logits, labels) < k).sum())


def percent(share: float, digits: int = 2) -> str:
    """A share in percent as text, such as ``99.87 %``: only what is 100 or more is shown as 100."""
    text = f"{share:.{digits}f}"
    if share < 100 and float(text) >= 100:
        text = f"99.{'9' * digits}".rstrip(".")
    return f"{text} %"


def points(change: float) -> str:
    """A change in percentage points as text with its sign: ``+0.28``, ``−0.28``, ``0.00``."""
    text = f"{change:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def input_for(predict: Predict, images: Tensor, data: Data) -> Tensor:
    """What ``predict`` takes of the uint8 images (N, 3, H, W) of a split: them, or normalized float32."""
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
    """Logits (N, classes) float32 of every image of ``split`` in its fixed order, on the CPU.

    Where processes have a ``share`` of the split each, each computes its images, every one of them once, and
    is sent the others' answers. ``before_batch`` is called by all of them alike; neither it nor ``predict``
    changes a network.
    """
    rows = []
    with keeping_constants():
        for images, _ in split.batches(data.eval_batch_size):
            before_batch()
            # Without an image of its own it has nothing to say, whatever the number of classes.
            logits = (
                predict(input_for(predict, images.to(device), data)) if len(images) else torch.empty(0, 0)
            )
            logits = logits.float().cpu()
            rows.append(logits if split.share == WHOLE else rows_of_all(logits))
    return torch.cat(rows)


def accuracy_of(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of logits (N, classes) against labels (N,)."""
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
    """Accuracy of ``predict`` on ``split``, preprocessed as ``data`` says; see :func:`collect_logits`."""
    return accuracy_of(collect_logits(predict, split, data, device, before_batch), split.labels)


def predictor(model: nn.Module) -> Predict:
    """``model`` in evaluation mode without gradients; its mode is restored after each batch."""

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
