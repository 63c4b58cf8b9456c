"""Charts as inline SVG that take fonts and colours, light or dark, from the page around them.

Each chart is 420 units wide with text of 14 units, so that it can be read on a phone without zooming. The
same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qat.report.svg import MARKS, WIDTH, chart_style, clean, new_figure, shortened, tidy, to_svg

#: Largest number of points of a line that are marked by dots.
_MARKED: Final = 40
#: Largest number of classes at which a heat map writes its counts into the cells.
_WRITTEN: Final = 12


@dataclass(frozen=True)
class Series:
    """One line of a line chart, or a set of points.

    Attributes:
        name: name in the legend.
        x: horizontal positions.
        y: values; None, NaN and infinities leave a gap.
        dots: whether to draw points without a line.
        dashed: whether to draw a dashed line, such as for the training set beside the test set.
        plain: whether to leave the points of a line unmarked, such as for a level to compare with.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False
    dashed: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: text above the bar.
        value: length of the bar; None, NaN and infinities draw no bar.
        text: text to the right of the label, such as the value with its unit.
        colour: one of :data:`qat.report.svg.COLOURS`.
        low, high: ends of an error bar, such as a confidence interval.
    """

    label: str
    value: float | None
    text: str = ""
    colour: str = "series-1"
    low: float | None = None
    high: float | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    scale: Literal["linear", "log"] = "linear",
    least: float | None = None,
    whole_x: bool = True,
    height: float = 250.0,
) -> Markup:
    """A chart of lines or sets of points, each in its own colour.

    Args:
        title: what the chart shows, for screen readers; the page writes the visible caption.
        series: at most six, drawn in order.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis, with its unit.
        scale: scale of the vertical axis; a logarithmic one leaves out values that are not positive.
        least: value at which the vertical axis begins, such as 0 for shares; None fits the values.
        whole_x: whether ticks are at whole numbers only, such as epochs.
        height: height of the chart in SVG units.
    """
    if not 1 <= len(series) <= 6:
        raise ValueError(f"{len(series)} series, allowed are 1 to 6")
    with chart_style():
        figure = new_figure(height)
        axes = figure.add_subplot()
        for number, one in enumerate(series, start=1):
            values = [_number(value, positive=scale == "log") for value in one.y]
            marked = one.dots or (len(values) <= _MARKED and not one.plain)
            axes.plot(
                list(one.x),
                values,
                color=MARKS[f"series-{number}"],
                linestyle="none" if one.dots else "--" if one.dashed else "-",
                linewidth=2.0,
                marker="o" if marked else None,
                markersize=4.0 if one.dots else 5.0,
                # Matplotlib leaves names with an underscore out of the legend.
                label=clean(one.name) if any(map(math.isfinite, values)) else "_",
                clip_on=False,
            )
        axes.set_yscale(scale)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole_x, min_n_ticks=1))
        if scale == "log":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        else:
            _frame(axes, [_number(value) for one in series for value in one.y], least)
        axes.set_xmargin(0.03)
        tidy(axes, grid="y")
        if len(series) > 1:
            _legend(figure, axes, len(series))
        return to_svg(figure, title)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    x_label: str = "",
    start: float = 0.0,
    end: float | None = None,
) -> Markup:
    """A chart of horizontal bars. Labels are above the bars, so that long names need no margin.

    Args:
        title: what the chart shows, for screen readers.
        bars: from top to bottom; at least one.
        x_label: name of the values, with their unit.
        start: value at which bars begin; bars of smaller values point to the left.
        end: value at the right border; None fits the longest bar.
    """
    if not bars:
        raise ValueError("no bars")
    step = 38.0
    top, bottom = 4.0, 52.0 if x_label else 30.0
    height = top + step * len(bars) + bottom
    ends = [_number(value) for bar in bars for value in (bar.value, bar.low, bar.high)]
    known = [start, *(value for value in ends if math.isfinite(value))]
    left, right = min(known), max(known) if end is None else end
    right = right if right > left else left + 1.0
    with chart_style():
        figure = new_figure(height, layout=None)
        axes = figure.add_axes((0.02, bottom / height, 0.96, step * len(bars) / height))
        axes.set_xlim(left, right)
        axes.set_ylim(len(bars), 0)
        axes.set_yticks([])
        # Numbers at the borders must not be cut off.
        ticks = [tick for tick in MaxNLocator(5).tick_values(left, right) if left <= tick <= right]
        axes.set_xticks(ticks)
        axes.ticklabel_format(axis="x", useOffset=False, style="plain")
        for tick, text in zip(ticks, axes.get_xticklabels(), strict=True):
            share = (tick - left) / (right - left)
            text.set_horizontalalignment("left" if share < 0.03 else "right" if share > 0.97 else "center")
        across = axes.get_yaxis_transform()
        for row, bar in enumerate(bars):
            middle = row + 0.72
            axes.vlines(ticks, row + 0.54, row + 0.9, color=MARKS["line"], linewidth=1.0, clip_on=False)
            if math.isfinite(value := _number(bar.value)):
                colour = MARKS[bar.colour]
                axes.barh(middle, value - start, 0.3, left=start, color=colour, zorder=2, clip_on=False)
            if bar.low is not None and bar.high is not None:
                line: dict[str, Any] = {
                    "color": MARKS["ink"],
                    "linewidth": 1.5,
                    "marker": "|",
                    "markersize": 11.0,
                }
                axes.plot([bar.low, bar.high], [middle, middle], clip_on=False, **line)
            label = shortened(bar.label, 52 - len(bar.text))
            for x, what, side, ink in ((0.0, label, "left", "ink"), (1.0, clean(bar.text), "right", "muted")):
                look: dict[str, Any] = {
                    "ha": side,
                    "color": MARKS[ink],
                    "transform": across,
                }
                axes.text(x, row + 0.34, what, **look)
        axes.set_xlabel(x_label)
        tidy(axes, grid=None)
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, title)


def heat_map(
    title: str,
    counts: Sequence[Sequence[int]],
    labels: Sequence[str],
    *,
    x_label: str = "predicted",
    y_label: str = "true",
) -> Markup:
    """A square matrix of counts drawn as colours, such as a confusion matrix.

    The strength of a cell's colour is its share of its row. The diagonal has a colour of its own. With at
    most 12 classes, the counts are written into the cells.

    Args:
        title: what the chart shows, for screen readers.
        counts: rows of counts, as many rows and columns as ``labels``.
        labels: class names.
        x_label: what the columns are.
        y_label: what the rows are.
    """
    size = len(labels)
    if len(counts) != size or any(len(row) != size for row in counts):
        raise ValueError(f"counts are not {size} by {size}")
    cells: dict[tuple[str, int], list[Path]] = {}
    with chart_style():
        figure = new_figure(WIDTH)
        axes = figure.add_subplot()
        for row, values in enumerate(counts):
            total = max(sum(values), 1)
            for column, count in enumerate(values):
                if not count:
                    continue
                # The square root makes even one error in a hundred images visible.
                level = math.ceil(10 * math.sqrt(count / total))
                x, y = column, row
                square = Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)], closed=True)
                cells.setdefault(("series-1" if row == column else "bad", level), []).append(square)
                if size <= _WRITTEN:
                    ink = "on-fill" if level >= 7 else "ink"
                    axes.text(
                        column + 0.5, row + 0.52, str(count), color=MARKS[ink], ha="center", va="center"
                    )
        for (colour, level), paths in sorted(cells.items()):
            shape = Path.make_compound_path(*paths)
            axes.add_patch(PathPatch(shape, facecolor=MARKS[colour], alpha=level / 10, linewidth=0))
        axes.set_xlim(0, size)
        axes.set_ylim(size, 0)
        axes.set_aspect("equal")
        every = math.ceil(size / 20)
        shown = range(0, size, every)
        names = [shortened(labels[index], 9 if size <= _WRITTEN else 12) for index in shown]
        upright = size > _WRITTEN or max(map(len, names), default=0) > 3
        axes.set_xticks([index + 0.5 for index in shown], names, rotation=90 if upright else 0)
        axes.set_yticks([index + 0.5 for index in shown], names)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        tidy(axes, grid=None)
        for side in ("left", "right", "top", "bottom"):
            axes.spines[side].set_visible(True)
        return to_svg(figure, title)


def _frame(axes: Axes, values: Sequence[float], least: float | None) -> None:
    """A linear vertical axis that ends at ticks on both sides."""
    known = [value for value in values if math.isfinite(value)]
    low = min(known, default=0.0) if least is None else least
    high = max([low, *known])
    if high == low:
        high, low = low + 1.0, low if low == least else low - 1.0
    ticks = MaxNLocator(5).tick_values(low, high)
    axes.set_yticks(ticks)
    axes.set_ylim(ticks[0], ticks[-1])
    if max(abs(low), abs(high)) < 1e-3:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(count, 3),
        frameon=False,
        borderpad=0.0,
        borderaxespad=0.2,
        markerscale=1.3,
        handlelength=1.4,
        columnspacing=1.2,
        labelcolor=MARKS["ink"],
    )


def _number(value: float | None, *, positive: bool = False) -> float:
    """``value`` for matplotlib: NaN if there is nothing to draw."""
    if value is None or not math.isfinite(value) or (positive and value <= 0):
        return math.nan
    return float(value)
