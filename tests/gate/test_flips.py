"""Images that changed sides: which ones, in which direction, and what is known of their answers."""

from __future__ import annotations

import json

import numpy as np

from qat.gate.flips import KEPT, LISTED, Flip, find_flips

NAMES = ["cat", "dog", "\x1b[31mbird\n"]


def test_only_images_that_one_model_has_right_are_listed_by_direction() -> None:
    found = find_flips(
        before=np.array([True, True, False, False, True]),
        now=np.array([True, False, True, False, False]),
        labels=[0, 1, 2, 0, 0],
        answers=[0, 0, 2, 1, None],
        class_names=NAMES,
        image_name=lambda index: f"{index}\t.png" if index < 3 else None,
    )
    assert (found.lost, found.gained) == (2, 1)
    assert found.images == [
        Flip(1, "1\\t.png", "wrong", "dog", "dog", "cat"),
        Flip(4, None, "wrong", "cat", "cat", None),
        Flip(2, "2\\t.png", "right", "\\x1b[31mbird\\n", None, "\\x1b[31mbird\\n"),
    ]
    assert found.lines() == [
        "images that changed sides: 2 right → wrong, 1 wrong → right",
        "right → wrong: image 1 (1\\t.png) of class dog, now cat",
        "right → wrong: image 4 of class cat, now without an answer, its logits are NaN",
        "wrong → right: image 2 (2\\t.png) of class \\x1b[31mbird\\n",
    ]
    assert json.loads(json.dumps(found.to_dict()))["images"][1]["answer"] is None


def test_lists_are_bounded_and_say_how_many_more_there_are() -> None:
    n = 2 * KEPT + 5
    before = np.arange(n) < KEPT + 3
    found = find_flips(before, ~before, [0] * n, [1] * n, NAMES, lambda _: None)
    assert (found.lost, found.gained, len(found.images)) == (KEPT + 3, KEPT + 2, 2 * KEPT)
    lines = found.lines()
    assert len(lines) == 1 + 2 * (LISTED + 1)
    assert f"… and {KEPT + 3 - LISTED:,} more that became wrong" in lines
    assert lines[-1] == f"… and {KEPT + 2 - LISTED:,} more that became right"


def test_where_nothing_changed_it_says_so_and_a_class_without_a_name_has_its_number() -> None:
    same = np.array([True, False])
    assert find_flips(same, same, [0, 1], [0, 0], NAMES, lambda _: None).lines() == ["no image changed sides"]
    lost = find_flips(np.array([True]), np.array([False]), [0], [7], NAMES, lambda _: None)
    assert lost.lines()[1] == "right → wrong: image 0 of class cat, now class 7"
