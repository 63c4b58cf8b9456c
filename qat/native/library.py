"""Where the native library is: operators for onnxruntime, passes for training; built from ``qat/native/src``.

A wheel carries the library in that folder, an editable install builds it there (``make native`` builds it
again). Where no compiler was found it is missing: who asks for it is told, and training takes torch's
operators. A library that is there but of another version is an error, training too.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any, Final

from qat.errors import NativeLibraryError

#: Names another library file, such as one built with sanitizers.
LIBRARY_VARIABLE: Final = "BNEXT_QAT_NATIVE_LIBRARY"
#: Names the kernels to use instead of the best that the processor runs.
KERNELS_VARIABLE: Final = "BNEXT_QAT_KERNELS"

#: Where an install puts the library.
LIBRARY_FOLDER: Final = Path(__file__).resolve().parent


def native_library_path() -> Path:
    """The library to register: ``SessionOptions::RegisterCustomOpsLibrary`` in C++, `register` in Python.

    Raises `NativeLibraryError` where there is none, with what to do about it.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        path = Path(named).absolute()
        if not path.is_file():
            raise NativeLibraryError(f"{LIBRARY_VARIABLE}: {named}: no such file")
        return path
    path = LIBRARY_FOLDER / f"libbnext_qat_native.{'dll' if sys.platform == 'win32' else 'so'}"
    if not path.is_file():
        raise NativeLibraryError(
            f"{path}: the native operators were not built, which takes a C++17 compiler while the package is "
            "installed. Get one (Debian, Ubuntu: apt-get install g++), then install the package again: "
            "`make native` in a checkout, "
            "else `pip install --force-reinstall --no-deps --no-cache-dir bnext-qat`"
        )
    return path


def has_library() -> bool:
    """Whether the library was built.

    Raises `NativeLibraryError` where the environment names a file that is not there.
    """
    try:
        native_library_path()
    except NativeLibraryError:
        if os.environ.get(LIBRARY_VARIABLE):
            raise
        return False
    return True


def available_kernels() -> tuple[str, ...]:
    """Sets of kernels that this processor runs, best first, such as ``("avx2", "portable")``.

    Raises `NativeLibraryError` like `native_library_path`, and for a file that is not the library.
    """
    choice = library_function("bnext_qat_choice")
    choice.argtypes = [ctypes.c_int]
    names: list[str] = []
    while (name := choice(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def kernels_in_use() -> str:
    """The kernels that sessions made from now on use: the best, or those that ``BNEXT_QAT_KERNELS`` names.

    Raises `NativeLibraryError` like `available_kernels`, and where that names kernels that don't run here.
    """
    name: bytes | None = library_function("bnext_qat_kernels")()
    if name is None:
        raise NativeLibraryError(
            f"{KERNELS_VARIABLE} is {os.environ.get(KERNELS_VARIABLE)!r}, this processor runs "
            + ", ".join(available_kernels())
        )
    return name.decode()


def library_function(name: str) -> Any:
    """A function of the library, by its C name; as it is, it returns text.

    Raises `NativeLibraryError` like `native_library_path`, and for a file that is not the library.
    """
    path = native_library_path()
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path}: not the library of the native operators: {error}") from error
    function.restype = ctypes.c_char_p
    return function
