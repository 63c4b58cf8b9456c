"""Reads pickles without running anything: objects become plain data or inert stand-ins.

A pickle is a small program. Python's own unpickler imports what the program names and calls it.
Here ``pickletools`` decodes the program, which executes nothing, and the stack machine below follows
it by itself. It never imports or looks up a name of the file. Names are texts, and "calling" one gives:

- for the few names in ``_BUILDERS`` (tensors, numbers, dictionaries) what a small function of this
  file makes of the arguments;
- for every other name a :class:`StandIn`, which ignores what it is given: ``argparse.Namespace``,
  configuration objects, enums, paths, any class that isn't installed.

Tensors stay descriptions (:class:`TensorRecord`) until somebody asks for their values.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np

from qat.errors import CheckpointError

#: Modules and functions that run commands or code. They would stay inert here like any other name, but a file
#: that has them was made to harm whoever reads it by other means, so it is refused.
_HARMFUL: Final = re.compile(
    r"(os|posix|nt|subprocess|sys|pty|runpy|importlib|ctypes|socket|shutil|webbrowser|code|codeop|commands"
    r"|timeit|pdb|bdb|pip)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|input|breakpoint|__import__)"
)
#: Opcodes whose argument is the value itself, in the names of ``pickletools``.
_VALUES: Final = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
#: The most bytes that a number has.
_NUMBER_BYTES: Final = 16
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Source(Protocol):
    """Where a pickle is read from."""

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, or fewer at the end."""

    def readline(self) -> bytes:
        """The bytes up to the next line feed, and with it."""


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


class _NumpyType:
    """A NumPy number type."""

    def __init__(self, name: str) -> None:
        self.name, self.byte_order = name, "="


def kind_of(value: object) -> str:
    """What a value is, as a message says it."""
    if isinstance(value, StandIn):
        return value.kind
    return "Tensor" if isinstance(value, TensorRecord) else type(value).__name__


def unpickle(source: Source, persistent: Callable[[Any], Any]) -> Any:
    """The data that the next pickle in ``source`` describes.

    Args:
        source: stands behind the pickle afterwards.
        persistent: what to put for a reference out of the pickle, given its identifier; ``torch.save``
            writes storages so.

    Raises:
        CheckpointError: it names something that runs commands.
        Exception: of almost any kind, where the pickle is damaged.
    """
    machine = _Machine(persistent)
    for opcode, argument, _ in pickletools.genops(source):  # type: ignore[arg-type]
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        else:
            match name:
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = stack[-1]
                case "MARK":
                    self.below.append(stack)
                    self.stack = []
                case "POP_MARK":
                    self._above_mark()
                case "POP":
                    # As Python has it, this also takes away a mark that nothing stands on.
                    stack.pop() if stack else self._above_mark()
                case "DUP":
                    stack.append(stack[-1])
                case _:
                    self._compose(name, argument)

    def _compose(self, name: str, argument: Any) -> None:
        """Follow an opcode that makes something of what is on the stack."""
        stack = self.stack
        match name:
            # Sets become lists: their members are never asked for, and hashing could take forever.
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise ValueError("the stack is too short")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = self._above_mark()
                self.stack.append(tuple(items))
            case "LIST" | "FROZENSET":
                items = self._above_mark()
                self.stack.append(items)
            case "DICT":
                items = self._above_mark()
                self.stack.append(_filled({}, items))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._above_mark()
                _extend(self.stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _filled(stack[-1], [key, value])
            case "SETITEMS":
                items = self._above_mark()
                _filled(self.stack[-1], items)
            case _:
                self._construct(name, argument)

    def _construct(self, name: str, argument: Any) -> None:
        """Follow an opcode that would import, call or set attributes."""
        stack = self.stack
        match name:
            case "GLOBAL":
                stack.append(_named(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(module, attribute))
            case "PERSID":
                stack.append(self.persistent(argument))
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case "OBJ":
                function, *arguments = self._above_mark()
                self.stack.append(_called(function, tuple(arguments)))
            case "INST":
                arguments = self._above_mark()
                self.stack.append(_called(_named(*str(argument).split(" ", 1)), tuple(arguments)))
            case "BUILD":
                _set_state(stack[-2], stack.pop())
            case _:  # extension codes and out-of-band buffers, which no torch.save writes
                raise ValueError(f"opcode {name} is not read")

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items


def _named(module: object, attribute: object) -> Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise TypeError("a name that is no text")
    name = f"{module}.{attribute}"
    if _HARMFUL.fullmatch(name):
        raise CheckpointError(
            f"refused: it asks to unpickle {name[:100]}, which runs code and is part of no weights; "
            "nothing of the file was run"
        )
    return Global(name)


def _called(function: object, arguments: object) -> Any:
    if not isinstance(arguments, tuple):
        raise TypeError("arguments that are no tuple")
    if not isinstance(function, Global):
        return StandIn("an object of no known class")
    build = _BUILDERS.get(function.name)
    return StandIn(function.name) if build is None else build(*arguments)


def _set_state(target: object, state: Any) -> None:
    if isinstance(target, StandIn):
        target.state = state
    elif isinstance(target, _NumpyType):
        target.byte_order = ">" if state[1] == ">" else "<"
    # Attributes of tensors and dictionaries are never asked for.


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, StandIn):
        raise TypeError("items for what is no list")


def _filled(target: Any, items: list[Any]) -> Any:
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError("pairs for what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_hashable(key)] = value
    return target


def _hashable(key: object) -> object:
    """``key``, or something unequal to all else where its hash could take forever, as nested tuples' can."""
    small = type(key) is int and abs(key) < 2**31
    return key if small or key is None or isinstance(key, str | bytes | bool) else object()


# What names of the file stand for; arguments that don't fit raise and leave the file unread.


# None copies what it is given: a few bytes of a pickle could ask for a large value a thousand times.


def _tensor(storage: object, offset: int, size: Any, stride: Any, *rest: Any) -> TensorRecord | StandIn:
    """``torch._utils._rebuild_tensor`` and ``_v2``, whose ``rest`` are gradients, hooks and metadata."""
    strange = len(rest) > 2 and rest[2]  # a conjugate view
    if strange or not isinstance(storage, StorageRecord) or not (type(size) is type(stride) is tuple):
        return StandIn("a tensor of another kind")
    return TensorRecord(storage, offset, size, stride)


def _tensor_v3(
    storage: object, offset: int, size: Any, stride: Any, gradient: object, hooks: object, dtype: Any, *_: Any
) -> TensorRecord | StandIn:
    found = _tensor(storage, offset, size, stride)
    if isinstance(found, TensorRecord) and isinstance(dtype, Global):
        return replace(found, dtype=dtype.name)
    return StandIn("a tensor of another kind")


def _first(first: Any, *_: Any) -> Any:
    """A parameter is the tensor in it, a ``torch.Size`` its tuple."""
    return first


def _of_subclass(function: object, kind: object, arguments: object, *_: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, or of a subclass."""
    return _called(function, arguments)


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


def _numpy_type(name: object, *_: Any) -> _NumpyType | StandIn:
    number = isinstance(name, str) and re.fullmatch(r"[fiub][1248]", name)
    return _NumpyType(str(name)) if number else StandIn("numpy.dtype")


def _numpy_number(kind: object, data: object = b"") -> float | int | bool | StandIn:
    """A NumPy number as Python's; NumPy's own function takes any object from the file."""
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
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
