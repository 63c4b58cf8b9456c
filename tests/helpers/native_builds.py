"""Builds of the C++ sources that tests make in folders of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

NATIVE = ROOT / "qat" / "native"


def need(*programs: str, always: bool = True) -> None:
    """Skip the test where a program is missing; with ``always``, fail where the library is required."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing and always and os.environ.get("BNEXT_QAT_NATIVE") == "require":
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The finished process, its output as text."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def copied_sources(folder: Path) -> Path:
    """A copy of the C++ sources (``src``) and of ``cmake/CMakeLists.txt``, without what was built there."""
    copy = folder / "native"
    shutil.copytree(NATIVE / "src", copy / "src")
    (copy / "cmake").mkdir()
    shutil.copy(NATIVE / "cmake" / "CMakeLists.txt", copy / "cmake")
    return copy


def set_property(copy: Path, files: Iterable[str], setting: str) -> None:
    """Let CMake set a property of files below ``src`` when the copy is built."""
    names = " ".join(f"${{src}}/{name}" for name in files)
    with (copy / "cmake" / "CMakeLists.txt").open("a") as script:
        script.write(f"set_property(SOURCE {names} {setting})\n")


def build(sources: Path, folder: Path, *options: str, target: str = "bnext_qat_native") -> None:
    """Configure and build with CMake; a failure shows its output."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = run("cmake", "-S", sources / "cmake", "-B", folder, *generator, *options)
    assert configure.returncode == 0, configure.stdout + configure.stderr
    built = run("cmake", "--build", folder, "--target", target, "--parallel", "2")
    assert built.returncode == 0, built.stdout + built.stderr
