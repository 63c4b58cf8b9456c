"""From matplotlib's figures to elements that several of one page can share."""

from __future__ import annotations

import re

import pytest

from qat.report.svg import COLOURS, MARKS, WIDTH, chart_style, clean, new_figure, shortened, to_svg


def drawn(title: str = "a line", colour: str = "series-1") -> str:
    with chart_style():
        figure = new_figure(100.0)
        axes = figure.add_subplot()
        axes.plot([1, 2, 3], [1, 3, 2], color=MARKS[colour], marker="o")
        axes.grid(color=MARKS["line"])
        return str(to_svg(figure, title))


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_becomes_a_css_variable(colour: str) -> None:
    text = drawn(colour=colour)
    assert f"stroke: var(--{colour})" in text
    assert MARKS[colour] not in text


def test_a_chart_says_what_it_shows_to_those_who_cannot_see_it() -> None:
    text = drawn('loss & "accuracy" <b>')
    label = "loss &amp; &quot;accuracy&quot; &lt;b&gt;"
    assert text.startswith(f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH:g} 100">')
    assert '<title>loss &amp; "accuracy" &lt;b&gt;</title>' in text


def test_two_charts_share_no_identifier_and_refer_to_their_own() -> None:
    charts = [drawn("one"), drawn("two")]
    found = [set(re.findall(r' id="([^"]+)"', chart)) for chart in charts]
    for chart, identifiers in zip(charts, found, strict=True):
        assert identifiers  # of markers
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', chart)) == identifiers
    assert not found[0] & found[1]


def test_no_style_and_no_date_reaches_the_page() -> None:
    text = drawn()
    assert not re.search(r"<style|<metadata|<!--|<\?xml|xmlns|font-family|dc:date", text)


def test_control_characters_and_half_surrogates_are_replaced() -> None:
    assert clean("a\x00b\udcffc\nd") == "a�b�c�d"
    assert clean("größer 中 ±") == "größer 中 ±"


@pytest.mark.parametrize(
    ("text", "most", "short"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc…fg"),
        ("feature.1.se.pooled", 9, "feat…oled"),
        ("ab", 1, "…"),
    ],
)
def test_long_text_loses_its_middle(text: str, most: int, short: str) -> None:
    assert shortened(text, most) == short
    assert len(short) <= most
