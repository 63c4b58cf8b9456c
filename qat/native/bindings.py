"""What the native library offers to a training step, as C calls it, and whether it can be used.

:mod:`qat.native.passes` and :mod:`qat.native.signs` call it with tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import NativeLibraryError
from qat.native.library import has_library, kernels_in_use, library_function, native_library_path

#: In the order of the library's own list.
TYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_WITH_GRID: Final = (
    *("prelu", "prelu_gradient", "norm_prelu", "norm_prelu_sums", "norm_prelu_gradient"),
    *("add", "add_gradient"),
)
#: What a library must have.
PASSES: Final = frozenset(
    (
        *("sign", "sign_gradient", "moments", "scale", "fake_quantize", "fake_quantize_gradient"),
        *(prefix + name for prefix in ("", "grid_") for name in _WITH_GRID),
        *("product_add", "product_add_gradient"),
    )
)


class GridStruct(ctypes.Structure):
    """``bnext::Grid``: a :class:`qat.grid.Grid` in C, with zero point 0."""

    _fields_ = tuple((name, ctypes.c_double) for name in ("low", "high", "scale", "inverse"))


class Pass(ctypes.Structure):
    """``bnext::Pass``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("planes", "channels", "pixels")),
        *((name, ctypes.c_void_p) for name in ("x", "other", "grad", "out", "other_out", "inside")),
        *((name, ctypes.c_void_p) for name in ("gain", "offset", "slope", "center", "tilt", "shift")),
        ("factor", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("sums", "products", "slopes")),
        ("grid", GridStruct),
        ("inner", GridStruct),
        ("clip", ctypes.c_double),
        ("last", ctypes.c_int64),
        ("positive_zero", ctypes.c_int32),
        ("outside", ctypes.c_int32),
    )


class SignSums(ctypes.Structure):
    """``bnext::SignSums``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "inputs", "height", "width")),
        *((name, ctypes.c_int64) for name in ("channels", "kernel", "stride")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        ("x_type", ctypes.c_int32),
        ("weight_type", ctypes.c_int32),
    )


class Library(NamedTuple):
    """Functions of the library.

    Attributes:
        run_pass: takes a number, a type, a :class:`Pass`, and the last two that all take: ``parallel``, and
            how many threads.
        numbers: of the passes, by name.
        sign_sums: takes :class:`SignSums`.
        parallel: address of the OpenMP function by which torch starts its threads, ``None`` where it is not
            found.
    """

    run_pass: Any
    numbers: dict[str, int]
    sign_sums: Any
    parallel: Any


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The library, ``None`` where it was not built.

    Raises `NativeLibraryError` where the environment names a library or kernels that are not there, and for
    one of another version of this package.
    """
    if not has_library():
        return None
    kernels_in_use()  # says so where a variable names none that run here
    run = _taking(Pass, "bnext_qat_run_pass", ctypes.c_int, ctypes.c_int)
    run.restype = None
    sign_sums = _taking(SignSums, "bnext_qat_sign_sums")
    sign_sums.restype = ctypes.c_int
    name = library_function("bnext_qat_pass_name")
    name.argtypes = [ctypes.c_int]
    numbers: dict[str, int] = {}
    while (found := name(len(numbers))) is not None:
        numbers[found.decode()] = len(numbers)
    if not numbers.keys() >= PASSES:
        raise NativeLibraryError(_old())
    return Library(run, numbers, sign_sums, _parallel())


def _old() -> str:
    return f"{native_library_path()}: not of this version of the package; build it again: make native"


def _taking(struct: type[ctypes.Structure], name: str, *before: Any) -> Any:
    """A function that takes such a struct, and threads; another one tells the struct's size."""
    try:
        function, size = library_function(name), library_function(f"{name}_bytes")
    except NativeLibraryError as error:
        raise NativeLibraryError(_old()) from error
    size.restype = ctypes.c_int64
    if size() != ctypes.sizeof(struct):
        raise NativeLibraryError(_old())
    function.argtypes = [*before, ctypes.POINTER(struct), ctypes.c_void_p, ctypes.c_uint]
    return function


def _parallel() -> Any:
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:  # of torch's library or of one that it was linked with
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


_switched_off = False


@contextmanager
def torch_alone() -> Iterator[None]:
    """Let :func:`usable` say no meanwhile, to compare with torch's operators."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def usable(x: Tensor) -> bool:
    """Whether the library can work on tensors like ``x``, and with as many threads as torch.

    Raises `NativeLibraryError` where the environment names a library or kernels that are not there.
    """
    if _switched_off or type(x) not in (Tensor, nn.Parameter) or x.dtype not in TYPES:
        return False
    if x.device.type != "cpu" or not x.is_contiguous() or not x.numel():
        return False
    found = library()
    return found is not None and (found.parallel is not None or torch.get_num_threads() == 1)
