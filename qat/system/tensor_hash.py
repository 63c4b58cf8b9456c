"""The hash by which files say which tensors they hold; it needs neither torch nor NumPy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence


def tensors_sha256(tensors: Iterable[tuple[Sequence[object], bytes]]) -> str:
    """SHA-256 of tensors as 64 hexadecimal digits.

    For each tensor in turn: the JSON text of its facts, a line feed, and its values.

    Args:
        tensors: for each, the facts to cover beside the values, such as name, type and shape, and the bytes
            of the values in C order, little-endian.
    """
    digest = hashlib.sha256()
    for facts, values in tensors:
        digest.update(f"{json.dumps(facts, separators=(',', ':'))}\n".encode())
        digest.update(values)
    return digest.hexdigest()
