"""Dataclasses as a JSON tree and named arrays, and back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from qat_export.integer.fields import digest, from_tree, named_arrays, to_tree

from qat.errors import CheckpointError
from tests.helpers.network_changes import differences


@dataclass(frozen=True, eq=False)
class Leaf:
    values: NDArray[np.int16]
    maybe: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Root:
    kind: Literal["one", "two"]
    count: int
    real: float
    single: np.float32
    flag: bool
    text: str
    pair: tuple[float, float]
    leaves: tuple[Leaf, ...]
    last: Leaf | None
    facts: dict[str, str]


def root(**changes: Any) -> Root:
    leaf = Leaf(np.arange(6, dtype=np.int16).reshape(2, 3), np.ones(2, np.float32))
    value = Root(
        "one",
        3,
        0.1,
        np.float32(0.1),
        True,
        "é\n\0",
        (1.0, -0.0),
        (leaf, leaf),
        None,
        {"a": "b", "": "\ud800"},
    )
    return replace(value, **changes)


def there_and_back(value: Root) -> Root:
    text = json.dumps(to_tree(value), allow_nan=False)
    back: Root = from_tree(Root, json.loads(text), dict(named_arrays(value)))
    return back


def test_every_kind_of_field_comes_back_as_it_was() -> None:
    for value in (root(), root(leaves=(), last=Leaf(np.zeros((0, 4), np.int16), None), kind="two", facts={})):
        assert list(differences(value, there_and_back(value))) == []


@given(real=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_comes_back_bit_for_bit(real: float) -> None:
    value = root(real=real)
    assert list(differences(value, there_and_back(value))) == []


@given(single=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_every_finite_float32_number_comes_back_bit_for_bit(single: float) -> None:
    value = root(single=np.float32(single))
    assert list(differences(value, there_and_back(value))) == []


def test_arrays_are_named_by_the_path_to_them() -> None:
    value = root(last=Leaf(np.zeros(1, np.int16), None))
    names = [name for name, _ in named_arrays(value)]
    assert names == ["leaves.0.values", "leaves.0.maybe", "leaves.1.values", "leaves.1.maybe", "last.values"]
    assert dict(named_arrays(value))["leaves.1.values"] is value.leaves[1].values


def test_a_digest_is_what_its_definition_says() -> None:
    array = np.array([[1, -2, 300]], np.int16)
    opening = b'["int16",[1,3]]\n'
    assert digest(array) == hashlib.sha256(opening + b"\x01\x00\xfe\xff\x2c\x01").hexdigest()
    assert digest(array.astype(">i2")) == digest(np.asfortranarray(array)) == digest(array)


def test_type_and_shape_are_part_of_a_digest() -> None:
    zeros = np.zeros((2, 3), np.int8)
    others = (zeros.view(np.uint8), zeros.reshape(3, 2), zeros.ravel())
    assert len({digest(zeros), *map(digest, others)}) == 4


@pytest.mark.parametrize(
    ("key", "node", "message"),
    [
        ("kind", "three", r"^kind: found 'three', allowed: 'one', 'two'$"),
        ("kind", ["one"], r"^kind: found a list of 1, allowed"),
        ("count", 3.0, r"^count: found 3\.0, expected a whole number$"),
        ("count", True, r"^count: found True, expected a whole number$"),
        ("count", "3", r"^count: found '3', expected"),
        ("real", 1, r"^real: found 1, expected a number with a point$"),
        ("real", None, r"^real: found None"),
        ("single", 0.1, r"^single: found 0\.1, expected a float32 number"),
        ("single", 1e300, r"^single: found 1e\+300, expected a float32 number"),
        ("single", float("nan"), r"^single: found nan, expected a float32 number"),
        ("single", 1, r"^single: found 1, expected a float32 number"),
        ("flag", 1, r"^flag: found 1, expected true or false$"),
        ("text", 1, r"^text: found 1, expected a text$"),
        ("text", None, r"^text: found None, expected a text$"),
        ("pair", [1.0], r"^pair: found a list of 1, expected a list of 2$"),
        ("pair", "ab", r"^pair: found 'ab', expected a list of 2$"),
        ("pair", [1.0, 2], r"^pair\.1: found 2, expected"),
        ("leaves", {}, r"^leaves: found an object, expected a list$"),
        ("leaves", [[]], r"^leaves\.0: found a list of 0, expected an object$"),
        ("last", [], r"^last: found a list of 0, expected an object$"),
        ("facts", [], r"^facts: found a list of 0, expected an object$"),
        ("facts", {"a": 1}, r"^facts\['a'\]: found 1, expected a text$"),
        ("text", {"a": [[]]}, r"^text: found an object"),
        ("count", "x" * 1000, r"^count: found 'x{59}…, expected"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(key: str, node: object, message: str) -> None:
    tree = to_tree(root()) | {key: node}
    with pytest.raises(CheckpointError, match=message):
        from_tree(Root, tree, dict(named_arrays(root())))


def test_missing_and_unknown_keys_are_refused_by_name() -> None:
    value = root()
    tree, arrays = to_tree(value), dict(named_arrays(value))
    del tree["leaves"][1]["maybe"]
    with pytest.raises(CheckpointError, match=r"^leaves\.1\.maybe: missing$"):
        from_tree(Root, tree, dict(arrays))
    with pytest.raises(CheckpointError, match=r"^the network: unknown key 'other\\n'$"):
        from_tree(Root, to_tree(value) | {"other\n": 1}, dict(arrays))
    with pytest.raises(CheckpointError, match=r"^the network: found a list of 0, expected an object$"):
        from_tree(Root, [], dict(arrays))


def test_an_array_that_is_missing_damaged_or_of_another_type_is_refused_by_name() -> None:
    value = root()
    tree, arrays = to_tree(value), dict(named_arrays(value))
    name = "leaves.1.values"
    with pytest.raises(CheckpointError, match=r"^leaves\.1\.values: the tensor is missing$"):
        from_tree(Root, tree, {key: array for key, array in arrays.items() if key != name})
    with pytest.raises(CheckpointError, match=r"^leaves\.1\.values: the tensor is damaged: its SHA-256"):
        from_tree(Root, tree, arrays | {name: arrays[name] + np.int16(1)})
    with pytest.raises(CheckpointError, match=r"^leaves\.1\.values: found int32, expected int16$"):
        from_tree(Root, tree, arrays | {name: arrays[name].astype(np.int32)})
    tree["leaves"][1]["values"] = None
    with pytest.raises(
        CheckpointError, match=r"^leaves\.1\.values: found None, expected a tensor's SHA-256$"
    ):
        from_tree(Root, tree, dict(arrays))


def test_arrays_that_are_used_are_taken_out_so_that_the_rest_shows() -> None:
    value = root()
    arrays = dict(named_arrays(value)) | {"other": np.zeros(1)}
    from_tree(Root, to_tree(value), arrays)
    assert list(arrays) == ["other"]


def test_an_optional_array_left_out_stays_out() -> None:
    value = root(leaves=(Leaf(np.zeros(1, np.int16), None),))
    assert to_tree(value)["leaves"][0]["maybe"] is None
    assert there_and_back(value).leaves[0].maybe is None
