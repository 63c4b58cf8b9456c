"""What the native library offers to a training step, as C calls it, and whether it can be used.

What its functions take is read from its own description (:mod:`qat.native.structures`).
:mod:`qat.native.passes` and :mod:`qat.native.signs` call it with tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import NativeLibraryError
from qat.native.library import has_library, kernels_in_use, library_function
from qat.native.structures import Struct, another_version, described


class Library(NamedTuple):
    """Functions of the library, and what they take.

    Attributes:
        run_pass: takes the numbers of a pass and of a type; how many values a tensor has, how many channels,
            and how many pixels a plane; the address of the pass's arguments; and the last two that all
            functions take: ``parallel``, and how many threads.
        sign_sums: takes the struct ``SignSums``; returns the number of a status.
        passes: the arguments of each pass, by name.
        numbers: of the passes, by name.
        sign_sums_arguments: the struct ``SignSums``.
        sign_statuses: names of what :attr:`sign_sums` returns.
        types: numbers of the types of tensors.
        parallel: address of the OpenMP function by which torch starts its threads, ``None`` where it is not
            found.
    """

    run_pass: Any
    sign_sums: Any
    passes: dict[str, Struct]
    numbers: dict[str, int]
    sign_sums_arguments: Struct
    sign_statuses: tuple[str, ...]
    types: dict[torch.dtype, int]
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
    try:
        names = ("bnext_qat_description", "bnext_qat_run_pass", "bnext_qat_sign_sums")
        description, run_pass, sign_sums = (library_function(name) for name in names)
    except NativeLibraryError as error:
        raise another_version() from error
    found = described(description().decode())
    try:
        sign_sums_arguments = found.structs["SignSums"]
        statuses = found.enumerations["SignStatus"]
        types = {getattr(torch, name): number for number, name in enumerate(found.enumerations["Type"])}
    except (KeyError, AttributeError) as error:
        raise another_version() from error
    of_all = (ctypes.c_void_p, ctypes.c_uint)
    run_pass.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p, *of_all]
    run_pass.restype = None
    sign_sums.argtypes = [ctypes.POINTER(sign_sums_arguments.c_type), *of_all]
    sign_sums.restype = ctypes.c_int32
    numbers = {name: number for number, name in enumerate(found.passes)}
    return Library(
        run_pass, sign_sums, found.passes, numbers, sign_sums_arguments, statuses, types, _parallel()
    )


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
    if _switched_off or type(x) not in (Tensor, nn.Parameter):
        return False
    if x.device.type != "cpu" or not x.is_contiguous() or not x.numel():
        return False
    found = library()
    if found is None or x.dtype not in found.types:
        return False
    return found.parallel is not None or torch.get_num_threads() == 1
