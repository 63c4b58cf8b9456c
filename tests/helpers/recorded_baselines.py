"""Baselines made up for tests: N images, of which some are wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from qat.gate.baseline import Baseline, DataFacts, ModelFacts, Processor, pack, percentage


def baseline(n: int = 360, wrong: Iterable[int] = (), sha: str = "a", **changes: Any) -> Baseline:
    """A baseline of ``n`` images, of which those in ``wrong`` are wrong, with ``changes`` of attributes.

    In ``changes``, ``data`` and ``processor`` may be mappings of some of their attributes.
    """
    correct = np.ones(n, np.bool_)
    correct[list(wrong)] = False
    data = {
        "dataset": "digits",
        "test_split": "validation",
        "fingerprint": "d" * 64,
        "image_size": 16,
        "resize": None,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    } | changes.pop("data", {})
    processor = {"name": "A", "architecture": "x86_64", "instruction_sets": ["avx2"]} | changes.pop(
        "processor", {}
    )
    content: dict[str, Any] = {
        "format": "bnext-qat baseline 1",
        "recorded": "2026-01-02T03:04:05Z",
        "images": n,
        "num_classes": 10,
        "top1": percentage(int(correct.sum()), n),
        "top5": 100.0,
        "model": ModelFacts(
            file="best.safetensors", sha256=sha * 64, format="bnext-qat", architecture="BNext tiny"
        ),
        "data": DataFacts.model_validate(data),
        "versions": {"bnext-qat": "0.1.0", "torch": "2.11.0"},
        "processor": Processor.model_validate(processor),
        "recipe": {"task": "finetune"},
        "class_names": [str(digit) for digit in range(10)],
        "correct": pack(correct),
    }
    return Baseline.model_validate(content | changes)
