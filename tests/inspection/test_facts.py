"""Facts of a file: counts, totals, and what metadata tell."""

from __future__ import annotations

import json

import pytest

from qat.errors import NotBinaryError
from qat.inspection.facts import InspectedLayer, Inspection, Total, facts_of, parsed


def layer(name: str, shapes: tuple[tuple[int, ...], ...], size: int, exact: float | None) -> InspectedLayer:
    return InspectedLayer(
        name, "kind", shapes, "float32", 32, size, (-1.0, 1.0), "float32", "float32", exact_in_use=exact
    )


def inspection() -> Inspection:
    layers = (
        layer("feature.0", ((2, 3, 3, 3),), 216, None),
        layer("feature.1.Attention", ((2, 2, 3, 3),), 144, 1.0),
        layer("feature.1.FFN", ((2, 2, 1, 1),), 16, 0.5),
        layer("feature.1.FFN.se", ((1, 2, 1, 1), (2, 1, 1, 1)), 16, None),
    )
    text = "BNext custom [2, 2], 3 classes, stem stride 1"
    return Inspection(
        "f", "a test", 1000, text, (2, 2), 3, layers, Total(5, 20), {"epoch": 1}, exported=False
    )


def test_totals_separate_binary_weights_from_the_rest_and_count_every_byte_once() -> None:
    found = inspection()
    assert found.totals() == {"binary": Total(40, 160), "rest": Total(58, 232), "other": Total(5, 20)}
    assert found.container_size == 1000 - 160 - 232 - 20
    assert found.totals()["rest"].float32_size == 4 * 58


def test_a_layer_is_binary_only_if_every_weight_in_use_is_exactly_one() -> None:
    assert [x.binary for x in inspection().layers] == [False, True, False, False]
    assert [x.is_binary_convolution for x in inspection().layers] == [False, True, True, False]


def test_json_has_everything_and_counts() -> None:
    found = json.loads(json.dumps(inspection().to_dict(), allow_nan=False))
    assert (found["size"], found["widths"], found["num_classes"]) == ("custom", [2, 2], 3)
    assert (found["binary_layers"], found["binary_convolutions"]) == (1, 2)
    assert found["totals"]["other"] == {"count": 5, "bytes": 20, "float32_bytes": 20}
    assert found["totals"]["container_bytes"] == 588
    assert found["layers"][3]["weights"] == 4
    assert found["layers"][1]["binary"] is True


def test_facts_are_taken_from_metadata_and_recipe() -> None:
    recipe = {"task": "finetune", "data": {"dataset": "digits", "image_size": 8, "mean": [0.5]}}
    metadata = {
        "epoch": "3",
        "accuracy": '{"top1": 99.0}',
        "class_names": '["a", "b"]',
        "normalization": '{"mean": [0.1], "std": [0.2]}',
        "note": "plain",
        "grids": "{}",
    }
    expected = {
        "task": "finetune",
        "dataset": "digits",
        "image_size": 8,
        "mean": [0.1],
        "std": [0.2],
        "epoch": 3,
        "accuracy": {"top1": 99.0},
        "class_names": ["a", "b"],
        "note": "plain",
    }
    assert facts_of(metadata, recipe) == expected
    assert facts_of(metadata | {"recipe": json.dumps(recipe)}) == expected


@pytest.mark.parametrize("recipe", ["[]", "{", '{"data": 3}', '"text"'])
def test_damaged_metadata_tell_nothing_and_break_nothing(recipe: str) -> None:
    assert facts_of({"recipe": recipe, "normalization": "[", "epoch": "1"}) == {"epoch": 1}


def test_what_is_json_to_python_alone_stays_text() -> None:
    assert parsed('{"loss": NaN}') == {"loss": "NaN"}
    assert parsed('{"top1": 1e999, "top5": 9.5}') == {"top1": "1e999", "top5": 9.5}
    assert parsed("[" * 100_000).startswith("[[")


def test_the_error_of_a_network_that_is_not_binary_is_a_result_not_a_wrong_input() -> None:
    assert NotBinaryError.exit_code == 1
