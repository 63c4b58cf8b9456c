"""Provenance: all processes of a run must read the same images, checkpoints and states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.errors import QatError
from qat.system.collectives import world
from qat.train.provenance import check_alike
from tests.helpers.joined_processes import call


def checked(facts: dict[str, str], states: list[str]) -> str:
    """What a process says whose facts are ``facts``, at ``{rank}`` its own, and whose state is its own."""
    mine = {key: value.format(rank=world().rank) for key, value in facts.items()}
    try:
        check_alike(mine, Path(states[world().rank]))
    except QatError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("facts", "states", "said"),
    [
        ({"a": "x", "b": "y"}, ["s", "s"], ""),
        (
            {"a": "x", "train_fingerprint": "f{rank}"},
            ["s", "s"],
            "DataError: process 1 of 2: train_fingerprint: found f1, allowed: what the first one has, f0",
        ),
        (
            {"a": "x"},
            ["s", "t"],
            "CheckpointError: process 1 of 2 goes on from t, the first from s; the run's folder must be one "
            "that all machines share",
        ),
    ],
    ids=["same", "data", "state"],
)
def test_a_process_that_sees_something_else_is_refused(
    facts: dict[str, str], states: list[str], said: str
) -> None:
    assert call(checked, facts, states) == ["", said]


def test_a_process_alone_is_not_compared() -> None:
    check_alike({"versions": json.dumps({})}, None)
