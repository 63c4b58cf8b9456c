"""Sections on costs: what counts with how many bits, and measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qat.models.bnext import BNext
from qat.models.operation_count import operations
from qat.quantize.preparation import quantization_map
from qat.recipe.schema import Quantization
from qat.report.costs import (
    Costs,
    latency,
    megabytes,
    millions,
    operations_figure,
    operations_table,
    size_table,
    weight_bits,
)

WIDTHS = (8, 8, 16)


def costs(**changes: Any) -> Costs:
    """Costs of a small network that is prepared by a section with ``changes``; of a float one without any."""
    model = BNext(10, quant=Quantization(**changes) if changes else False, widths=WIDTHS)
    counted = operations(model.architecture, 16)
    return Costs(counted, weight_bits(counted, quantization_map(model)))


INT8 = {"include": ["*"]}


def test_a_quantized_network_costs_what_its_operations_say() -> None:
    found = costs(**INT8)
    assert found.ops() == found.operations.ops
    assert found.bytes == found.operations.parameters.packed_bytes(8, 32)


def test_a_float_network_costs_what_float_rest_does() -> None:
    found = costs()
    assert found.ops() == found.operations.float_rest_ops
    assert found.bytes == found.operations.parameters.packed_bytes(32)


def test_a_group_left_in_float_counts_as_float() -> None:
    found, all_int8 = costs(classifier={"enabled": False}), costs(**INT8)
    (fc,) = [layer for layer in found.operations.layers if layer.kind == "classifier"]
    assert found.bits["fc"] == 32
    assert found.ops() - all_int8.ops() == pytest.approx(fc.macs * 7 / 8)
    assert found.bytes - all_int8.bytes == 3 * fc.weights


def test_four_bits_take_half_the_bytes() -> None:
    found, all_int8 = costs(se={"weight_bits": 4}), costs(**INT8)
    weights = sum(layer.weights for layer in found.operations.layers if layer.kind == "se")
    assert all_int8.bytes - found.bytes == pytest.approx(weights / 2, abs=1)
    assert found.ops() == all_int8.ops()


def test_the_table_of_operations_sums_up() -> None:
    found = costs(**INT8)
    table = operations_table(found)
    numbers = [[int(cell.replace(",", "").replace("–", "0")) for cell in row[3:7]] for row in table.rows]
    *kinds, total = numbers
    assert [sum(column) for column in zip(*kinds, strict=True)] == pytest.approx(total, abs=3)
    assert total[0] == found.operations.bops
    assert total[1] == found.operations.int8_macs
    assert table.rows[-1][7] == "100.0 %"


def test_a_network_without_attention_has_no_row_for_it() -> None:
    model = BNext(10, widths=WIDTHS, infor_recoupling=False)
    counted = operations(model.architecture, 16)
    table = operations_table(Costs(counted, weight_bits(counted, {})))
    assert "channel attention" not in [row[0] for row in table.rows]


def test_operations_are_drawn_before_and_after() -> None:
    assert ">all, float rest</text>" in operations_figure(costs(**INT8), "int8").chart
    assert ">all, float rest</text>" not in operations_figure(costs(), None).chart


def test_sizes_are_of_parameters_and_of_the_files_there_are(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"12345")
    found = costs(**INT8)
    table = size_table(found, [tmp_path / "best.safetensors", tmp_path / "model.onnx"], True)
    assert table.rows[0][3] == f"{found.operations.parameters.float32_bytes:,}"
    assert table.rows[2][3] == f"{found.bytes:,}"
    assert [row[0] for row in table.rows[3:]] == ["model.onnx"]
    assert table.rows[3][3] == "5"


@pytest.mark.parametrize(
    ("value", "text"), [(1_720_000_000, "1.72 G"), (76_900_000, "76.9 M"), (1280, "1.28 k"), (12, "12")]
)
def test_large_numbers_are_short(value: float, text: str) -> None:
    assert millions(value) == text


def test_sizes_are_in_megabytes_unless_small() -> None:
    assert [megabytes(size) for size in (5_428_056, 100_000, 99_900)] == ["5.43 MB", "0.10 MB", "99.9 kB"]


BENCH: dict[str, Any] = {
    "machine": {"processor": "a <fast> one"},
    "settings": {"threads": 1, "batch": 1, "repeats": 20},
    "results": [
        {"target": "float32", "ms_median": 16.0, "ratio_to_float32": 1.0, "file_bytes": 120_000_000},
        {"target": "model", "ms_median": 8.0, "ratio_to_float32": 2.0, "peak_rss_bytes": None},
    ],
}


def test_measured_times_become_a_table_and_a_chart() -> None:
    found = latency(BENCH)
    assert found is not None
    table, figure, conditions = found
    assert tuple(table.rows[1]) == ("model", "8.00", "–", "–", "2.00", "–", "–", "–")
    assert table.rows[0][5] == "120.00"
    assert ">16.00 ms</text>" in figure.chart
    assert conditions == "1 thread, batch 1, 20 runs of each, on a <fast> one"


@pytest.mark.parametrize("key", ["machine", "settings", "results"])
@pytest.mark.parametrize("value", [None, 3, [{"target": "a", "ms_median": "fast"}]])
def test_anything_else_is_no_measurement(key: str, value: object) -> None:
    assert latency({**BENCH, key: value}) is None
