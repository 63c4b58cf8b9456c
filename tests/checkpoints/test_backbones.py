"""Checkpoints without a classifier: a network of any classes can start from them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import infer_architecture
from qat.checkpoints.loading import build, load_state, without_quantizers
from qat.errors import CheckpointError
from qat.models.bnext import BNext
from tests.helpers.checkpoints import WIDTHS, toy
from tests.helpers.foreign_checkpoints import BACKBONE, STATE, behind, opened, refusal


def test_a_backbone_is_read_without_a_classifier(tmp_path: Path) -> None:
    found = opened(tmp_path, behind("module.", BACKBONE))
    assert not found.has_classifier
    assert found.architecture.num_classes == 1000
    assert opened(tmp_path, BACKBONE, num_classes=7, stem_stride=1).architecture.num_classes == 7
    assert opened(tmp_path, STATE, num_classes=7).architecture.num_classes == 10
    assert opened(tmp_path, STATE).has_classifier


def test_half_a_classifier_is_no_backbone(tmp_path: Path) -> None:
    assert "key 'fc.weight' is missing" in refusal(tmp_path, {**BACKBONE, "fc.bias": STATE["fc.bias"]})


def test_a_backbone_starts_a_network_of_any_classes(tmp_path: Path) -> None:
    found = opened(tmp_path, BACKBONE, stem_stride=1)
    for source in (without_quantizers(found), BACKBONE):
        model = BNext(3, widths=WIDTHS)
        load_state(model, source, classifier="new")
        assert torch.equal(model.state_dict()["prelu.weight"], STATE["prelu.weight"])


def test_a_backbone_is_no_network_to_use(tmp_path: Path) -> None:
    found = opened(tmp_path, BACKBONE)
    with pytest.raises(CheckpointError, match=r"c\.pth: has no classifier \(fc\.weight\); qat finetune"):
        build(found)
    with pytest.raises(CheckpointError, match="checkpoint: has no classifier"):
        load_state(toy(), BACKBONE)


def test_the_classes_of_a_backbone_must_be_given() -> None:
    assert infer_architecture(BACKBONE, num_classes=5).num_classes == 5
    with pytest.raises(CheckpointError, match=r"key 'fc\.weight' is missing"):
        infer_architecture(BACKBONE)
