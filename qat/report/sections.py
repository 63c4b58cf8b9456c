"""The sections of the report on a run's results: accuracy, training, classes, changed images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from qat.evaluation import percent, points
from qat.gate.paired_statistics import Pairs, accuracy_interval, lower_bound, mcnemar_p, upper_bound
from qat.report.answers import Answers, ChangedImage
from qat.report.charts import Bar, Series, bar_chart, heat_map, line_chart
from qat.report.page import Figure, Table, number
from qat.report.svg import shortened
from qat.report.thumbnails import Thumbnail, thumbnails

#: Largest number of classes at which the confusion matrix is drawn.
_DRAWN: Final = 40
_PAIRS: Final = 20
_IMAGES: Final = 48
#: Largest size of all pictures together in bytes: half of the largest size of a report.
_PICTURES: Final = 1_000_000
#: Largest number of characters of a class name that are shown; it may be a folder's name of any length.
_NAME: Final = 60


def interval_text(correct: int, n: int) -> str:
    """The 95 % confidence interval of an accuracy, such as ``98.00 – 99.92 %``."""
    low, high = accuracy_interval(correct, n)
    return f"{100 * low:.2f}\u00a0–\u2060\u00a0{percent(100 * high)}".replace(" ", "\u00a0")


@lru_cache(maxsize=8)  # takes seconds for many images, and a report needs it twice
def change_interval(pairs: Pairs) -> tuple[float, float]:
    """The 95 % confidence interval of the change of top-1, as shares: two one-sided bounds of 97.5 %."""
    return lower_bound(pairs, 0.975), upper_bound(pairs, 0.975)


def verdict(answers: Answers, quantization: str | None) -> str:
    """The result of a run in one or two sentences.

    Args:
        answers: answers of the network, and of the one that training started from.
        quantization: name of the network's quantization, such as ``int8``; ``None`` for a float-rest network.
    """
    top1 = percent(100 * answers.correct / answers.n)
    images = f"{answers.n:,} test images"
    pairs = answers.pairs
    if quantization is None:
        return f"The binary network classifies {top1} of {images} correctly."
    if pairs is None:
        return (
            f"The {quantization} network classifies {top1} of {images} correctly. What it started from isn't "
            "there to compare it with."
        )
    assert answers.correct_before is not None
    before = percent(100 * answers.correct_before / answers.n)
    difference = points(100 * abs(pairs.change)).removeprefix("+")
    if pairs.lost == pairs.gained:
        opening = f"{quantization} is as accurate as float rest: both classify {top1} of {images} correctly."
    elif pairs.change < 0:
        opening = (
            f"{quantization} loses {difference} points of top-1 accuracy: {before} → {top1} of {images}."
        )
    else:
        opening = (
            f"{quantization} gains {difference} points of top-1 accuracy: {before} → {top1} of {images}."
        )
    low, high = (100 * bound for bound in change_interval(pairs))
    closing = f"With 95 % confidence, the true change lies between {points(low)} and {points(high)} points."
    if not answers.changes:
        return f"{opening} No image changed its class. {closing}"
    changed = (
        "1 image changed its class" if answers.changes == 1 else f"{answers.changes:,} images changed class"
    )
    return (
        f"{opening} {changed}: {pairs.gained:,} became right, {pairs.lost:,} became wrong"
        f"{_neither(answers.changes - pairs.discordant)}. {closing}"
    )


def _neither(count: int) -> str:
    return f", {count:,} {'is' if count == 1 else 'are'} wrong both times" if count else ""


def accuracy_figure(answers: Answers, summary: Mapping[str, Any], quantization: str | None) -> Figure:
    """A chart of top-1 at each stage with confidence intervals; ``quantization`` as for :func:`verdict`."""
    stages: list[tuple[str, int | None, str]] = []
    if quantization is not None:
        stages = [
            ("float rest, before quantization", answers.correct_before, "series-6"),
            (f"{quantization}, calibrated only", _calibrated(answers, summary), "series-2"),
        ]
    last = "binary" if quantization is None else f"{quantization}, fine-tuned"
    stages.append((last, answers.correct, "series-1"))
    bars = []
    for name, correct, colour in stages:
        if correct is not None:
            low, high = accuracy_interval(correct, answers.n)
            top1 = 100 * correct / answers.n
            bars.append(Bar(name, top1, percent(top1), colour, 100 * low, 100 * high))
    # The scale doesn't begin at 0, so that small differences show; the figure's note says so.
    least = min(bar.low for bar in bars if bar.low is not None)
    start = max(math.floor((least - 0.25 * (100 - least)) / 5) * 5, 0) if least > 50 else 0
    chart = bar_chart("Top-1 accuracy by stage", bars, x_label="top-1 (%)", start=start, end=100)
    note = f"Of {answers.n:,} test images. Whiskers: 95 % confidence (Clopper–Pearson)."
    return Figure("Top-1 accuracy", chart, note + (f" The scale begins at {start} %." if start else ""))


def comparison_table(answers: Answers, quantization: str | None) -> Table | None:
    """A table of how many images both, one or none of the two networks have right.

    ``None`` if the answers of the first network aren't known. ``quantization`` as for :func:`verdict`.
    """
    pairs = answers.pairs
    if pairs is None:
        return None
    rows = [
        ("right both times", answers.correct - pairs.gained),
        ("became right", pairs.gained),
        ("became wrong", pairs.lost),
        ("wrong both times", answers.n - answers.correct - pairs.lost),
    ]
    cells = [(name, f"{count:,}", percent(100 * count / answers.n)) for name, count in rows]
    chance = ("McNemar’s exact test", f"p = {mcnemar_p(pairs):.2g}", "")
    headings = ("test images", "count", "share")
    return Table(headings, [*cells, chance], f"Float rest against {quantization}, image by image")


def _calibrated(answers: Answers, summary: Mapping[str, Any]) -> int | None:
    """Number of images right after calibration, before training; None if the summary is of other images."""
    found = summary.get("calibrated")
    if not isinstance(found, Mapping) or found.get("n") != answers.n:
        return None
    top1 = number(found.get("top1"))
    return None if top1 is None or not 0 <= top1 <= 100 else round(top1 * answers.n / 100)


def curves(metrics: Sequence[Mapping[str, Any]], float_top1: float | None) -> list[Figure]:
    """Charts of loss, accuracy, learning rate and (if it changes) temperature by epoch; none without epochs.

    Args:
        metrics: one object per epoch, from ``metrics.jsonl``.
        float_top1: top-1 of the float-rest network in percent, drawn as a level; None draws none.
    """
    rows = [row for row in metrics if number(row.get("epoch")) is not None]
    if not rows:
        return []
    epochs = [float(row["epoch"]) for row in rows]

    def series(name: str, key: str, *, dashed: bool = False) -> Series:
        return Series(name, epochs, [number(row.get(key)) for row in rows], dashed=dashed)

    accuracy = [series("training", "top1", dashed=True), series("test", "test_top1")]
    if float_top1 is not None and len(rows) > 1:
        accuracy.append(Series("float rest", epochs, [float_top1] * len(rows), dashed=True, plain=True))
    figures = [
        Figure(
            "Loss",
            line_chart(
                "Loss by epoch",
                [series("training", "loss", dashed=True), series("test", "test_loss")],
                x_label="epoch",
                y_label="loss (nats)",
            ),
            "In training with augmentation and, if there is a teacher, its share of the loss.",
        ),
        Figure(
            "Accuracy",
            line_chart("Top-1 accuracy by epoch", accuracy, x_label="epoch", y_label="top-1 (%)"),
            "Of training images as augmented, while the network changes.",
        ),
        Figure(
            "Learning rate",
            line_chart(
                "Learning rate by epoch",
                [series("learning rate", "learning_rate")],
                x_label="epoch",
                y_label="learning rate",
                least=0.0,
            ),
            "At the last step of each epoch.",
        ),
    ]
    temperatures = {number(row.get("temperature")) for row in rows} - {None}
    if len(temperatures) > 1:
        chart = line_chart(
            "Weight temperature by epoch",
            [series("temperature", "temperature")],
            x_label="epoch",
            y_label="temperature",
            scale="log",
        )
        figures.append(Figure("Weight temperature", chart, "Weights are exactly ±1 below 1e−7."))
    return figures


def confusion_figure(answers: Answers) -> Figure | None:
    """A chart of the confusion matrix; None if there are too many classes to draw it."""
    if len(answers.class_names) > _DRAWN:
        return None
    chart = heat_map("Confusion matrix", answers.confusion().tolist(), answers.class_names)
    return Figure("Confusion matrix", chart, "Rows: true class. Columns: the network's answer.")


def confused_table(answers: Answers) -> Table | None:
    """A table of the commonest errors, with their share of the images of the class; None without errors."""
    found = answers.confused(_PAIRS)
    totals = answers.labels.bincount(minlength=len(answers.class_names)).tolist()
    names = [shortened(name, _NAME) for name in answers.class_names]
    rows = [
        (names[true], names[said], f"{count:,}", percent(100 * count / totals[true], 1))
        for true, said, count in found
    ]
    headings = ("true class", "taken for", "images", "share")
    return Table(headings, rows, "Most confused classes", frozenset({0, 1})) if rows else None


@dataclass(frozen=True)
class Picture:
    """An image that changed its class, and the texts below it."""

    image: Thumbnail
    outcome: str
    tone: str
    true: str
    before: str
    after: str
    number: int


def gallery(answers: Answers) -> list[Picture]:
    """Pictures of the images that changed class; those that became wrong come first."""
    shown = answers.changed[:_IMAGES]
    names = [shortened(name, _NAME) for name in answers.class_names]

    def picture(one: ChangedImage, image: Thumbnail) -> Picture:
        outcome, tone = ("became right", "good") if one.better else ("became wrong", "bad")
        if not one.better and not one.worse:
            outcome, tone = "wrong both times", "muted"
        return Picture(
            image, outcome, tone, names[one.label], names[one.before], names[one.after], one.index + 1
        )

    return [
        picture(one, image)
        for one, image in zip(shown, thumbnails([one.pixels for one in shown], _PICTURES), strict=False)
    ]
