"""The native operators' tests once more, with a library that watches addresses and undefined behaviour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.native_builds import build, copied_sources, need, run, set_property
from tests.helpers.native_models import KERNELS
from tests.helpers.paths import ROOT

# One process: each would build the library for itself.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sanitized")]

#: The source that errors are planted into.
PLANTED = "operators/channel_sums.cpp"
OPERATORS, REFUSALS = "tests/native/test_operators.py", "tests/native/test_refusals.py"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, built with sanitizers in its folder ``build``."""
    need("cmake", "g++")
    if run("g++", "-print-file-name=libasan.so").stdout.strip() == "libasan.so":
        pytest.skip("not installed: libasan")
    copy = copied_sources(tmp_path_factory.mktemp("sanitized"))
    # Kernels that cannot run here cannot be watched either; and the tests below compile this file again.
    idle = [
        f"kernels/kernels_{name}.cpp"
        for name in ("avx512_vpopcntdq", "avx512", "avx2")
        if name not in KERNELS
    ]
    # The operators do not use the passes of training, which the self-test's programs watch (exhaustive).
    idle += [f"training/{path.name}" for path in (copy / "src" / "training").glob("passes*.cpp")]
    set_property(copy, [PLANTED], "PROPERTY SKIP_UNITY_BUILD_INCLUSION ON")
    if KERNELS and idle:
        set_property(copy, idle, "APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=all -O0")
    # A unity build halves the time: each file alone takes most of it for the headers.
    build(
        copy,
        copy / "build",
        "-DBNEXT_SANITIZE=ON",
        "-DCMAKE_CXX_COMPILER=g++",
        "-DCMAKE_UNITY_BUILD=ON",
    )
    return copy


def watched(sources: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the library in ``sources/build``. Python itself leaks, so leaks are not looked for."""
    libraries = [run("g++", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan")]
    environment = {
        **os.environ,
        "BNEXT_QAT_NATIVE": "require",
        "BNEXT_QAT_NATIVE_LIBRARY": str(sources / "build" / "libbnext_qat_native.so"),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    # Without conftest.py, which imports PyTorch; with -s, since a report is the last that a process says.
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "--noconftest"]
    return run(sys.executable, "-m", "pytest", *options, *arguments, cwd=ROOT, env=environment)


@pytest.mark.parametrize("tests", [REFUSALS, pytest.param(OPERATORS, marks=pytest.mark.exhaustive)])
def test_no_test_of_the_operators_touches_what_it_must_not(sources: Path, tests: str) -> None:
    done = watched(sources, tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "report"),
    [
        ("images * padded)", "images * channels_)", "heap-buffer-overflow"),
        pytest.param(
            "ldexp(1.0f, -shift)",
            "ldexp(1.0f, -(shift << 40))",
            "shift exponent 40 is too large",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_planted_error_would_be_seen(sources: Path, right: str, wrong: str, report: str) -> None:
    file = sources / "src" / PLANTED
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    try:
        build(sources, sources / "build")
        done = watched(sources, OPERATORS, "-k", "channel_sums")
    finally:
        file.write_text(text)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


@pytest.mark.exhaustive
def test_no_kernel_or_pass_touches_what_it_must_not(tmp_path: Path) -> None:
    need("cmake", "g++")
    copy = copied_sources(tmp_path)
    build(copy, copy / "build", "-DBNEXT_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++", target="selftest")
    done = run(copy / "build" / "selftest", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: equal in 300 rounds" in done.stdout
