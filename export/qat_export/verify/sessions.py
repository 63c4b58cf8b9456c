"""Create sessions of onnxruntime, with the native operators if the model has such."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime as ort

from qat_export.nativelibrary import DOMAIN, register


def create_session(
    model: str | bytes, make_options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession:
    """Create a session on the CPU.

    A model that onnxruntime refuses because of operators of domain ``bnext_qat`` is loaded again with the
    native library. Other models are loaded without the library, which need not have been built.

    Args:
        model: name of a file, or the content of one.
        make_options: makes the session's options; called once per attempt.

    Raises:
        NativeLibraryError: the model has native operators, and the library is missing.
        Exception: an exception of onnxruntime; these share no base class.
    """
    try:
        return _session(model, make_options())
    except Exception as error:
        if f"{DOMAIN}:" not in str(error):
            raise
    options = make_options()
    register(options)
    return _session(model, options)


def _session(model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    # No fallback, which would print to the terminal and then try the same provider again.
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
