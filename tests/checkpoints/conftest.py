"""A fixture with the checkpoint file of a toy network."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.checkpoints.format import save_checkpoint
from tests.helpers.checkpoints import toy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, toy(), recipe=None)
    return path
