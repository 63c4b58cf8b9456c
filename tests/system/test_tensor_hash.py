"""The hash of tensors, against the formula of its docstring written out."""

from __future__ import annotations

import hashlib

from qat.system.tensor_hash import tensors_sha256

TENSORS = [(["a", "int8", [2]], b"\x01\x02"), (["b", "int16", []], b"\x03\x00")]


def test_it_covers_facts_and_values_in_order() -> None:
    content = b'["a","int8",[2]]\n\x01\x02["b","int16",[]]\n\x03\x00'
    assert tensors_sha256(TENSORS) == hashlib.sha256(content).hexdigest()


def test_another_order_fact_or_value_gives_another_hash() -> None:
    others = [
        TENSORS[::-1],
        [(["a", "int8", [1, 2]], b"\x01\x02"), TENSORS[1]],
        [(["a", "int8", [2]], b"\x01\x03"), TENSORS[1]],
    ]
    assert len({tensors_sha256(tensors) for tensors in (TENSORS, *others)}) == 4
