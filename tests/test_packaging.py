"""What a wheel holds, with a compiler and without one."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.native_builds import ROOT, need, run

pytestmark = pytest.mark.slow

#: What the library can do is tested with the installed one: this one is compiled quickly.
QUICKLY = {"SKBUILD_CMAKE_BUILD_TYPE": "Debug", "CMAKE_ARGS": "-DCMAKE_UNITY_BUILD=ON"}
LIBRARY = "qat/native/libbnext_qat_native.so"


def wheel(folder: Path, **environment: str) -> tuple[str, set[str]]:
    """Name and files of the wheel that pip builds from the checkout."""
    pytest.importorskip("scikit_build_core")
    need("cmake")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir"]
    variables = {name: value for name, value in os.environ.items() if name != "BNEXT_QAT_NATIVE"}
    command = [sys.executable, "-m", "pip", "wheel", *options, folder, ROOT]
    done = run(*command, env=variables | environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, {name for name in archive.namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    packages = [path for package in ("qat", "export/qat_export") for path in (ROOT / package).rglob("*")]
    kept = [
        path
        for path in packages
        if path.suffix in {".py", ".pyi", ".html", ".css"} or path.name == "py.typed"
    ]
    files = {path.relative_to(ROOT).as_posix().removeprefix("export/") for path in kept}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    return files | {f"qat/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in recipes}


def test_a_wheel_holds_python_recipes_and_the_library_but_no_sources_of_it(tmp_path: Path) -> None:
    need("c++")
    name, files = wheel(tmp_path, BNEXT_QAT_NATIVE="require", **QUICKLY)
    assert files == expected() | {LIBRARY}
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")


def test_without_a_compiler_all_but_the_library_is_there(tmp_path: Path) -> None:
    name, files = wheel(tmp_path, CXX="/bin/false")
    assert files == expected()
    assert name.endswith("-py3-none-any.whl")


def test_the_library_can_be_left_out(tmp_path: Path) -> None:
    assert wheel(tmp_path, BNEXT_QAT_NATIVE="off")[1] == expected()


def test_a_library_that_is_required_and_cannot_be_built_fails_the_install(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CMake configuration failed"):
        wheel(tmp_path, CXX="/bin/false", BNEXT_QAT_NATIVE="require")
