"""Reads pickles without running anything: objects become plain data or inert stand-ins.

A pickle is a small program. Python's own unpickler imports what the program names and calls it.
Here ``pickletools`` decodes the program, which executes nothing, and the stack machine below follows
it by itself. It never imports or looks up a name of the file. Names are texts, and "calling" one gives:

- for a few names (tensors, numbers, dictionaries) what a small function of
  :mod:`qat.checkpoints.pickle_values` makes of the arguments;
- for every other name a stand-in, which ignores what it is given: ``argparse.Namespace``, configuration
  objects, enums, paths, any class that isn't installed.

Tensors stay descriptions until somebody asks for their values.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, Final, Protocol

from qat.checkpoints.pickle_values import NumpyType, StandIn, called, named

#: Opcodes whose argument is the value itself, in the names of ``pickletools``.
_VALUES: Final = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Source(Protocol):
    """Where a pickle is read from."""

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, or fewer at the end."""

    def readline(self) -> bytes:
        """The bytes up to the next line feed, and with it."""


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
                stack.append(named(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(named(module, attribute))
            case "PERSID":
                stack.append(self.persistent(argument))
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(called(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(called(function, arguments))
            case "OBJ":
                function, *arguments = self._above_mark()
                self.stack.append(called(function, tuple(arguments)))
            case "INST":
                arguments = self._above_mark()
                self.stack.append(called(named(*str(argument).split(" ", 1)), tuple(arguments)))
            case "BUILD":
                _set_state(stack[-2], stack.pop())
            case _:  # extension codes and out-of-band buffers, which no torch.save writes
                raise ValueError(f"opcode {name} is not read")

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items


def _set_state(target: object, state: Any) -> None:
    if isinstance(target, StandIn):
        target.state = state
    elif isinstance(target, NumpyType):
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
