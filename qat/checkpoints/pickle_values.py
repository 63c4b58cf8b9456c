"""What a pickle's names and calls become: plain data for tensors and numbers, else inert stand-ins.

A name stays a text (:class:`Global`), and "calling" one gives what a small function of this file makes of the
arguments, or, for every name that has none, a :class:`StandIn`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from qat.errors import CheckpointError

#: Modules and functions that run commands or code. They would stay inert here like any other name, but a file
#: that has them was made to harm whoever reads it by other means, so it is refused.
_HARMFUL: Final = re.compile(
    r"(os|posix|nt|subprocess|sys|pty|runpy|importlib|ctypes|socket|shutil|webbrowser|code|codeop|commands"
    r"|timeit|pdb|bdb|pip)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|input|raw_input|breakpoint|__import__|print"
    r"|exit|quit|setattr|delattr|globals|locals|vars|apply|reload)"
    r"|_?io\.(open|open_code|FileIO)"
)
#: Kind of the stand-in for a tensor that is not plain and dense: sparse, quantized, without values, sharded.
OTHER_TENSOR: Final = "a tensor of another kind"
_REBUILDS: Final = "torch._utils._rebuild_"
#: The most bytes that a number has.
_NUMBER_BYTES: Final = 16


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions, such as ``torch.FloatStorage``; nothing stands behind it."""

    name: str


@dataclass(frozen=True)
class StorageRecord:
    """Numbers that lie elsewhere in the file.

    Attributes:
        type: name of the storage's class, such as ``torch.FloatStorage``.
        key: its name in the file.
        count: how many numbers it says it has.
        start: where it begins in the storage of that key, counted in numbers.
    """

    type: str
    key: str
    count: int
    start: int = 0


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that the file describes. Nothing is checked yet.

    Attributes:
        storage: its numbers.
        offset: of its first number in the storage, counted in numbers.
        shape: sides.
        stride: steps in the storage, one a side.
        dtype: such as ``torch.uint16``, where the storage's class doesn't tell.
    """

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None


class StandIn(dict[Any, Any]):
    """An object of a class that isn't read. It can hold items, as the dictionaries of other packages do.

    Attributes:
        kind: name of the class.
        state: what its attributes would have been set from; for messages only.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.state: object = None


class NumpyType:
    """A NumPy number type, such as ``f8``, and the order of its bytes."""

    def __init__(self, name: str) -> None:
        self.name, self.byte_order = name, "="


def is_tensor(value: object) -> bool:
    """Whether it is a tensor, or stands for one."""
    other = isinstance(value, StandIn) and value.kind == OTHER_TENSOR
    return other or isinstance(value, Tensor | TensorRecord)


def kind_of(value: object) -> str:
    """What a value is, as a message says it."""
    if isinstance(value, StandIn):
        return value.kind
    return "Tensor" if isinstance(value, TensorRecord) else type(value).__name__


def named(module: object, attribute: object) -> Global:
    """A name of the file.

    Raises:
        CheckpointError: it is one of something that runs commands.
        TypeError: it is no text.
    """
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise TypeError("a name that is no text")
    name = f"{module}.{attribute}"
    if _HARMFUL.fullmatch(name):
        raise CheckpointError(
            f"refused: it asks to unpickle {name[:100]}, which runs code and is part of no weights; "
            "nothing of the file was run"
        )
    return Global(name)


def called(function: object, arguments: object) -> Any:
    """What takes the place of ``function(*arguments)``, which is never called.

    Raises:
        Exception: of almost any kind, for arguments that a tensor or number can't have.
    """
    if not isinstance(arguments, tuple):
        raise TypeError("arguments that are no tuple")
    if not isinstance(function, Global):
        return StandIn("an object of no known class")
    build = _BUILDERS.get(function.name)
    if build is not None:
        return build(*arguments)
    return StandIn(OTHER_TENSOR if function.name.startswith(_REBUILDS) else function.name)


# What names of the file stand for; arguments that don't fit raise and leave the file unread.


# None copies what it is given: a few bytes of a pickle could ask for a large value a thousand times.


def _tensor(storage: object, offset: int, size: Any, stride: Any, *rest: Any) -> TensorRecord | StandIn:
    """``torch._utils._rebuild_tensor`` and ``_v2``, whose ``rest`` are gradients, hooks and metadata."""
    strange = len(rest) > 2 and rest[2]  # a conjugate view
    if strange or not isinstance(storage, StorageRecord) or not (type(size) is type(stride) is tuple):
        return StandIn(OTHER_TENSOR)
    return TensorRecord(storage, offset, size, stride)


def _tensor_v3(
    storage: object, offset: int, size: Any, stride: Any, gradient: object, hooks: object, dtype: Any, *_: Any
) -> TensorRecord | StandIn:
    found = _tensor(storage, offset, size, stride)
    if isinstance(found, TensorRecord) and isinstance(dtype, Global):
        return replace(found, dtype=dtype.name)
    return StandIn(OTHER_TENSOR)


def _first(first: Any, *_: Any) -> Any:
    """A parameter is the tensor in it, a ``torch.Size`` its tuple."""
    return first


def _of_subclass(function: object, kind: object, arguments: object, *_: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, or of a subclass."""
    return called(function, arguments)


def _dictionary(items: Any = None, *_: Any) -> dict[Any, Any]:
    if items is None or items == ():
        return {}
    return items if isinstance(items, dict) else StandIn("collections.OrderedDict")


def _default_dictionary(*_: Any) -> dict[Any, Any]:
    return {}


def _reconstructed(kind: object, *_: Any) -> StandIn:
    """``copyreg._reconstructor``: how old protocols make an object of a class."""
    return StandIn(kind.name if isinstance(kind, Global) else kind_of(kind))


def _encoded(text: object, encoding: object = None) -> bytes | StandIn:
    """``_codecs.encode``: how protocol 2 writes bytes. Those of a number are few."""
    short = isinstance(text, str) and len(text) <= _NUMBER_BYTES
    return str(text).encode("latin1") if short and encoding == "latin1" else StandIn("bytes")


def _numpy_type(name: object, *_: Any) -> NumpyType | StandIn:
    number = isinstance(name, str) and re.fullmatch(r"[fiub][1248]", name)
    return NumpyType(str(name)) if number else StandIn("numpy.dtype")


def _numpy_number(kind: object, data: object = b"") -> float | int | bool | StandIn:
    """A NumPy number as Python's; NumPy's own function takes any object from the file."""
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes):
        return StandIn("numpy.generic")
    value: float | int | bool = np.frombuffer(data, np.dtype(kind.byte_order + kind.name), count=1)[0].item()
    return value


_BUILDERS: Final[Mapping[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    "torch.Size": _first,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
