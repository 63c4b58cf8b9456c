"""BNext computes the same numbers as its authors' network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.models.bnext import BNext
from tests.helpers import golden_numbers as golden

GOLDEN = golden.load()
TRAINED = [case for case in GOLDEN.cases if "train_loss" in case]
#: Agreement with the authors' code in float64, relative.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def known() -> dict[Any, Tensor]:
    """Values drawn so far, shared by the networks of this file."""
    return {}


def filled(case: dict[str, Any], known: dict[Any, Tensor]) -> BNext:
    with torch.device("meta"):
        model = BNext(case["num_classes"])
    model = model.to_empty(device="cpu").double()
    golden.fill(model, case["temperature"], known)
    return model


def assert_close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=TOLERANCE, atol=1e-11
    )


@pytest.mark.parametrize("case", GOLDEN.cases, ids=lambda c: f"{c['num_classes']}-{c['temperature']}")
def test_evaluation_logits_equal_the_authors(case: dict[str, Any], known: dict[Any, Tensor]) -> None:
    model = filled(case, known).eval()
    with torch.no_grad():
        logits = model(golden.images(case["num_classes"]))
    assert logits.shape == (2, case["num_classes"])
    assert_close(logits[:, : len(case["eval_logits"][0])], case["eval_logits"])


@pytest.mark.parametrize("case", TRAINED, ids=lambda c: str(c["temperature"]))
def test_a_training_step_equals_the_authors_in_every_gradient(
    case: dict[str, Any], known: dict[Any, Tensor]
) -> None:
    model = filled(case, known).train()
    logits = model(golden.images(case["num_classes"]))
    loss = logits.square().mean()
    loss.backward()

    assert_close(logits, case["train_logits"])
    assert_close(loss, case["train_loss"])
    expected = GOLDEN.gradients[case["temperature"]]
    found = {
        name: None if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
    }
    assert found.keys() == expected.keys()
    wrong = {
        name: (norm, expected[name])
        for name, norm in found.items()
        if (norm is None) != (expected[name] is None)
        or (norm is not None and not math.isclose(norm, expected[name], rel_tol=TOLERANCE))
    }
    assert wrong == {}


def test_the_golden_file_holds_gradients_and_parameters_without_one() -> None:
    for norms in GOLDEN.gradients.values():
        missing = [name for name, norm in norms.items() if norm is None]
        assert len(norms) == 410
        assert "feature.0.prelu.weight" in missing
        assert all(name.rsplit(".", 2)[1] in ("prelu", "activation1") for name in missing)
        assert all(norm > 0 for norm in norms.values() if norm is not None)


def test_tiny_has_the_authors_state_dict() -> None:
    with torch.device("meta"):
        model = BNext()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == GOLDEN.shapes
    assert len(GOLDEN.shapes) == 661


def test_another_class_count_changes_the_classifier_alone() -> None:
    with torch.device("meta"):
        state = BNext(10).state_dict()
    differ = {key for key, value in state.items() if tuple(value.shape) != GOLDEN.shapes[key]}
    assert state.keys() == GOLDEN.shapes.keys()
    assert differ == {"fc.weight", "fc.bias"}
