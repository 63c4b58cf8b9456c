"""Figures of the exactness check: counting, levels, shares and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from qat_export.verify.figures import EXACT, Exactness, Level, TensorExactness, level_of

from qat.errors import VerificationError
from tests.helpers.networks import lowered, ordinary, toy


def test_each_tensor_of_every_kind_of_network_has_a_level() -> None:
    networks = [ordinary()[1], lowered(toy(1, elm_attention=False)), lowered(toy(1, infor_recoupling=False))]
    names = {name for network in networks for name in network.grids}
    levels = {name: level_of(name) for name in names}
    assert levels["image"] == "image"
    assert levels["feature.0/trunk"] == "stem"
    assert levels["feature.1.Attention/conv"] == "binary convolutions"
    assert levels["feature.1.Attention/logits"] == "attention vectors"
    assert levels["feature.3/trunk_out"] == "trunk"
    assert levels["head/prelu"] == levels["head/input"] == "head"
    assert level_of("logits") == "logits"


def test_elements_differences_and_the_largest_add_up_over_parts() -> None:
    tensor = TensorExactness("feature.1/trunk_mid", "on")
    expected = np.arange(6, dtype=np.int16).reshape(2, 3, 1, 1)
    tensor.add(expected.copy(), expected)
    tensor.add(expected.astype(np.float32).reshape(2, 1, 1, 3), expected)  # another type and layout
    assert (tensor.elements, tensor.different, tensor.largest) == (12, 0, 0.0)
    tensor.add(expected + np.array([0, -3, 1]).reshape(1, 3, 1, 1), expected)
    assert (tensor.elements, tensor.different, tensor.largest) == (18, 4, 3.0)


def test_integers_far_apart_do_not_wrap_around() -> None:
    tensor = TensorExactness("feature.1/trunk_mid", "on")
    tensor.add(np.array([255], np.uint8), np.array([-128], np.int16))
    assert tensor.largest == 383.0


@pytest.mark.parametrize("found", [[np.nan, 1.0], [np.inf, 1.0], [1.0, 2.0, 3.0]])
def test_what_is_no_number_or_of_another_size_is_infinitely_wrong(found: list[float]) -> None:
    tensor = TensorExactness("feature.1/trunk_mid", "on")
    tensor.add(np.array(found, np.float32), np.array([1, 1], np.int16))
    assert tensor.elements == 2
    assert tensor.different >= 1
    assert math.isinf(tensor.largest)
    figures = Exactness(1, (1,), (1,), (tensor,))
    assert figures.problems()
    assert figures.to_dict()["levels"][0]["largest_difference"] is None


def test_logits_are_compared_as_bits() -> None:
    tensor = TensorExactness("logits", "on")
    one = np.array([0.0, 1.0, np.nan], np.float32)
    tensor.add(one.copy(), one)
    assert tensor.different == 0
    tensor.add(np.array([-0.0, np.nextafter(np.float32(1), np.float32(2)), np.nan], np.float32), one)
    assert tensor.different == 2


def level(name: str = "trunk", elements: int = 100_000, different: int = 0, largest: float = 1.0) -> Level:
    return Level(name, "on", 1, elements, different, largest if different else 0.0, "x" if different else "")


@pytest.mark.parametrize("name", ["image", "stem", "PReLU", "trunk", "head", *EXACT])
def test_equal_levels_have_no_problem(name: str) -> None:
    assert level(name).problem() is None
    assert level(name).share == "100 %"


def test_few_elements_may_be_one_step_apart_up_to_the_share() -> None:
    assert level(different=10).problem() is None
    assert level(different=10).share == "99.9900 %"
    assert "at least 99.99 % must be equal" in str(level(different=11).problem())


def test_two_steps_are_too_many_even_for_one_element() -> None:
    problem = str(level(different=1, largest=2.0).problem())
    assert problem == (
        "trunk, optimizations on: 1 of 100,000 elements differ, by up to 2 in x; at most 1 step is allowed"
    )


@pytest.mark.parametrize("name", EXACT)
def test_in_exact_levels_not_one_element_may_differ(name: str) -> None:
    assert str(level(name, elements=10**9, different=1).problem()).endswith("in x; none may")


@pytest.mark.parametrize(
    ("elements", "share"), [(10**9, "99.9999 %"), (10**4, "99.9900 %"), (3, "66.6667 %")]
)
def test_a_share_is_not_rounded_up_to_100(elements: int, share: str) -> None:
    assert level(elements=elements, different=1).share == share


def test_levels_gather_their_tensors_and_name_the_worst() -> None:
    def tensor(name: str, different: int, largest: float) -> TensorExactness:
        return TensorExactness(name, "on", 1000, different, largest)

    tensors = (
        tensor("a/y", 3, 1.0),
        tensor("b/y", 1, 2.0),
        tensor("a/prelu1", 5, 2.0),
        tensor("image", 0, 0),
    )
    image, prelu = Exactness(2, (1,), (1,), tensors).levels()
    assert (image.name, image.worst) == ("image", "")
    assert (prelu.name, prelu.tensors, prelu.elements, prelu.different) == ("PReLU", 3, 3000, 9)
    assert (prelu.largest, prelu.worst) == (2.0, "a/prelu1")


def test_of_both_settings_the_worse_one_is_named() -> None:
    tensors = (
        TensorExactness("a/y", "off", 1000, 3, 1.0),
        TensorExactness("b/y", "on", 1000, 1, 2.0),
        TensorExactness("image", "on", 1000),
    )
    assert Exactness(2, (1,), (1,), tensors).worst() == ["PReLU: by up to 2 in b/y"]


def test_an_error_names_three_problems_and_counts_the_rest() -> None:
    names = [*("a/conv", "a/y", "a/trunk_mid", "a/pooled", "head/input")]
    tensors = tuple(TensorExactness(name, "off", 10, 5, 7.0) for name in names)
    figures = Exactness(2, (1,), (1,), tensors, missing=("a/branch",))
    assert len(figures.problems()) == 6
    with pytest.raises(VerificationError, match=r"no tensor 'a/branch'; .*; .*; and 3 more$"):
        figures.require()
