"""Where the library of the native operators is, and what is said where it is not."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest
from qat_export.nativelibrary import register

from qat.errors import NativeLibraryError
from qat.native import library as nativelibrary
from qat.native.library import available_kernels, has_library, kernels_in_use, native_library_path
from tests.helpers.native_models import needs_library

ALL = {"avx512_vpopcntdq", "avx512", "avx2", "neon", "portable"}


def test_a_missing_library_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXT_QAT_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(nativelibrary, "LIBRARY_FOLDER", tmp_path)
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


@needs_library
def test_an_onnxruntime_that_is_too_old_is_told_so() -> None:
    """A stand-in for its interface: a table up to version 16, whose first entry makes a status."""
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    messages: list[bytes] = []

    def status(code: int, message: bytes) -> int:
        messages.append(message)
        return 1234

    entry = create(status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(entry, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 16 else 0
    )
    version_text = ctypes.create_string_buffer(b"1.16.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version_text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    function = ctypes.CDLL(str(native_library_path())).RegisterCustomOps
    function.restype = ctypes.c_void_p
    assert function(None, ctypes.byref(base)) == 1234
    assert messages == [b"bnext_qat.register: needs onnxruntime 1.17 or newer, this is 1.16.3"]


def test_a_library_that_was_not_built_is_no_error_but_one_that_is_named_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nativelibrary, "LIBRARY_FOLDER", tmp_path)
    monkeypatch.delenv("BNEXT_QAT_NATIVE_LIBRARY", raising=False)
    assert not has_library()
    monkeypatch.setenv("BNEXT_QAT_NATIVE_LIBRARY", str(tmp_path / "typo.so"))
    with pytest.raises(NativeLibraryError, match=r"typo\.so: no such file"):
        has_library()
