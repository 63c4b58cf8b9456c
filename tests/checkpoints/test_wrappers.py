"""What wrappers put around a network's keys is taken off; keys that are half wrapped are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from tests.helpers.checkpoints import equal, images, toy
from tests.helpers.foreign_checkpoints import STATE, behind, opened, refusal


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "network.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "a.b.c.",
    ],
)
def test_any_prefix_that_all_keys_share_is_taken_off(tmp_path: Path, prefix: str) -> None:
    found = opened(tmp_path, behind(prefix))
    assert equal(found.state, STATE)
    assert (found.format, found.notes) == ("published weights", ())


def test_a_prefix_in_a_safetensors_file_is_taken_off(tmp_path: Path) -> None:
    safetensors.torch.save_file(behind("module._orig_mod."), tmp_path / "c")
    assert equal(load_checkpoint(tmp_path / "c").state, STATE)


def test_wrappers_of_parts_are_taken_out_of_the_keys(tmp_path: Path) -> None:
    wrapped = {
        "_fsdp_wrapped_module."
        + key.replace("feature.1.", "feature.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in STATE.items()
    }
    assert equal(opened(tmp_path, wrapped).state, STATE)


def test_an_averaged_model_loads(tmp_path: Path) -> None:
    assert equal(opened(tmp_path, AveragedModel(toy()).state_dict()).state, STATE)


@pytest.mark.parametrize("prefix", ["", "module.", "module.feature.0.", "other."])
def test_counters_are_dropped_wherever_they_stand(tmp_path: Path, prefix: str) -> None:
    counted = {f"{prefix}{name}": torch.zeros(1) for name in ("n_averaged", "total_ops", "total_params")}
    found = opened(tmp_path, {**counted, **behind("module.")})
    assert equal(found.state, STATE)
    assert found.notes == ()


def test_absent_counts_of_batches_are_taken_as_0(tmp_path: Path) -> None:
    without = {key: value for key, value in STATE.items() if not key.endswith("num_batches_tracked")}
    found = opened(tmp_path, behind("module.", without))
    assert found.state["feature.0.bn1.num_batches_tracked"] == 0
    assert found.state["feature.0.bn1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(build(found)(images()), toy()(images()))


# Keys that are wrapped in different ways


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {
                **{k: v for k, v in behind("module.").items() if k != "module.fc.bias"},
                "fc.bias": STATE["fc.bias"],
            },
            r"begin with 'module\.', 1 is unlike that: fc\.bias; rename",
        ),
        (
            {**{k: v for k, v in STATE.items() if k != "fc.bias"}, "model.fc.bias": STATE["fc.bias"]},
            r"have nothing in front, 1 is unlike that: model\.fc\.bias; rename",
        ),
        (
            {f"{'' if k == 'feature.0.conv1.weight' else '_orig_mod.'}{k}": v for k, v in STATE.items()},
            r"begin with '_orig_mod\.', 1 is unlike that: feature\.0\.conv1\.weight; rename",
        ),
        (
            {f"{'module.' if k.startswith('feature.0') else ''}module.{k}": v for k, v in STATE.items()},
            r"begin with 'module\.', 7 are unlike that: module\.module\.feature\.0\.conv1\.weight, ",
        ),
        (
            {**STATE, "feature.0.module.bn1.weight": torch.ones(8)},
            r"unlike that: feature\.0\.module\.bn1\.weight",
        ),
    ],
)
@pytest.mark.parametrize("place", ["", "state_dict"])
def test_half_wrapped_keys_are_refused_by_the_odd_ones(
    tmp_path: Path, content: dict[str, Tensor], message: str, place: str
) -> None:
    found = refusal(tmp_path, {place: content} if place else content)
    assert found.startswith("the network's keys are half wrapped: ")
    assert re.search(message, found), found
