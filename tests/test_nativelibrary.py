"""Where the library of the native operators is, and what is said where it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime as ort
import pytest
from nativemodels import needs_library

from export import nativelibrary
from export.nativelibrary import available_kernels, kernels_in_use, native_library_path, register
from qat.errors import NativeLibraryError

ALL = {"avx512_vpopcntdq", "avx512", "avx2", "neon", "portable"}


def test_a_missing_library_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXT_QAT_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(nativelibrary, "_FOLDER", tmp_path)
    for ask in (native_library_path, available_kernels, kernels_in_use, lambda: register(None)):
        with pytest.raises(NativeLibraryError, match=r"apt-get install g\+\+.*make native.*pip install"):
            ask()


@needs_library
def test_the_variable_names_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native_library_path()
    other = tmp_path / "other.so"
    monkeypatch.setenv("BNEXT_QAT_NATIVE_LIBRARY", str(other))
    with pytest.raises(NativeLibraryError, match=r"BNEXT_QAT_NATIVE_LIBRARY: .*other.so: no such file"):
        native_library_path()
    shutil.copy(library, other)
    assert native_library_path() == other
    assert kernels_in_use() in ALL


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.so"
    other.write_text("text")
    monkeypatch.setenv("BNEXT_QAT_NATIVE_LIBRARY", str(other))
    for ask in (available_kernels, kernels_in_use, lambda: register(ort.SessionOptions())):
        with pytest.raises(NativeLibraryError, match=r"other\.so: not the library"):
            ask()


@needs_library
def test_the_best_kernels_are_used_unless_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXT_QAT_KERNELS", raising=False)
    available = available_kernels()
    assert set(available) <= ALL
    assert available[-1] == "portable"
    assert kernels_in_use() == available[0]
    for name in available:
        monkeypatch.setenv("BNEXT_QAT_KERNELS", name)
        assert kernels_in_use() == name
    monkeypatch.setenv("BNEXT_QAT_KERNELS", "")
    assert kernels_in_use() == available[0]


@needs_library
def test_kernels_that_do_not_run_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNEXT_QAT_KERNELS", "avx1024")
    for ask in (kernels_in_use, lambda: register(ort.SessionOptions())):
        with pytest.raises(NativeLibraryError, match=r"BNEXT_QAT_KERNELS is 'avx1024', .* runs .*portable"):
            ask()
