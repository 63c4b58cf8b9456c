"""Which releases are tried where PyTorch's newest one would bring CUDA."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.paths import ROOT

SCRIPT = ROOT / ".ci" / "torchreleases.py"


def releases(requirement: str, said: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, requirement], input=said, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_releases_in_range_are_named_newest_first() -> None:
    said = (
        "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.10.0\n  INSTALLED: 2.10.0"
    )
    assert releases("torch>=2.11,<2.15", said) == ["torch==2.14.1", "torch==2.13.0+cpu", "torch==2.13.0"]


def test_an_index_without_answer_names_none() -> None:
    assert releases("torch>=2.11,<2.15", "") == []
    assert releases("torch>=2.11,<2.15", "Available versions: 2.10.0\n") == []
