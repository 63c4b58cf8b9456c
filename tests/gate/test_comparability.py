"""What can be compared with a baseline, and what is warned of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qat.errors import BaselineError
from qat.gate.baseline import Baseline
from qat.gate.comparability import check_comparable, differences
from tests.helpers.recorded_baselines import baseline

HERE = baseline()


def check(theirs: Baseline, ours: Baseline = HERE) -> None:
    check_comparable(theirs, ours.data, ours.num_classes, ours.images, "b.json")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"num_classes": 11, "class_names": list("abcdefghijk")},
            "the number of classes is 10 here and 11 there",
        ),
        (
            {"data": {"dataset": "imagefolder"}},
            "data.dataset is 'digits' here and 'imagefolder' there",
        ),
        ({"data": {"image_size": 32}}, "data.image_size is 16 here and 32 there"),
        ({"data": {"resize": 18}}, "data.resize is None here and 18 there"),
        ({"data": {"mean": [0.0, 0.0, 0.1]}}, "data.mean is [0.0, 0.0, 0.0] here and [0.0, 0.0, 0.1] there"),
        ({"data": {"std": [1.0, 1.0, 0.9]}}, "data.std is [1.0, 1.0, 1.0] here and [1.0, 1.0, 0.9] there"),
        ({"data": {"exif_orientation": True}}, "data.exif_orientation is False here and True there"),
        ({"n": 361}, "the number of images is 360 here and 361 there"),
        (
            {"data": {"fingerprint": "e" * 64}},
            "the SHA-256 of images and labels is dddddddddddd… here and eeeeeeeeeeee… there",
        ),
    ],
)
def test_other_images_classes_or_preprocessing_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(BaselineError, match=re.escape(f"b.json cannot be compared with: {part}; measure on")):
        check(baseline(**changes))


def test_what_changes_no_question_is_compared() -> None:
    check(HERE)
    check(baseline(wrong=[1, 2], sha="b"))
    check(baseline(data={"mean": [0.0, 0.0, 1e-8], "test_split": "val"}))
    check(baseline(processor={"name": "B"}, versions={}, class_names=list("abcdefghij"), recipe=None))


def test_the_same_circumstances_warn_of_nothing() -> None:
    ours = baseline(wrong=[1], sha="b", recorded="2027-01-02T03:04:05Z", recipe=None)
    assert list(differences(HERE, ours)) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"processor": {"name": "B"}}, "another processor: B (x86_64); the baseline is of A (x86_64)"),
        (
            {"processor": {"name": None, "architecture": "aarch64"}},
            "another processor: unknown (aarch64); the baseline is of A (x86_64)",
        ),
        (
            {"processor": {"instruction_sets": ["avx512f", "fma"]}},
            "other instruction sets: without avx2 and with avx512f, fma, unlike where the baseline was "
            "recorded",
        ),
        (
            {"processor": {"instruction_sets": None}},
            "other instruction sets: without avx2, unlike where the baseline was recorded",
        ),
        (
            {"versions": {"bnext-qat": "0.1.0", "torch": "2.12.0", "numpy": "2.4"}},
            "other versions than the baseline's, which are in brackets: numpy 2.4 (unknown), "
            "torch 2.12.0 (2.11.0)",
        ),
        (
            {"processor": {"name": "B\x1b[2J\n::error::"}},
            r"another processor: 'B\x1b[2J\n::error::' (x86_64); the baseline is of A (x86_64)",
        ),
        (
            {"processor": {"architecture": None}},
            "another processor: A (unknown); the baseline is of A (x86_64)",
        ),
        (
            {"class_names": [*"0123456", "seven", "8", "nine"]},
            "2 of 10 classes have other names than in the baseline: class 7 is 'seven', was '7'",
        ),
        ({"class_names": "c" * 64}, "classes have other names than in the baseline"),
    ],
)
def test_another_processor_version_or_name_is_a_warning(changes: dict[str, Any], text: str) -> None:
    assert list(differences(HERE, baseline(**changes))) == [text]
