"""The description of the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qat.system import machine as module
from qat.system.machine import machine, read_cpuinfo, usable_cores

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx2 amx_int8 avx512f avx512_vnni avx512_vpopcntdq

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp i8mm sve
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


def test_name_and_instruction_sets_are_those_of_the_first_processor() -> None:
    name, features = read_cpuinfo(XEON)
    assert name == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert features == ["avx2", "avx512f", "avx512_vnni", "avx512_vpopcntdq", "amx_int8"]


def test_a_processor_without_a_name_is_told_by_its_numbers() -> None:
    assert read_cpuinfo(GRAVITON) == (
        "implementer 0x41 part 0xd40",
        ["asimd", "asimddp", "i8mm", "sve"],
    )


def test_a_name_that_is_part_of_another_is_not_taken_for_it() -> None:
    assert read_cpuinfo("flags : avx512_vnni avx512f_like")[1] == ["avx512_vnni"]


@pytest.mark.parametrize("text", ["", "no colon here\n", "flag\t: avx2\n"])
def test_what_says_nothing_leaves_both_unknown(text: str) -> None:
    assert read_cpuinfo(text) == (None, None)


def test_the_object_has_these_keys_and_is_json() -> None:
    found = machine()
    assert list(found) == [
        "processor",
        "architecture",
        "logical_cores",
        "usable_cores",
        "instruction_sets",
        "memory_bytes",
        "system",
        "python",
        "versions",
    ]
    assert list(found["versions"]) == ["bnext-qat", "onnxruntime", "onnx", "numpy", "torch"]
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["numpy"].count(".") == 2
    assert 1 <= found["usable_cores"] <= found["logical_cores"]
    assert found["memory_bytes"] > 2**28


def test_a_system_without_cpuinfo_is_described_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    found = machine(cpuinfo=tmp_path / "none")
    assert found["instruction_sets"] is None
    assert found["versions"]["no-such-package"] is None


def test_usable_cores_are_those_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
