"""The section on layers."""

from __future__ import annotations

import math

import pytest

from qat.report.layers import block_of, group_table, kind_of, layer_figures, layer_table
from tests.helpers.reports import binary_layer, layer

LAYERS = [
    layer("feature.0.image", group="stem", type="uint8", sqnr=145.0, clipped=0.0),
    layer("feature.0.trunk", sqnr=30.0),
    layer("feature.1.FFN.se.pooled", group="se", sqnr=35.0, clipped=0.02),
    layer("feature.1.FFN.se.weight_quantizer", group="se", weights=True, scale_min=0.001, sqnr=math.inf),
    binary_layer("feature.1.FFN.binary_conv"),
    layer("fc.weight_quantizer", group="classifier", weights=True, type="int4", bits=4, sqnr=18.0),
]


@pytest.mark.parametrize(
    ("name", "block"), [("feature.0.image", 0), ("feature.12.FFN.y", 12), ("fc.input", 14), ("prelu.out", 14)]
)
def test_what_is_in_no_block_is_in_the_head(name: str, block: int) -> None:
    assert block_of(name, 14) == block


def test_weights_and_activations_of_attention_are_told_apart() -> None:
    assert [kind_of(one) for one in LAYERS] == [
        "stem",
        "trunk",
        "se activations",
        "se weights",
        "binary",
        "classifier",
    ]


def test_each_quantity_has_a_chart() -> None:
    assert [one.title for one in layer_figures(LAYERS)] == [
        "Signal-to-quantization-noise ratio",
        "Clipped values",
        "Noisiest points",
        "Scales",
        "Flipped sign bits",
        "Input signs",
    ]
    assert layer_figures([]) == []


def test_the_noisiest_points_come_first_and_exact_ones_not_at_all() -> None:
    chart = next(one.chart for one in layer_figures(LAYERS) if one.title == "Noisiest points")
    places = [chart.index(f">{name}<") for name in ("fc.weight_quantizer", "feature.0.trunk")]
    assert places == sorted(places)
    assert "feature.0.image" not in chart
    assert "weight_quantizer<" in chart
    assert "feature.1.FFN.se.weight_quantizer" not in chart


def test_frozen_signs_are_said_to_be_unchanged() -> None:
    for share, ending in ((0.0, "changed: none did."), (0.1, "changed.")):
        (note,) = [
            one.note
            for one in layer_figures([binary_layer("a", flipped=share)])
            if one.title.startswith("Fl")
        ]
        assert note.endswith(ending)


def test_flips_are_left_out_where_the_start_is_not_known() -> None:
    titles = [one.title for one in layer_figures([binary_layer("a", flipped=None)])]
    assert titles == ["Input signs"]


def test_groups_are_summed_up() -> None:
    rows = {row[0]: tuple(row[1:]) for row in group_table(LAYERS).rows}
    assert rows["trunk"] == ("1", "int8", "30.0", "30.0", "0.10 %", "–")
    assert rows["stem"] == ("1", "uint8", "–", "–", "0 %", "–")
    assert rows["binary convolutions"] == ("1", "1 bit", "–", "–", "–", "25.00 %")


def test_every_point_has_a_row_with_all_that_was_measured() -> None:
    table = layer_table(LAYERS)
    assert len(table.rows) == len(LAYERS)
    assert tuple(table.rows[1]) == (
        "feature.0.trunk",
        "int8",
        "8",
        "activations",
        "0.02",
        "−2.5",
        "2.5",
        "0.10 %",
        "30.0",
        "–",
        "–",
    )
    assert table.rows[3][4] == "0.001 – 0.02"
    assert table.rows[3][8] == "exact"
    assert tuple(table.rows[4][7:]) == ("–", "–", "25.00 %", "50.00 %")


@pytest.mark.parametrize(("share", "text"), [(0.0, "0 %"), (1e-6, "< 0.01 %"), (0.5, "50.00 %")])
def test_a_small_share_is_not_none(share: float, text: str) -> None:
    assert layer_table([layer("a", clipped=share)]).rows[0][7] == text


def test_a_ratio_that_is_no_number_is_absent() -> None:
    broken = layer("a", sqnr=math.nan, low=math.nan)
    assert layer_table([broken]).rows[0][8] == "–"
    assert any("no noise anywhere" in one.chart for one in layer_figures([broken]))
