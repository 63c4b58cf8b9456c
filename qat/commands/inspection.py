"""What `qat inspect` does: recognize a file by its content, and inspect it."""

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

#: First bytes of files: of torch.save (a zip archive, or a pickle in its older format), and of ONNX models
#: (the tag of the protobuf field ``ir_version``).
_TORCH: Final = (b"PK\x03\x04", b"\x80")
_ONNX: Final = b"\x08"


def inspect_file(path: Path) -> Inspection:
    """Inspect a checkpoint, an exported model, an integer network, or the best checkpoint of a run.

    Args:
        path: a file of any name, or a run directory.

    Raises:
        QatError: the file is absent, damaged, or of another kind or origin, or the folder is no run.
    """
    if path.is_dir():
        path = find_run(path).best
    is_safetensors(path)  # raises if there is no such file, or it is empty
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
    """Whether a safetensors file is an integer network.

    False for a damaged file: reading it as a checkpoint then raises the error that says what is wrong.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return NETWORK_FORMAT in (file.metadata() or {})
    except Exception:  # SafetensorError; a malformed header raises others too
        return False


def _inspect_checkpoint(path: Path) -> Inspection:
    checkpoint = open_checkpoint(path)
    return inspect_checkpoint(path, checkpoint, build(checkpoint))
