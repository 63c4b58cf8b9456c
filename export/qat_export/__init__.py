"""The exporter: from a fine-tuned network to integers, and from there to ONNX.

:func:`lower` turns a fake-quantized network into an :class:`IntegerNetwork`, plain dataclasses of integers.
:class:`Interpreter` defines what such a network computes. The ``emit_`` functions write an integer network,
or the float network, as an ONNX model. :func:`register` registers the native operators with onnxruntime.

Begin with ``integer/network.py`` and ``integer/reference.py``. The packages, from the lowest layer up:

- ``integer``: the integer network, its interpreter and its file;
- ``lowering``: from torch to the integer network;
- ``graphs``: from the integer network, or the float one, to ONNX;
- ``verify``: exported models against the network they came from;
- ``inspection``: what an exported file holds, for ``qat inspect``;
- ``bench``: time, size and memory of models.

The names in ``__all__`` are public. Each is imported when it is first used, so that importing this package
loads neither torch nor onnx nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qat.native.library import available_kernels, kernels_in_use, native_library_path
    from qat_export.graphs.float32 import emit_float
    from qat_export.graphs.metadata import InputKind
    from qat_export.graphs.native import emit_native
    from qat_export.graphs.portable import emit_portable
    from qat_export.integer.file import load_network, save_network
    from qat_export.integer.network import IntegerNetwork
    from qat_export.integer.reference import Interpreter
    from qat_export.lowering.network import lower
    from qat_export.nativelibrary import register

__all__ = [
    "InputKind",
    "IntegerNetwork",
    "Interpreter",
    "available_kernels",
    "emit_float",
    "emit_native",
    "emit_portable",
    "kernels_in_use",
    "load_network",
    "lower",
    "native_library_path",
    "register",
    "save_network",
]

#: Public name → the module that defines it. Type checkers read the imports above instead.
_MODULES: Final = {
    "InputKind": "qat_export.graphs.metadata",
    "IntegerNetwork": "qat_export.integer.network",
    "Interpreter": "qat_export.integer.reference",
    "available_kernels": "qat.native.library",
    "emit_float": "qat_export.graphs.float32",
    "emit_native": "qat_export.graphs.native",
    "emit_portable": "qat_export.graphs.portable",
    "kernels_in_use": "qat.native.library",
    "load_network": "qat_export.integer.file",
    "lower": "qat_export.lowering.network",
    "native_library_path": "qat.native.library",
    "register": "qat_export.nativelibrary",
    "save_network": "qat_export.integer.file",
}


def __getattr__(name: str) -> Any:
    """Import the public name ``name`` from its module; called at its first use only."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """The names that are defined here, and the public names."""
    return sorted({*globals(), *__all__})
