"""Whether a model can be compared with a baseline, and which differences besides the model may matter."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qat.errors import BaselineError
from qat.gate.baseline import Baseline, DataFacts
from qat.recipe.schema import Data


def check_preprocessing(
    baseline: Baseline, data: Data | DataFacts, num_classes: int, source: str = "the baseline"
) -> None:
    """Refuse a comparison if classes or preprocessing differ, before any image is read.

    Args:
        baseline: the recorded baseline.
        data, num_classes: data settings and number of classes of the model to compare with it.
        source: what the message calls the baseline, such as its path.

    Raises:
        BaselineError: on the first difference in class count, data set, image size, orientation or
            normalization.
    """
    theirs = baseline.data
    if num_classes != baseline.num_classes:
        raise _refusal(source, "the number of classes", num_classes, baseline.num_classes)
    if data.dataset != theirs.dataset:
        raise _refusal(source, "data.dataset", repr(data.dataset), repr(theirs.dataset))
    if data.image_size != theirs.image_size:
        raise _refusal(source, "data.image_size", data.image_size, theirs.image_size)
    if data.exif_orientation != theirs.exif_orientation:
        raise _refusal(source, "data.exif_orientation", data.exif_orientation, theirs.exif_orientation)
    for key in ("mean", "std"):
        ours, recorded = list(getattr(data, key)), list(getattr(theirs, key))
        if not np.allclose(ours, recorded, rtol=0, atol=1e-6):
            raise _refusal(source, f"data.{key}", ours, recorded)


def check_comparable(
    baseline: Baseline, data: DataFacts, num_classes: int, images: int, source: str = "the baseline"
) -> None:
    """Refuse a comparison unless both models saw the same images, preprocessed alike, with the same labels.

    Args:
        baseline: the recorded baseline.
        data, num_classes, images: data, number of classes and number of images of the model to compare.
        source: what the message calls the baseline, such as its path.

    Raises:
        BaselineError: on the first difference in class count, preprocessing, or images and labels.
    """
    check_preprocessing(baseline, data, num_classes, source)
    theirs = baseline.data
    if data.resize != theirs.resize:
        raise _refusal(source, "data.resize", data.resize, theirs.resize)
    if images != baseline.images:
        raise _refusal(source, "the number of images", images, baseline.images)
    if data.fingerprint != theirs.fingerprint:
        ours, recorded = f"{data.fingerprint[:12]}…", f"{theirs.fingerprint[:12]}…"
        raise _refusal(source, "the SHA-256 of images and labels", ours, recorded)


def _refusal(source: str, key: str, ours: object, theirs: object) -> BaselineError:
    return BaselineError(
        f"{source} cannot be compared with: {key} is {ours} here and {theirs} there; measure on the same "
        "data (--recipe, --set data.KEY=VALUE), or record a new baseline"
    )


def differences(baseline: Baseline, observed: Baseline) -> Iterable[str]:
    """A sentence on each difference besides the model that may have changed answers."""
    theirs, ours = baseline.processor, observed.processor
    if (theirs.name, theirs.architecture) != (ours.name, ours.architecture):
        yield (
            f"another processor: {_shown(ours.name)} ({_shown(ours.architecture)}); the baseline is of "
            f"{_shown(theirs.name)} ({_shown(theirs.architecture)})"
        )
    gone, new = (
        sorted(set(one.instruction_sets or ()) - set(other.instruction_sets or ()))
        for one, other in ((theirs, ours), (ours, theirs))
    )
    if gone or new:
        parts = [
            f"{word} {', '.join(map(_shown, names))}"
            for word, names in (("without", gone), ("with", new))
            if names
        ]
        yield f"other instruction sets: {' and '.join(parts)}, unlike where the baseline was recorded"
    changed = [
        f"{_shown(name)} {_shown(observed.versions.get(name))} ({_shown(baseline.versions.get(name))})"
        for name in sorted(observed.versions.keys() | baseline.versions.keys())
        if observed.versions.get(name) != baseline.versions.get(name)
    ]
    if changed:
        yield f"other versions than the baseline's, which are in brackets: {', '.join(changed)}"
    if baseline.class_names != observed.class_names:
        yield _other_names(baseline.class_names, observed.class_names)


def _shown(text: str | None) -> str:
    """``text`` with control characters escaped: a file's text must not steer a terminal or a CI job."""
    if text is None:
        return "unknown"
    return text if text.isprintable() else ascii(text)


def _other_names(theirs: list[str] | str, ours: list[str] | str) -> str:
    if isinstance(theirs, str) or isinstance(ours, str):
        return "classes have other names than in the baseline"
    different = [index for index, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
    first = different[0]
    return (
        f"{len(different)} of {len(ours)} classes have other names than in the baseline: class {first} is "
        f"{ours[first]!r}, was {theirs[first]!r}"
    )
