"""Reports in a real browser: nothing is loaded, and everything can be seen and read.

Without a Chromium these tests are skipped, unless QAT_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from tests.helpers.reports import answers, binary_layer, layer, page

# A worker looks at each page once, and makes the report on a run once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reports")]

NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"phone": (375, 812), "desktop": (1280, 900)}
THEMES = ("light", "dark")


@dataclass(eq=False)
class Opened:
    """A page that has been looked at: what it asked for and complained about meanwhile."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


#: Opens a file in a view and a theme.
Look = Callable[[Path, str, str], Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        missing = f"none of {', '.join(NAMES)} is installed"
        if os.environ.get("QAT_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section filled: curves, changed images, many layers, times, long names."""
    folder = tmp_path_factory.mktemp("a-run-with-quite-a-long-name-20260101-000000")
    names = [*"012345678", "a class with a name that is long enough to need several lines on a phone"]
    labels = [index % 10 for index in range(100)]
    after = [9 if index % 17 == 0 else label for index, label in enumerate(labels)]
    before = [3 if index % 23 == 0 else label for index, label in enumerate(labels)]
    layers = [
        one
        for block in range(1, 15)
        for one in (
            layer(f"feature.{block}.trunk_mid", sqnr=30.0 + block),
            layer(f"feature.{block}.Attention.se.attention", group="se", sqnr=40.0 + block),
            binary_layer(f"feature.{block}.Attention.binary_conv", flipped=0.01 * block),
        )
    ]
    metrics = [
        {
            "epoch": number,
            "loss": 1.0 / number,
            "test_loss": None if number == 3 else 1.2 / number,
            "top1": 90.0 + number,
            "test_top1": 89.0 + number,
            "learning_rate": 1e-4 / number,
            "temperature": 10.0**-number,
        }
        for number in range(1, 9)
    ]
    results = [
        {"target": name, "ms_median": time, "ms_min": time, "ms_max": time, "ratio_to_float32": 16.0 / time}
        for name, time in (("float32", 16.0), ("model", 8.0))
    ]
    settings = {"threads": 1, "batch": 1, "repeats": 20}
    path = folder / "report.html"
    path.write_text(
        page(
            folder,
            answers(labels, after, before, names, side=16),
            layers,
            metrics=metrics,
            summary={"best_epoch": 8, "data": {"test": "f" * 64}, "versions": {"torch": "2.11"}},
            bench={"machine": {"processor": "a processor"}, "settings": settings, "results": results},
            recipe="checkpoint: " + "/a/very/long/path" * 12 + "\n",
            problems=["A note on something that is missing, with a path: " + "/a/very/long/path" * 5],
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def look(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """Opens a file in a view and a theme, once; pictures stay in the tests' folder."""
    pictures = tmp_path_factory.mktemp("pictures")

    @functools.cache
    def opened(path: Path, view: str, theme: str) -> Opened:
        width, height = VIEWS[view]
        scheme: Any = theme
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        seen = Opened(context.new_page())

        def pass_on(route: Route) -> None:
            seen.requests.append(route.request.url)
            route.continue_()

        context.route("**/*", pass_on)
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.goto(path.as_uri())
        seen.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        seen.page.screenshot(path=pictures / f"{path.parent.name}-{view}-{theme}.png", full_page=True)
        return seen

    return opened


every_view = pytest.mark.parametrize("view", VIEWS)
every_theme = pytest.mark.parametrize("theme", THEMES)


@every_view
@every_theme
def test_a_report_loads_nothing_and_complains_of_nothing(
    look: Look, full_report: Path, view: str, theme: str
) -> None:
    seen = look(full_report, view, theme)
    assert [url for url in seen.requests if not url.startswith("data:")] == [full_report.as_uri()]
    assert seen.complaints == []


@every_view
@every_theme
def test_no_part_is_wider_than_the_screen_and_every_section_is_seen(
    look: Look, full_report: Path, view: str, theme: str
) -> None:
    found = look(full_report, view, theme).page
    widths = found.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(widths) <= VIEWS[view][0]
    headings = found.locator("h2")
    assert headings.count() == 8
    for heading in headings.all():
        assert heading.is_visible()
        box = heading.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= VIEWS[view][0]


@every_view
def test_text_of_charts_is_large_enough_to_read(look: Look, full_report: Path, view: str) -> None:
    sizes = look(full_report, view, "light").page.evaluate(
        """[...document.querySelectorAll('svg.chart text')].map(text => {
            const svg = text.ownerSVGElement;
            return parseFloat(getComputedStyle(text).fontSize)
                * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        })"""
    )
    assert len(sizes) > 50
    assert min(sizes) >= 10.0


@every_view
def test_charts_stay_within_their_column(look: Look, full_report: Path, view: str) -> None:
    boxes = look(full_report, view, "light").page.evaluate(
        """[...document.querySelectorAll('svg.chart')].map(svg => {
            const column = svg.parentElement.getBoundingClientRect();
            const texts = [...svg.querySelectorAll('text')].map(one => one.getBoundingClientRect());
            return [Math.max(...texts.map(one => one.right)) - column.right,
                    column.left - Math.min(...texts.map(one => one.left))];
        })"""
    )
    assert len(boxes) > 8
    assert max(max(box) for box in boxes) <= 8.0


#: Contrast of each text's colour with what lies behind it, as WCAG 2 defines it.
CONTRASTS = """() => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b]
        .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let one = element; one; one = one.parentElement) {
            const colour = numbers(getComputedStyle(one).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const ratio = (one, other) => {
        const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const plain = 'p, h1, h2, h3, dt, dd, a, th, td, summary, pre, strong, span';
    return [
        ...[...document.querySelectorAll(plain)].filter(one => one.innerText.trim() && !one.matches('.skip'))
            .map(one => [one.tagName + ' ' + one.className, getComputedStyle(one).color, one]),
        ...[...document.querySelectorAll('svg.chart text')].filter(one =>
            !one.getAttribute('style').includes('on-fill'))
            .map(one => ['text', getComputedStyle(one).fill, one]),
    ].map(([name, colour, one]) => [ratio(numbers(colour), behind(one)), name]);
}"""


@every_theme
def test_text_stands_out_from_its_background(look: Look, full_report: Path, theme: str) -> None:
    found = look(full_report, "desktop", theme).page.evaluate(CONTRASTS)
    assert len(found) > 300
    assert min(found)[0] >= 4.5, min(found)


def test_themes_differ_and_charts_follow_them(look: Look, full_report: Path) -> None:
    colours = {}
    for theme in THEMES:
        colours[theme] = look(full_report, "desktop", theme).page.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector('svg.chart text')).fill]"""
        )
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"], strict=True))


def test_every_image_is_shown(look: Look, full_report: Path) -> None:
    sizes = look(full_report, "phone", "light").page.evaluate(
        "[...document.images].map(one => [one.complete, one.naturalWidth, one.getBoundingClientRect().width])"
    )
    assert len(sizes) > 5
    assert all(complete and natural > 0 and shown >= 100 for complete, natural, shown in sizes)


def test_the_first_column_stays_in_sight_when_a_table_is_scrolled(look: Look, full_report: Path) -> None:
    moved = look(full_report, "phone", "light").page.evaluate(
        """[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)
        .map(one => {
            const cell = one.querySelector('tbody th');
            const before = cell.getBoundingClientRect().left;
            one.scrollLeft = 1000;
            return [one.scrollLeft, cell.getBoundingClientRect().left - before];
        })"""
    )
    assert moved
    assert all(scrolled > 0 and abs(shift) < 1 for scrolled, shift in moved)


# Other views are as those of the report above, which is fuller.
@pytest.mark.parametrize("view", ["phone", pytest.param("desktop", marks=pytest.mark.exhaustive)])
def test_the_report_of_a_real_run_holds_up_as_well(reported: Path, look: Look, view: str) -> None:
    seen = look(reported, view, "dark")
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [reported.as_uri()]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= VIEWS[view][0]
    assert seen.page.locator("h2").count() == 8
    assert seen.page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
