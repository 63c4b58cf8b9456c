"""Registers the library of the native operators with onnxruntime; :mod:`qat.native.library` finds it."""

from __future__ import annotations

from typing import Any, Final

from qat.errors import NativeLibraryError
from qat.native.library import (
    kernels_in_use,
    native_library_path,
)

__all__ = ["DOMAIN", "register"]

#: Domain of the operators in a model, version 1.
DOMAIN: Final = "bnext_qat"


def register(options: Any) -> None:
    """Make the operators known to sessions that are created with ``options`` (`onnxruntime.SessionOptions`).

    Raises `NativeLibraryError` like `kernels_in_use`, and where onnxruntime refuses the library.
    """
    path = native_library_path()
    kernels_in_use()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's exceptions share no class
        raise NativeLibraryError(f"{path}: onnxruntime cannot register it: {error}") from error
