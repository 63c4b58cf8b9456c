"""The hash over tensors that this project's files record. It needs neither torch nor NumPy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence


def tensors_sha256(tensors: Iterable[tuple[Sequence[object], bytes]]) -> str:
    """SHA-256 of tensors as 64 hexadecimal digits.

    The hash covers, for each tensor in turn, the JSON text of its facts, a line feed, and its values.

    Args:
        tensors: a pair for each tensor: its facts, such as name, type and shape, and the bytes of its values
            in C order, little-endian.
    """
    digest = hashlib.sha256()
    for facts, values in tensors:
        digest.update(f"{json.dumps(facts, separators=(',', ':'))}\n".encode())
        digest.update(values)
    return digest.hexdigest()
