"""The order in which every target emits sub-blocks, and what their tensors are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from qat_export.graphs.walk import EmittedBlock, emit_blocks, side_behind


@dataclass(frozen=True)
class Sub:
    name: str
    stride: int = 1


class Recorder:
    """Emits nothing; keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def sub_block(self, sub: Sub, x: str, side: int, output: str) -> str:
        self.calls.append((sub.name, x, side, output))
        return output

    def concatenate(self, parts: Sequence[str], output: str) -> str:
        self.calls.append(("concat", *parts, output))
        return output


def test_each_sub_block_reads_what_the_one_before_wrote_and_pairs_are_concatenated() -> None:
    blocks = [
        EmittedBlock("b1", Sub("b1.s"), [Sub("b1.p")]),
        EmittedBlock("b2", Sub("b2.s", stride=2), [Sub("b2.p"), Sub("b2.q")]),
    ]
    recorder = Recorder()
    assert emit_blocks(recorder, blocks, "stem", 9) == ("b2/trunk_out", 5)
    assert recorder.calls == [
        ("b1.s", "stem", 9, "b1/trunk_mid"),
        ("b1.p", "b1/trunk_mid", 9, "b1/trunk_out"),
        ("b2.s", "b1/trunk_out", 9, "b2/trunk_mid"),
        ("b2.p", "b2/trunk_mid", 5, "b2.p/out"),
        ("b2.q", "b2/trunk_mid", 5, "b2.q/out"),
        ("concat", "b2.p/out", "b2.q/out", "b2/trunk_out"),
    ]


@pytest.mark.parametrize(
    ("side", "stride", "expected"), [(1, 1, 1), (1, 2, 1), (7, 2, 4), (8, 2, 4), (9, 1, 9)]
)
def test_a_stride_of_two_halves_a_side_rounded_up(side: int, stride: int, expected: int) -> None:
    assert side_behind(side, stride) == expected
