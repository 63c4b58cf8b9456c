"""The frame of every page: what is escaped, what it may load, how tables are told."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

import qat.report.page
from qat import __version__
from qat.report.page import Table, Tile, breakable, number, render

PARTS = '{% from "parts.html" import section, navigation, tiles, figure, grid, table, fold, facts %}'


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> object:
    """Renders a page whose content is a template's text."""

    def rendered(body: str, **context: object) -> str:
        environment = qat.report.page.environment()
        text = '{% extends "base.html" %}' + PARTS + "{% block title %}T{% endblock %}"
        loader = jinja2.DictLoader({"test.html": text + "{% block content %}" + body + "{% endblock %}"})
        overlay = environment.overlay(loader=jinja2.ChoiceLoader([loader, environment.loader]))  # type: ignore[list-item]
        monkeypatch.setattr(qat.report.page, "environment", lambda: overlay)
        return render("test.html", **context)

    return rendered


def test_text_is_escaped_and_charts_are_not(page) -> None:  # type: ignore[no-untyped-def]
    text = page("{{ name }}{{ figure(name, chart) }}", name="<script>x", chart=Markup("<svg>here</svg>"))
    assert "<script" not in text
    assert text.count("&lt;script&gt;x") == 2
    assert "<svg>here</svg>" in text


def test_a_name_that_is_not_given_is_an_error(page) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(jinja2.UndefinedError, match="absent"):
        page("{{ absent }}")


def test_a_page_may_load_nothing_and_asks_for_nothing(page) -> None:  # type: ignore[no-untyped-def]
    text = page("")
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert not re.search(r"<script|src=|@import|url\(|https?:", text)
    assert re.findall(r'href="([^#"][^"]*)"', text) == ["data:,"]


def test_a_page_follows_the_readers_theme_and_width(page) -> None:  # type: ignore[no-untyped-def]
    text = page("")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "color-scheme: light dark" in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert f"bnext-qat {__version__}" in text


def test_every_colour_of_the_charts_is_defined_in_every_theme() -> None:
    from qat.report.svg import COLOURS

    style = (Path(qat.report.page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark, print_ = (style.split(":root {")[part].split("}")[0] for part in (1, 2, 3))
    for theme in (light, dark, print_):
        assert set(COLOURS) <= set(re.findall(r"--([\w-]+):", theme))


def test_names_that_are_not_unicode_can_be_written(page) -> None:  # type: ignore[no-untyped-def]
    page("{{ name }}", name="a\udcffb").encode("utf-8")


def test_the_first_column_of_a_table_names_its_rows(page) -> None:  # type: ignore[no-untyped-def]
    content = Table(("layer", "bits"), [("a.b", "8"), ("c<d", "1")], "Layers & bits")
    text = page("{{ table(content) }}", content=content)
    assert "<h3>Layers &amp; bits</h3>" in text
    assert '<th scope="row">a.<wbr>b</th>' in text
    assert '<th scope="row">c&lt;d</th>' in text
    assert text.count("<td>") == 2
    assert text.count('scope="col"') == 2


def test_tiles_show_value_note_and_tone(page) -> None:  # type: ignore[no-untyped-def]
    text = page("{{ tiles(items) }}", items=[Tile("top-1", "99 %", "of 360", "good"), Tile("size", "5 MB")])
    assert '<dd class="value good">99 %</dd>' in text
    assert text.count('class="about"') == 1


def test_sections_can_be_reached_from_the_list(page) -> None:  # type: ignore[no-untyped-def]
    text = page(
        '{{ navigation([("a", "A")]) }}{% call section("a", "A", "lead") %}in{% endcall %}'
        '{% call fold("more") %}folded{% endcall %}{{ facts([("seed", 0)]) }}'
    )
    assert '<a href="#a">A</a>' in text
    assert '<section id="a" aria-labelledby="a-title">' in text
    assert "<summary>more</summary>\nfolded" in text
    assert "<dd>0</dd>" in text


def test_names_break_after_their_dots_and_stay_escaped() -> None:
    assert breakable("a.b_c/<d>") == Markup("a.<wbr>b_<wbr>c/<wbr>&lt;d&gt;")


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, 1e15, -1e308, 10**400, [1]])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None
    assert number(2) == 2.0
