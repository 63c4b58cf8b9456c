"""The architecture of a network is inferred from the keys and shapes of its state dict."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from qat.checkpoints.architecture import infer_architecture
from qat.errors import CheckpointError
from qat.models.bnext import BNext
from tests.helpers.checkpoints import CONV, WIDTHS, toy

#: sha256 over the sorted lines "key shape" of the authors' BNext-Tiny with 1000 classes.
TINY_LAYOUT = "818c3c1dd891d3d69cd8f304a366d9fc52207755365aaca3efd9c56219fe3d09"


def test_the_keys_and_shapes_of_tiny_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        state = BNext().state_dict()
    assert len(state) == 661
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == TINY_LAYOUT


@pytest.mark.parametrize(
    "options",
    [
        {"size": "tiny"},
        {"size": "small", "num_classes": 10},
        {"size": "middle", "num_classes": 100},
        {"size": "large"},
        {"widths": WIDTHS, "elm_attention": False},
        {"widths": WIDTHS, "infor_recoupling": False},
        {"widths": (4, 8), "num_classes": 2, "elm_attention": False, "infor_recoupling": False},
    ],
)
def test_the_architecture_is_inferred_from_keys_and_shapes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = BNext(**options)
    assert infer_architecture(model.state_dict()) == model.architecture


def test_the_architecture_of_a_prepared_network_is_that_of_its_float_network() -> None:
    assert infer_architecture(toy(quant=True).state_dict()) == toy().architecture


def test_the_stem_stride_can_be_given_since_no_key_tells() -> None:
    assert infer_architecture(toy().state_dict(), stem_stride=2).stem_stride == 2


@pytest.mark.parametrize(
    "missing",
    ["feature.0.conv1.weight", CONV, "feature.1.FFN.binary_conv.weight", "fc.weight"],
)
def test_a_state_that_is_no_bnext_is_refused_with_the_missing_key(missing: str) -> None:
    state = {key: value for key, value in toy().state_dict().items() if key != missing}
    with pytest.raises(CheckpointError, match=f"not a BNext: key '{missing}' is missing"):
        infer_architecture(state)


def test_a_gap_between_blocks_is_refused() -> None:
    state = {key.replace("feature.3.", "feature.4."): value for key, value in toy().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"feature\.3\.Attention"):
        infer_architecture(state)


@pytest.mark.parametrize("shape", [(), (9, 9, 3, 3), (0, 8, 3, 3)])
def test_shapes_that_no_network_has_are_refused(shape: tuple[int, ...]) -> None:
    state = {**toy().state_dict(), CONV: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=CONV):
        infer_architecture(state)


def test_a_stem_of_no_channels_is_refused() -> None:
    state = {key: value[:0] if value.ndim else value for key, value in toy().state_dict().items()}
    with pytest.raises(CheckpointError, match="not a BNext: widths"):
        infer_architecture(state)
