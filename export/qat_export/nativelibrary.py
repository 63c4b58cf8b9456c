"""Register the library of the native operators, which :mod:`qat.native.library` finds, with onnxruntime."""

from __future__ import annotations

from typing import Any, Final

from qat.errors import NativeLibraryError
from qat.native.library import (
    kernels_in_use,
    native_library_path,
)

__all__ = ["DOMAIN", "register"]

#: Domain of the native operators in an ONNX model.
DOMAIN: Final = "bnext_qat"


def register(options: Any) -> None:
    """Let sessions that are created with ``options`` run models with native operators.

    Args:
        options: an ``onnxruntime.SessionOptions``; it is changed.

    Raises:
        NativeLibraryError: the library is missing or can't be used, or onnxruntime refuses it.
    """
    path = native_library_path()
    kernels_in_use()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise NativeLibraryError(f"{path}: onnxruntime cannot register it: {error}") from error
