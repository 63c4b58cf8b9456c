"""Structures made from a library's description of them: laid out as it says, filled by name or not at all."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from qat.errors import NativeLibraryError
from qat.grid import Grid
from qat.native.structures import described

TEXT = """enum Type float32 float64
struct Grid 32 low:Number high:Number scale:Number inverse:Number
struct Sizes 16 count:Size small:Type
pass scale 24 x:Values factor:OptionalPlaneVector answer:Answer
pass prelu 48 x:Values grid:Grid on:Flag
pass shrink 24 threshold:Number grid:OptionalGrid mask:Mask
"""


@pytest.fixture(autouse=True)
def _a_library_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.so").touch()
    monkeypatch.setenv("BNEXT_QAT_NATIVE_LIBRARY", str(tmp_path / "old.so"))


def test_names_stand_in_the_order_of_their_numbers() -> None:
    found = described(TEXT)
    assert found.enumerations == {"Type": ("float32", "float64")}
    assert list(found.structs) == ["Grid", "Sizes"]
    assert list(found.passes) == ["scale", "prelu", "shrink"]


def test_fields_are_filled_by_name_in_any_order() -> None:
    x, factor = torch.ones(2), torch.ones(1)
    filled = described(TEXT).passes["scale"].filled({"answer": 0, "factor": factor, "x": x})
    assert (filled.x, filled.factor, filled.answer) == (x.data_ptr(), factor.data_ptr(), 0)
    assert [name for name, _ in filled._fields_] == ["x", "factor", "answer"]


def test_what_is_optional_may_be_none() -> None:
    passes, mask = described(TEXT).passes, torch.ones(2, dtype=torch.bool)
    assert passes["scale"].filled({"x": mask, "factor": None, "answer": 0}).factor is None
    assert not passes["shrink"].filled({"threshold": 0.5, "grid": None, "mask": mask}).grid


def test_a_grid_is_given_whole_or_as_a_pointer_to_one() -> None:
    passes, grid, x = described(TEXT).passes, Grid(0.25, 4, signed=True), torch.ones(2)
    whole = passes["prelu"].filled({"x": x, "grid": grid, "on": True})
    pointed = passes["shrink"].filled({"threshold": 0.5, "grid": grid, "mask": x})
    for one in (whole.grid, pointed.grid.contents):
        assert (one.low, one.high, one.scale, one.inverse) == (-8, 7, 0.25, 4)
    assert whole.on == 1


@pytest.mark.parametrize(
    "values",
    [
        {"count": 1},
        {"count": 1, "small": 1, "large": 1},
        {"count": 1, "smal": 1},
        {},
    ],
    ids=["one missing", "one too many", "misspelt", "none"],
)
def test_missing_and_unknown_fields_are_refused_by_name(values: dict[str, int]) -> None:
    with pytest.raises(
        NativeLibraryError, match=r"old\.so: .*make native.*\(Sizes takes count, small; .*given"
    ):
        described(TEXT).structs["Sizes"].filled(values)


def test_a_tensor_elsewhere_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="x lies on meta"):
        described(TEXT).passes["scale"].filled(
            {"x": torch.ones(1, device="meta"), "factor": None, "answer": 0}
        )


@pytest.mark.parametrize(
    "text",
    [
        "struct Sizes 16 count:Size small:Kind",
        "struct Sizes 24 count:Size small:Type",
        "struct Sizes 16 count small",
        "struct Sizes sixteen count:Size",
        "struct Sizes",
        "struct",
        "union Sizes 8 count:Size",
        "pass scale 32 grid:Grid",
    ],
    ids=[
        "kind",
        "size",
        "no kinds",
        "no number",
        "no size",
        "no name",
        "no struct",
        "a grid before its struct",
    ],
)
def test_a_description_of_something_else_is_another_version(text: str) -> None:
    with pytest.raises(NativeLibraryError, match=r"old\.so: not of this version of the package"):
        described(text)


def test_fields_lie_where_c_puts_them() -> None:
    c_type = described("pass mixed 32 on:Flag x:Values also:Flag count:Size").passes["mixed"].c_type
    assert [getattr(c_type, name).offset for name in ("on", "x", "also", "count")] == [0, 8, 16, 24]
    assert ctypes.sizeof(c_type) == 32
