"""A network is found wherever training code puts its state dict."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from tests.helpers.checkpoints import equal
from tests.helpers.foreign_checkpoints import OTHER, STATE, behind, opened, refusal


class Mode(enum.Enum):
    BEST = 1


class Experiment:
    def __init__(self) -> None:
        self.lr = 0.1


@pytest.mark.parametrize(
    "place",
    ["state_dict", "model", "model_state_dict", "model_ema", "net", "ema", "weights", "state/model", "a/b/c"],
)
def test_a_state_dict_is_found_under_any_key(tmp_path: Path, place: str) -> None:
    content: Any = behind("module.")
    for key in reversed(place.split("/")):
        content = {"epoch": 7, key: content}
    found = opened(tmp_path, content)
    assert equal(found.state, STATE)
    assert (found.format, found.metadata["epoch"]) == ("published training checkpoint", "7")


def test_a_lightning_checkpoint_loads_and_other_modules_are_named(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {
            "criterion.weight": torch.ones(3),
            **behind("model."),
            "teacher.fc.weight": torch.ones(2),
            "teacher.layer1.weight": torch.ones(2),
        },
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.9)}},
        "hyper_parameters": argparse.Namespace(lr=0.1),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}}],
    }
    found = opened(tmp_path, content)
    assert equal(found.state, STATE)
    assert found.notes == ("left out: 3 entries of other modules (criterion, teacher)",)


def test_objects_of_other_packages_beside_the_weights_are_let_be(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(lr=0.1),
        "space": types.SimpleNamespace(a=1),
        "folder": pathlib.Path("/images"),
        "when": datetime.datetime(2026, 1, 1),
        "mode": Mode.BEST,
        "own": Experiment(),
        "history": collections.defaultdict(list, {"loss": [np.float32(1.0)]}),
        "confusion": np.eye(3),
        "rng": np.random.RandomState(0).get_state(),
        "model": STATE,
    }
    for protocol in (2, 4):
        torch.save(content, tmp_path / "c", pickle_protocol=protocol)
        assert equal(load_checkpoint(tmp_path / "c").state, STATE)


# Several networks in a file


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema"),
        ({"model_ema": STATE, "model": OTHER}, "model_ema"),
        ({"model": OTHER, "ema": {"decay": 0.999, "shadow": STATE}}, "ema/shadow"),
        ({"net": OTHER, "swa_state": behind("module.")}, "swa_state"),
        ({"best": OTHER, "state_dict": STATE}, "state_dict"),
        ({"teacher": OTHER, "student": STATE}, "student"),
        ({"ema_teacher": OTHER, "student": STATE}, "student"),
        ({"first": STATE, "second": OTHER}, "first"),
        ({"state_dict": {**behind("teacher.", OTHER), **behind("model.")}}, "state_dict/model"),
        ({**behind("model.", OTHER), **behind("ema_model.module.")}, "ema_model.module"),
        ({**STATE, "teacher": OTHER}, "/"),
    ],
)
def test_of_several_an_average_comes_first_and_a_teacher_last(
    tmp_path: Path, content: dict[str, Any], chosen: str
) -> None:
    found = opened(tmp_path, content)
    assert torch.equal(found.state["fc.bias"], STATE["fc.bias"])
    assert found.notes[0].startswith(f"its weights are those of {chosen}")
    assert found.notes[0].endswith("(model.state_key takes another)")


def test_the_choice_says_why_and_what_else_there_is(tmp_path: Path) -> None:
    found = opened(tmp_path, {"epoch": 1, "model": OTHER, "model_ema": STATE})
    assert found.notes == (
        "its weights are those of model_ema, an average, as is usual for evaluation; it also holds model "
        "(model.state_key takes another)",
    )


def test_an_average_without_statistics_is_not_chosen(tmp_path: Path) -> None:
    shadow = {key: value for key, value in OTHER.items() if "running" not in key}
    assert torch.equal(opened(tmp_path, {"model": STATE, "ema": shadow}).state["fc.bias"], STATE["fc.bias"])


def test_an_average_that_is_a_list_is_let_be(tmp_path: Path) -> None:
    content = {"model": STATE, "ema": {"shadow_params": list(OTHER.values())}}
    assert opened(tmp_path, content).notes == ()


@pytest.mark.parametrize("name", ["optimizer", "momentum_buffers", "grads"])
def test_what_an_optimizer_keeps_by_key_is_no_network(tmp_path: Path, name: str) -> None:
    found = opened(tmp_path, {name: OTHER, "model": STATE})
    assert (found.state["fc.bias"].tolist(), found.notes) == (STATE["fc.bias"].tolist(), ())


def test_another_of_several_can_be_taken(tmp_path: Path) -> None:
    content = {"model": STATE, "model_ema": {**behind("a.", OTHER), **behind("b.", STATE)}}
    assert torch.equal(opened(tmp_path, content, state_key="model").state["fc.bias"], STATE["fc.bias"])
    found = opened(tmp_path, content, state_key="model_ema/b")
    assert torch.equal(found.state["fc.bias"], STATE["fc.bias"])
    assert found.notes == ()


def test_a_name_that_the_file_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"model": STATE, "model_ema": STATE.copy()}, state_key="modl") == (
        "model.state_key: found 'modl', the file has: model, model_ema (did you mean 'model'?)"
    )


def test_a_value_under_a_networks_key_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, {**STATE, "fc.bias": [1.0]})
        == "not a state dict: 'fc.bias' holds no tensor but: list"
    )
    content = {"model": {**STATE, "fc.bias": argparse.Namespace()}}
    assert refusal(tmp_path, content).endswith("'fc.bias' holds no tensor but: argparse.Namespace")


def test_nested_without_end_is_no_reason_to_search_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless["b"] = endless
    wide: dict[str, Any] = {}
    for _ in range(6):
        wide = {str(i): wide for i in range(1000)}
    assert equal(opened(tmp_path, {"endless": endless, "wide": wide, "model": STATE}).state, STATE)
