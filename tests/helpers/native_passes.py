"""What a test does that needs the native library's passes."""

from __future__ import annotations

import os

import pytest
import torch

from qat.native.bindings import usable


def need_passes() -> None:
    """Skip the test where users can do without the native library; fail where it is required, as in CI."""
    if not usable(torch.ones(1)):
        missing = "the native library is not built, or finds no threads"
        if os.environ.get("BNEXT_QAT_NATIVE") == "require":
            pytest.fail(missing)
        pytest.skip(missing)
