"""Freed memory stays with the process, if that is asked for."""

import subprocess
import sys

import pytest

from qat.system import memory as allocator
from qat.system.memory import keep_pages

# Asks for 64 MB, fills and frees them, over and over; prints the page faults of the last times.
FAULTS = """
import resource, sys, numpy
from qat.system.memory import keep_pages
if sys.argv[1] == "keep" and not keep_pages():
    raise SystemExit("not glibc")
for time in range(6):
    if time == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.full(2**23, 1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=False)
    if "not glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    assert 10 * faults("keep") < faults("return")


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_pages()
