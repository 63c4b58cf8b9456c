"""ctypes structures of what the library takes, made from its own description of them.

The library says which fields each of its structs has (C++: ``src/training/shared.def``), so that nothing is
listed here a second time. What is known here is what each *kind* of field is in C and in Python
(``src/training/shared.h`` has the kinds of C++).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from torch import Tensor

from qat.errors import NativeLibraryError
from qat.grid import Grid
from qat.native.library import native_library_path

#: Turns a field's name, for the message, and value into what ctypes takes. ``None``: it takes the value.
InC = Callable[[str, Any], object] | None


class _Kind(NamedTuple):
    c_type: Any
    in_c: InC


def _address(name: str, tensor: Tensor) -> int:
    if not tensor.is_cpu:
        raise ValueError(f"{name} lies on {tensor.device}, the images on the CPU")
    return tensor.data_ptr()


def _optional_address(name: str, tensor: Tensor | None) -> int | None:
    return None if tensor is None else _address(name, tensor)


#: Kinds of fields. A tensor is contiguous, and of the size and type that its kind says in C++.
_KINDS: Final = {
    **dict.fromkeys(
        ("Values", "Results", "ChannelVector", "PlaneVector", "PlaneResults", "Mask", "MaskResults"),
        _Kind(ctypes.c_void_p, _address),
    ),
    "OptionalPlaneVector": _Kind(ctypes.c_void_p, _optional_address),
    "Size": _Kind(ctypes.c_int64, None),
    "Number": _Kind(ctypes.c_double, None),
    **dict.fromkeys(("Flag", "Answer", "Type"), _Kind(ctypes.c_int32, None)),
}


def another_version() -> NativeLibraryError:
    """The library and this package don't belong together."""
    return NativeLibraryError(
        f"{native_library_path()}: not of this version of the package; build it again: make native"
    )


@dataclass(frozen=True)
class Struct:
    """A struct of the library.

    Attributes:
        name: of the struct, or of the pass whose arguments it holds.
        c_type: the struct in ctypes.
        fields: how the value of each becomes what ctypes takes; by name, in order.
    """

    name: str
    c_type: type[ctypes.Structure]
    fields: dict[str, InC]

    def filled(self, values: Mapping[str, Any]) -> ctypes.Structure:
        """The struct with these values of its fields, which must live as long as it is used.

        Raises `NativeLibraryError` where a field has no value or a value no field: another version of the
        library has fields of other names. Raises `ValueError` for a tensor that isn't on the CPU.
        """
        try:
            given = [in_c(name, values[name]) if in_c else values[name] for name, in_c in self.fields.items()]
        except KeyError as error:
            raise self._other_fields(values) from error
        if len(values) != len(given):
            raise self._other_fields(values)
        return self.c_type(*given)

    def _other_fields(self, values: Mapping[str, Any]) -> NativeLibraryError:
        given, known = ", ".join(sorted(values)), ", ".join(sorted(self.fields))
        return NativeLibraryError(f"{another_version()} ({self.name} takes {known}; it was given {given})")


@dataclass
class Description:
    """What a library shares with Python.

    Attributes:
        enumerations: names of their values, whose numbers count from 0; by name.
        structs: by name.
        passes: the arguments of each pass; by name, in the order of their numbers.
    """

    enumerations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    structs: dict[str, Struct] = field(default_factory=dict)
    passes: dict[str, Struct] = field(default_factory=dict)


def described(text: str) -> Description:
    """What the text of ``bnext_qat_description`` describes.

    Raises `NativeLibraryError` for a text that this version of the package doesn't understand.
    """
    result, kinds = Description(), dict(_KINDS)
    try:
        for line in text.splitlines():
            what, name, *rest = line.split()
            if what == "enum":
                result.enumerations[name] = tuple(rest)
                continue
            struct = _struct(name, int(rest[0]), rest[1:], kinds)
            {"struct": result.structs, "pass": result.passes}[what][name] = struct
            if name == "Grid":
                kinds |= _kinds_of_grids(struct)
    except (KeyError, ValueError, IndexError) as error:
        raise another_version() from error
    return result


def _struct(name: str, size: int, fields: list[str], kinds: Mapping[str, _Kind]) -> Struct:
    by_name = {one: kinds[kind] for one, kind in (text.split(":") for text in fields)}
    layout = [(one, kind.c_type) for one, kind in by_name.items()]
    c_type = type(name, (ctypes.Structure,), {"_fields_": layout})
    if ctypes.sizeof(c_type) != size:
        raise ValueError(f"{name}: {ctypes.sizeof(c_type)} bytes, the library says {size}")
    return Struct(name, c_type, {one: kind.in_c for one, kind in by_name.items()})


def _kinds_of_grids(struct: Struct) -> dict[str, _Kind]:
    """A grid itself, and a pointer to one, which is null where there is none."""
    c_type, names = struct.c_type, tuple(struct.fields)

    def grid_in_c(name: str, grid: Grid) -> ctypes.Structure:
        try:
            return c_type(*[getattr(grid, one) for one in names])
        except AttributeError as error:
            raise another_version() from error

    def optional_in_c(name: str, grid: Grid | None) -> Any:
        return None if grid is None else ctypes.pointer(grid_in_c(name, grid))

    return {
        "Grid": _Kind(c_type, grid_in_c),
        "OptionalGrid": _Kind(ctypes.POINTER(c_type), optional_in_c),
    }
