"""Pickles are read without importing, calling or setting anything that they name."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from qat.checkpoints.pickle_values import Global, StandIn, StorageRecord, TensorRecord
from qat.checkpoints.unpickling import unpickle
from qat.errors import CheckpointError


class Colour(enum.Enum):
    RED = 1


class Settings(dict):  # type: ignore[type-arg]
    pass


class Path3(pathlib.PurePosixPath):
    pass


class Calls:
    """Pickled as ``function(*arguments)``, then ``__setstate__(state)`` where a state is given."""

    def __init__(self, function: Any, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def read(data: bytes) -> Any:
    return unpickle(io.BytesIO(data), lambda identifier: identifier)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_back_as_python_reads_them(protocol: int) -> None:
    shared = [1]
    content = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 0.5, float("inf")],
        "texts": ["", "ä\n'", "x" * 300, "😀"],
        "constants": [None, True, False],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), tuple(range(20))],
        "nested": {1: {"a": [shared, shared]}, None: {}},
        "long": list(range(3000)),
    }
    found = read(pickle.dumps(content, protocol))
    assert found == content
    assert found["nested"][1]["a"][0] is found["nested"][1]["a"][1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_come_back(protocol: int) -> None:
    assert read(pickle.dumps([b"", b"abc", b"x" * 300], protocol)) == [b"", b"abc", b"x" * 300]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1, data="/images"),
        types.SimpleNamespace(a=1),
        pathlib.PurePosixPath("/a/b"),
        Path3("/a"),
        datetime.datetime(2026, 1, 1),
        Colour.RED,
        Calls(sorted, [3, 1]),
        np.zeros((2, 3)),
        torch.device("cpu"),
        frozenset({1}),
        Calls(Colour, 1, state={"__class__": 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_become_stand_ins_beside_what_can_be_read(value: object, protocol: int) -> None:
    found = read(pickle.dumps({"before": 1, "object": value, "after": 2}, protocol))
    assert (found["before"], found["after"]) == (1, 2)
    assert isinstance(found["object"], StandIn | list)


def test_dictionaries_of_other_classes_keep_their_items() -> None:
    default: Any = collections.defaultdict(list, {"a": 1})
    for value in (Settings(a=1), collections.OrderedDict(a=1), default, collections.Counter("a")):
        assert dict(read(pickle.dumps(value, 2))) == {"a": 1}, type(value)


def test_a_class_that_is_not_installed_is_not_looked_for() -> None:
    found = read(b"\x80\x02cno_such_package.models\nConfig\n)\x81}b.")
    assert found.kind == "no_such_package.models.Config"


def test_no_module_is_imported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for data in (
        b"\x80\x02ctrap_module\nf\n)R.",
        b"\x80\x04\x8c\x0btrap_module\x8c\x01f\x93)R.",
        b"(itrap_module\nf\n.",
    ):
        assert read(data).kind == "trap_module.f"
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ["touch {}"]),
        (subprocess.Popen, [["touch", "{}"]]),
        (eval, ["open({!r}, 'w')"]),
        (exec, ["open({!r}, 'w')"]),
        (open, ["{}", "w"]),
        (__import__, ["this"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_runs_commands_is_refused_by_name_and_not_run(
    tmp_path: pathlib.Path, function: Any, arguments: list[Any], protocol: int
) -> None:
    trace = tmp_path / "trace"
    filled = [text.format(trace) if isinstance(text, str) else [*text[:-1], str(trace)] for text in arguments]
    data = pickle.dumps({"x": Calls(function, *filled)}, protocol)
    with pytest.raises(
        CheckpointError, match=rf"refused: it asks to unpickle \w+\.{function.__name__}, which runs"
    ):
        read(data)
    assert not trace.exists()


def test_a_chain_of_calls_is_not_followed(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    # getattr(pathlib.Path(trace), "touch")()
    chain = Calls(getattr, Calls(pathlib.PosixPath, str(trace)), "touch")
    data = pickle.dumps(chain, 2)[:-1] + b")R."
    assert read(data).kind == "an object of no known class"
    assert not trace.exists()


def test_no_attribute_of_a_name_or_value_is_set() -> None:
    harmless = b"}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb"
    before = dict(torch.nn.Parameter.__dict__), dict(torch._utils.__dict__), dict(StandIn.__dict__)
    for name in (b"ctorch.nn.parameter\nParameter\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cx\ny\n)R"):
        read(b"\x80\x02" + name + harmless + b".")
    assert before == (dict(torch.nn.Parameter.__dict__), dict(torch._utils.__dict__), dict(StandIn.__dict__))


def test_tensors_stay_descriptions() -> None:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    data = (
        b"\x80\x02"
        + call
        + storage
        + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR."
    )
    storage_of = StorageRecord("torch.FloatStorage", "0", 6)
    found = unpickle(io.BytesIO(data), lambda identifier: storage_of)
    assert found == TensorRecord(storage_of, 0, (2, 3), (3, 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b".",
        b"\x80\x02N",
        b"\x80\x02h\x05.",  # a memo that was never set
        b"\x80\x02NNNs.",  # an item for what is no dictionary
        b"\x80\x02a.",
        b"\x80\x02t.",
        b"\x80\x02\x86.",
        b"\x80\x02cx\ny\nNR.",  # arguments that are no tuple
        b"\x80\x02K\x01K\x01\x93.",  # a name that is no text
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02\xff.",
        b"\x80\x02X\xff\xff\xff\x7fab.",  # a text longer than the file
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",  # a byte array of 9 million TB
    ],
)
def test_a_damaged_pickle_raises(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError, KeyError, TypeError)):
        read(data)


# Small files that ask for much


def test_a_memo_index_takes_no_memory() -> None:
    assert read(b"\x80\x02Nr\xff\xff\xff\xff.") is None


def test_keys_nested_without_end_are_not_hashed() -> None:
    doubled = b"K\x01" + b"\x32\x86" * 200  # (x, x) two hundred times: 2**200 leaves
    (value,) = read(b"\x80\x02}" + doubled + b"K\x07s.").values()
    assert value == 7
    assert len(read(b"\x80\x04\x8f(" + doubled + b"\x90.")) == 1  # a set of it
    assert len(read(b"\x80\x04(" + doubled + b"\x91.")) == 1  # a frozen set


def test_calls_copy_nothing() -> None:
    text = "x" * 1_000_000
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    found = read(
        b"\x80\x02("
        + b"X"
        + len(text).to_bytes(4, "little")
        + text.encode()
        + b"q\x00"
        + again * 1000
        + b"l."
    )
    assert {type(value) for value in found[1:]} == {StandIn}


def test_names_are_only_names() -> None:
    assert read(pickle.dumps([argparse.Namespace, len], 2)) == [
        Global("argparse.Namespace"),
        Global("__builtin__.len"),
    ]
