"""Turn a matplotlib figure into an inline ``svg`` element that takes its colours and fonts from the page.

Matplotlib draws with placeholder colours, one for each CSS variable (:data:`COLOURS`), which are replaced
afterwards. The result is deterministic and short, and several can be put into one page.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from contextlib import AbstractContextManager
from typing import Final, Literal

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Width of a chart and size of its text, in SVG units. A phone shows a chart about 340 pixels wide.
WIDTH: Final = 420.0
TEXT: Final = 14.0
#: CSS variables that charts can use as colours.
COLOURS: Final = (
    "ink",
    "muted",
    "line",
    "good",
    "bad",
    "on-fill",
    "series-1",
    "series-2",
    "series-3",
    "series-4",
    "series-5",
    "series-6",
)
#: Colours that stand for these variables while matplotlib draws.
MARKS: Final = {name: f"#fe01{index:02x}" for index, name in enumerate(COLOURS)}
_VARIABLES: Final = {mark: f"var(--{name})" for name, mark in MARKS.items()}
_NAMESPACE: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bnext-qat",
    "font.size": TEXT,
    "path.simplify": False,
    "axes.unicode_minus": True,
    # A $ in the name of a class or layer must not start a formula.
    "text.parse_math": False,
}


def chart_style() -> AbstractContextManager[None]:
    """Context with matplotlib's defaults and :data:`_SETTINGS`, without the user's own configuration."""
    return style.context(_SETTINGS, after_reset=True)


def new_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of the width of all charts and of ``height`` SVG units, without a background."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout=layout, facecolor="none")


def tidy(axes: Axes, grid: Literal["x", "y"] | None) -> None:
    """Remove frame and tick marks of ``axes``, and draw fine grid lines along the axis ``grid``."""
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_edgecolor(MARKS["line"])
    axes.set_facecolor("none")
    axes.tick_params(which="both", length=0, pad=5, colors=MARKS["muted"])
    axes.xaxis.label.set_color(MARKS["muted"])
    axes.yaxis.label.set_color(MARKS["muted"])
    if grid is not None:
        axes.grid(axis=grid, color=MARKS["line"], linewidth=1.0)
        axes.set_axisbelow(True)


def clean(text: str) -> str:
    """``text`` without control characters and lone surrogates, which no font can show."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def shortened(text: str, most: int) -> str:
    """``text`` in at most ``most`` characters. The middle is cut, since both ends of a name say more."""
    text = clean(text)
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def to_svg(figure: Figure, title: str) -> Markup:
    """The figure as an ``svg`` element with CSS colours, a title, and identifiers that no other chart has."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # Matplotlib warns of characters that its own font lacks, but the browser draws the text.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="svg", metadata={"Date": None})
    title = clean(title)
    content = file.getvalue()
    # Several charts share a page, so the identifiers of each are made unique.
    key = "c" + hashlib.sha256(f"{title}\0{content}".encode()).hexdigest()[:10]
    # Only the drawing is taken: matplotlib also writes metadata, and a style that would affect the page.
    drawing = ElementTree.fromstring(content).find(f"{_NAMESPACE}g")
    assert drawing is not None
    height = figure.get_figheight() * 72
    root = ElementTree.Element(
        "svg",
        {"class": "chart", "role": "img", "aria-label": title, "viewBox": f"0 0 {WIDTH:g} {height:g}"},
    )
    ElementTree.SubElement(root, "title").text = title
    used = {element.get(_HREF, "").removeprefix("#") for element in drawing.iter()}
    root.extend(_plain(drawing, key, used))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _plain(element: ElementTree.Element, key: str, used: set[str]) -> list[ElementTree.Element]:
    """``element`` and its children, rewritten in a short form that draws the same picture.

    Args:
        element: an element that matplotlib wrote.
        key: prefix of identifiers, unique to the chart.
        used: identifiers that the chart refers to; others are left out.
    """
    style_of = element.get("style", "")
    if element.tag == f"{_NAMESPACE}path" and style_of == "fill: none":  # an invisible background
        return []
    children = [found for child in element for found in _plain(child, key, used)]
    plain = ElementTree.Element(element.tag.removeprefix(_NAMESPACE))
    for name, value in element.items():
        if name == "id":
            if value in used:
                plain.set("id", key + value)
        elif name == _HREF:
            plain.set("href", value.replace("#", f"#{key}"))
        elif name == "clip-path":  # not needed: charts draw nothing outside of their axes
            continue
        elif name == "style":
            value = re.sub(r" ?font-family:[^;]*;", "", value)
            plain.set("style", re.sub(r"#fe01\w\w", lambda found: _VARIABLES[found[0]], value))
        elif not (name == "transform" and "rotate(-0 " in value):
            value = re.sub(
                r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value
            )
            plain.set(name, " ".join(value.split()))
    plain.text = element.text if plain.tag in ("text", "tspan") else None
    if plain.tag in ("g", "defs") and not plain.attrib and (plain.tag == "g" or not children):
        return children
    plain.extend(children)
    return [plain]
