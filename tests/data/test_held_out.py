"""Which images are held out for validation: a share of each class, by a hash of their names."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from qat.data.held_out import held_out
from qat.errors import DataError


def chosen(names: list[str], labels: list[int], share: float = 0.2) -> set[str]:
    mask = held_out(names, torch.tensor(labels), share, "here")
    return {name for name, out in zip(names, mask.tolist(), strict=True) if out}


NAMES = [f"{label}/{i}.png" for label in "ab" for i in range(10)]
LABELS = [0] * 10 + [1] * 10


def test_the_share_is_of_each_class() -> None:
    found = chosen(NAMES, LABELS)
    assert len(found) == 4
    assert sum(name.startswith("a") for name in found) == 2


def test_the_same_images_are_chosen_today_and_by_any_later_version() -> None:
    assert chosen(NAMES, LABELS) == {"a/0.png", "a/8.png", "b/0.png", "b/3.png"}


def test_neither_the_order_nor_other_classes_change_what_is_chosen() -> None:
    pairs = list(zip(NAMES, LABELS, strict=True))
    random.Random(0).shuffle(pairs)
    names, labels = map(list, zip(*pairs, strict=True))
    assert chosen(names, labels) == chosen(NAMES, LABELS)
    alone = chosen(NAMES[:10], LABELS[:10])
    assert alone == {name for name in chosen(NAMES, LABELS) if name.startswith("a")}


def test_both_forms_of_an_accent_give_the_same_choice() -> None:
    composed = [f"caf\u00e9/{i}.png" for i in range(20)]
    apart = [f"cafe\u0301/{i}.png" for i in range(20)]
    found = [held_out(names, torch.zeros(20, dtype=torch.int64), 0.2, "") for names in (composed, apart)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (5, 0.5, 3), (1, 0.5, 0)]
)
def test_a_class_gives_at_least_one_and_keeps_at_least_one(count: int, share: float, expected: int) -> None:
    labels: Tensor = torch.tensor([0] * count + [1] * 4)
    mask = held_out([str(i) for i in range(len(labels))], labels, share, "here")
    assert int(mask[:count].sum()) == expected


def test_classes_of_one_image_each_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"^here: no class has more than one image"):
        chosen(["a/0.png", "b/0.png"], [0, 1])
