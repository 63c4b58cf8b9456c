"""Checkpoint files as other training code writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.errors import CheckpointError
from tests.helpers.checkpoints import toy

#: A network, another that differs in its last bias, and the first without its classifier.
STATE = dict(toy().state_dict())
OTHER = {key: value + 1 if key == "fc.bias" else value for key, value in STATE.items()}
BACKBONE = {key: value for key, value in STATE.items() if not key.startswith("fc.")}


def opened(tmp_path: Path, content: object, **options: Any) -> Checkpoint:
    torch.save(content, tmp_path / "c.pth")
    return load_checkpoint(tmp_path / "c.pth", **options)


def refusal(tmp_path: Path, content: object, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content, **options)
    assert str(caught.value).startswith(f"{tmp_path / 'c.pth'}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'c.pth'}: ")


def behind(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}
