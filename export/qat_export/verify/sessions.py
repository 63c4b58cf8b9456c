"""Sessions of onnxruntime, with the native operators where a model has them."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime as ort

from qat_export.nativelibrary import DOMAIN, register


def create_session(
    model: str | bytes, make_options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession:
    """A session on the CPU from a file's name or its content.

    A model that onnxruntime refuses for its operators of domain ``bnext_qat`` is loaded again with the native
    library. Other models load without it, and so work where it was not built.

    Args:
        model: name of a file, or its content.
        make_options: called once per attempt.

    Raises:
        NativeLibraryError: the model has native operators, and the library is missing.
        Exception: onnxruntime's own, whose classes share no base.
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
    # onnxruntime's fallback would print to the terminal, then try the same provider again.
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
