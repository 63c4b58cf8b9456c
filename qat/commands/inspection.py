"""What `qat inspect` does: tell by its content what a file is, and inspect it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import safetensors
from qat_export.inspection.exports import inspect_network, inspect_onnx
from qat_export.integer.file import FORMAT as NETWORK_FORMAT

from qat.checkpoints.loading import build
from qat.checkpoints.published import is_safetensors
from qat.errors import CheckpointError
from qat.inspection.checkpoint import inspect_checkpoint, open_checkpoint
from qat.inspection.facts import Inspection
from qat.runs import find_run

#: How files begin: those of torch.save, zip and older, and ONNX models (their first field is the IR version).
_TORCH: Final = (b"PK\x03\x04", b"\x80")
_ONNX: Final = b"\x08"


def inspect_file(path: Path) -> Inspection:
    """What is in a checkpoint, an exported model, an integer network or a run's best checkpoint.

    Args:
        path: a file of any name, or a run directory.

    Raises:
        QatError: absent, damaged, no run, or of another kind or origin.
    """
    if path.is_dir():
        path = find_run(path).best
    is_safetensors(path)  # refuses what is no file, or empty
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return inspect_network(path) if _is_network(path) else _inspect_checkpoint(path)
    if start.startswith(_TORCH):
        return _inspect_checkpoint(path)
    if start.startswith(_ONNX):
        return inspect_onnx(path)
    raise CheckpointError(
        f"{path}: not a file that this reads: it begins like neither a safetensors file, nor one of "
        "torch.save, nor an ONNX model"
    )


def _is_network(path: Path) -> bool:
    """Whether a safetensors file is an integer network; of damaged ones, the reader of checkpoints tells."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return NETWORK_FORMAT in (file.metadata() or {})
    except Exception:  # SafetensorError, and what a hostile header makes of it
        return False


def _inspect_checkpoint(path: Path) -> Inspection:
    checkpoint = open_checkpoint(path)
    return inspect_checkpoint(path, checkpoint, build(checkpoint))
