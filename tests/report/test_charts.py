"""Charts: what is drawn, what is left out, and that a page's own look applies."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest
from markupsafe import Markup

from qat.report.charts import Bar, Series, bar_chart, heat_map, line_chart

AXES = {"x_label": "epoch", "y_label": "loss"}


def lines(**options: object) -> Markup:
    series = [
        Series("training", [1, 2, 3], [3.0, 2.0, 1.5], dashed=True),
        Series("test", [1, 2, 3], [3, 2, 2]),
    ]
    return line_chart("Loss", series, **AXES, **options)  # type: ignore[arg-type]


def bars() -> Markup:
    return bar_chart(
        "Accuracy", [Bar("float", 99.0, "99 %", low=98, high=99.5), Bar("int8", 98.0)], x_label="%"
    )


def cells() -> Markup:
    return heat_map("Confusion", [[5, 1], [0, 4]], ["cat", "dog"])


def texts(chart: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(chart).iter("text")]


def paths(chart: str, colour: str) -> list[str]:
    """Outlines that are filled or drawn with a colour."""
    found = ElementTree.fromstring(chart).iter("path")
    return [path.attrib["d"] for path in found if f"var(--{colour})" in path.get("style", "")]


def xs(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"[ML] (-?[\d.]+)", path)]


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_configuration() -> None:
    before = [lines(), bars(), cells()]
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        assert [lines(), bars(), cells()] == before


def test_charts_leave_the_users_configuration_alone_and_do_without_pyplot() -> None:
    code = (
        "import sys, matplotlib; from qat.report.charts import *; before = matplotlib.rcParams.copy();"
        "bar_chart('a', [Bar('b', 1.0)]); assert matplotlib.rcParams.copy() == before;"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("chart", [lines, bars, cells])
def test_every_colour_is_the_pages(chart: object) -> None:
    text = chart()  # type: ignore[operator]
    assert isinstance(text, Markup)
    assert not re.search(r"#[0-9a-f]{6}(?![\w-])", text)
    styles = re.findall(r'style="([^"]*)"', text)
    for style in styles:
        for value in re.findall(r"(?:fill|stroke): ([^;]+)", style):
            assert value == "none" or value.startswith("var(--")


@pytest.mark.parametrize("chart", [lines, bars, cells])
def test_text_is_text_of_fourteen_units(chart: object) -> None:
    sizes = re.findall(r"font(?:-size)?: ([\d.]+)px", chart())  # type: ignore[operator]
    assert sizes
    assert {float(size) for size in sizes} == {14.0}


def test_names_are_shown_as_they_are() -> None:
    odd = ["<b>&amp;", "$x_1$", '#fe0100 id="a"', "中\x07"]
    shown = ["<b>&amp;", "$x_1$", '#fe0100 id="a"', "中�"]
    assert set(shown) <= set(texts(bar_chart("a", [Bar(name, 1.0) for name in odd])))
    counts = [[2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 3, 0], [0, 0, 0, 1]]
    assert {"<b>&amp;", "$x_1$", "中�"} <= set(texts(heat_map("a", counts, odd)))
    named = [Series(name, [1, 2], [1, 2]) for name in odd]
    assert set(shown) <= set(texts(line_chart("a", named, **AXES)))


# Lines


@pytest.mark.parametrize("absent", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_leaves_a_gap(absent: float | None) -> None:
    chart = line_chart("a", [Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, absent, 2.0, 3.0])], **AXES)
    (line,) = [path for path in paths(chart, "series-1") if "C" not in path]
    assert (line.count("M"), line.count("L")) == (2, 2)


def test_a_series_without_numbers_is_not_in_the_legend() -> None:
    series = [Series("training", [1, 2], [1.0, 2.0]), Series("test", [1, 2], [None, None])]
    shown = texts(line_chart("a", series, **AXES))
    assert "training" in shown
    assert "test" not in shown
    line_chart("a", [Series("b", [1], [None]), Series("c", [1], [None])], **AXES)


def test_a_logarithmic_axis_leaves_out_what_is_not_positive() -> None:
    chart = line_chart("a", [Series("b", [1, 2, 3], [1.0, 0.0, 1e-8])], scale="log", **AXES)
    assert {"1", "0.0001", "1e-08"} <= set(texts(chart))


def test_an_axis_begins_where_it_is_told_and_ends_at_ticks() -> None:
    ticks = texts(line_chart("a", [Series("b", [1, 2], [0.0, 0.0])], least=0.0, **AXES))
    assert "0.0" in ticks
    assert not any(tick.startswith("−") for tick in ticks)
    assert "0.30" in texts(line_chart("a", [Series("b", [1, 2], [0.06, 0.285])], **AXES))


def test_small_numbers_keep_short_ticks() -> None:
    ticks = texts(line_chart("a", [Series("b", [1, 2], [0.0, 2e-6])], least=0.0, **AXES))
    assert {"0", "2e-06"} <= set(ticks)


def test_ticks_of_epochs_are_whole_numbers() -> None:
    assert not any("." in text for text in texts(line_chart("a", [Series("b", [1, 2], [10, 20])], **AXES)))


def test_a_long_series_is_drawn_without_markers() -> None:
    short, long = (line_chart("a", [Series("b", range(n), [1.0] * n)], **AXES) for n in (40, 41))
    assert short.count("<use") == 40
    assert "<use" not in long


@pytest.mark.parametrize("count", [0, 7])
def test_as_many_series_as_there_are_colours(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} series, allowed are 1 to 6"):
        line_chart("a", [Series("b", [1], [1])] * count, **AXES)


# Bars


def test_bars_are_as_long_as_their_values_and_turn_left_below_the_start() -> None:
    chart = bar_chart("a", [Bar("one", 1.0), Bar("two", 2.0), Bar("minus", -1.0, colour="bad")])
    one, two = (xs(path) for path in paths(chart, "series-1"))
    (minus,) = (xs(path) for path in paths(chart, "bad"))
    assert max(two) - min(two) == pytest.approx(2 * (max(one) - min(one)), abs=0.1)
    assert min(one) == pytest.approx(max(minus), abs=0.1)
    assert max(minus) - min(minus) == pytest.approx(max(one) - min(one), abs=0.1)


def test_a_whisker_spans_its_interval() -> None:
    chart = bar_chart("a", [Bar("one", 50.0, low=25.0, high=75.0)], end=100.0)
    (bar,) = (xs(path) for path in paths(chart, "series-1"))
    (whisker,) = (xs(path) for path in paths(chart, "ink") if len(xs(path)) == 2 and xs(path)[0] > 10)
    full = 2 * (max(bar) - min(bar))
    assert [(x - min(bar)) / full for x in whisker] == pytest.approx([0.25, 0.75], abs=0.01)


def test_a_bar_without_a_value_keeps_its_line() -> None:
    chart = bar_chart("a", [Bar("known", 1.0), Bar("unknown", None, "–"), Bar("broken", math.nan)])
    assert {"known", "unknown", "broken", "–"} <= set(texts(chart))
    assert len(paths(chart, "series-1")) == 1


def test_no_bars_are_refused() -> None:
    with pytest.raises(ValueError, match="no bars"):
        bar_chart("a", [])


# Heat maps


def test_few_classes_have_their_counts_written_out() -> None:
    assert sorted(texts(cells())) == sorted(["cat", "dog"] * 2 + ["5", "1", "4", "predicted", "true"])


def test_errors_have_another_colour_than_hits() -> None:
    assert len(paths(cells(), "bad")) == 1
    assert "bad" not in heat_map("a", [[5, 0], [0, 4]], ["cat", "dog"])


def test_many_classes_are_cells_alone_with_every_other_name() -> None:
    names = [f"c{index}" for index in range(40)]
    counts = [[7 * (row == column) for column in range(40)] for row in range(40)]
    shown = texts(heat_map("a", counts, names))
    assert "7" not in shown
    assert "c38" in shown
    assert "c39" not in shown


def test_counts_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="not 2 by 2"):
        heat_map("a", [[1, 2]], ["a", "b"])
