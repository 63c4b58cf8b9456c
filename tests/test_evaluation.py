"""Evaluation: right answers are counted, the loss is averaged, and the network's mode doesn't change."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from qat.data.split import MemorySplit
from qat.evaluation import (
    Accuracy,
    accuracy_of,
    collect_logits,
    correct_in_top,
    evaluate,
    percent,
    predictor,
    ranks,
)
from qat.recipe.schema import Data

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])


def split(count: int, classes: int = 3) -> MemorySplit:
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).repeat(1, 1, 8, 8)
    return MemorySplit([str(i) for i in range(classes)], images, torch.arange(count) % classes)


def test_a_rank_counts_the_classes_before_the_label() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert ranks(logits, torch.tensor([0, 0, 1])).tolist() == [0, 2, 1]


def test_of_equal_logits_the_lower_class_is_the_answer() -> None:
    logits = torch.tensor([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [0.0, -0.0, 1.0]])
    assert ranks(logits, torch.tensor([0, 1, 2, 1])).tolist() == [0, 1, 2, 2]


def test_infinite_logits_are_numbers_like_others() -> None:
    logits = torch.tensor([[torch.inf, 0.0], [-torch.inf, 0.0]])
    assert ranks(logits, torch.tensor([0, 0])).tolist() == [0, 1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_answer_with_nan_is_wrong_wherever_the_nan_is(place: int) -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    logits[0, place] = torch.nan
    for k in (1, 5):
        assert correct_in_top(logits, torch.tensor([0, 0]), k) == 1


@pytest.mark.parametrize(("k", "correct"), [(1, 2), (2, 3), (3, 4), (5, 4)])
def test_a_label_among_the_k_largest_is_correct(k: int, correct: int) -> None:
    assert correct_in_top(LOGITS, torch.tensor([0, 1, 1, 2]), k) == correct


def test_fewer_classes_than_five_make_top_5_certain() -> None:
    assert accuracy_of(LOGITS, torch.tensor([2, 0, 0, 2])).top5 == 100.0


def test_accuracy_is_in_percent_and_loss_in_nats() -> None:
    accuracy = accuracy_of(LOGITS, torch.tensor([0, 1, 2, 2]))
    expected = -sum(
        math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(LOGITS.tolist(), [0, 1, 2, 2], strict=True)
    )
    assert (accuracy.top1, accuracy.n) == (75.0, 4)
    assert accuracy.loss == pytest.approx(expected / 4, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_the_result_does_not_depend_on_the_batch_size(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).eval()
    found = collect_logits(predictor(model), split(7), Data(image_size=8, eval_batch_size=batch))
    whole = collect_logits(predictor(model), split(7), Data(image_size=8, eval_batch_size=7))
    torch.testing.assert_close(found, whole)


def test_images_are_normalized_as_the_data_says() -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 3)

    data = Data(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), eval_batch_size=4)
    assert evaluate(predict, split(6), data).n == 6
    assert [len(images) for images in seen] == [4, 2]
    expected = (5 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(seen[1][1, :, 0, 0], expected)


def test_a_predictor_that_takes_pixels_is_given_the_pixels_of_the_split() -> None:
    class Pixels:
        takes_pixels = True

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __call__(self, images: Tensor) -> Tensor:
            self.seen.append(images)
            return torch.zeros(len(images), 3)

    predict, data = Pixels(), Data(image_size=8, eval_batch_size=4)
    assert evaluate(predict, split(6), data).n == 6
    assert torch.equal(torch.cat(predict.seen), torch.cat([images for images, _ in split(6).batches(4)]))
    assert {images.dtype for images in predict.seen} == {torch.uint8}
    predict.takes_pixels = False
    evaluate(predict, split(6), data)
    assert predict.seen[-1].dtype == torch.float32


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (100.0, 2, "100.00 %"),
        (99.994, 2, "99.99 %"),
        (99.996, 2, "99.99 %"),
        (99.99999, 4, "99.9999 %"),
        (99.5, 0, "99 %"),
        (0.0, 2, "0.00 %"),
        (math.nan, 2, "nan %"),
    ],
)
def test_a_share_is_not_rounded_up_to_100(share: float, digits: int, text: str) -> None:
    assert percent(share, digits) == text


@pytest.mark.parametrize("training", [True, False])
def test_predicting_restores_the_mode_and_tracks_no_gradient(training: bool) -> None:
    model = nn.BatchNorm2d(3).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = predictor(model)(torch.randn(2, 3, 4, 4))
    assert model.training is training
    assert not logits.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_mode_is_restored_after_an_error_too() -> None:
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        predictor(model)(torch.zeros(1, 3))
    assert model.training


def test_json_has_the_four_figures_and_no_number_that_json_lacks() -> None:
    content = json.loads(Accuracy(50.0, 100.0, 4, 0.5).to_json())
    assert content == {"top1": 50.0, "top5": 100.0, "n": 4, "loss": 0.5}
    for value in (math.nan, math.inf):
        text = Accuracy(50.0, 100.0, 4, value).to_json()
        assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
