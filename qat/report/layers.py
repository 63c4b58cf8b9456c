"""The section of the report on layers: charts by block, and tables."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Final, Literal

from qat.report.charts import Bar, Series, bar_chart, line_chart
from qat.report.layer_statistics import LayerStatistics
from qat.report.page import ABSENT, Figure, Table, number

#: Kinds of quantization points, in the order in which charts give them colours.
_KINDS: Final = ("stem", "trunk", "se activations", "se weights", "classifier")
_TITLES: Final = {
    "stem": "stem",
    "trunk": "trunk",
    "se activations": "attention, activations",
    "se weights": "attention, weights",
    "classifier": "classifier",
    "binary": "binary convolutions",
}
_WORST: Final = 6
#: Height of the charts by block in SVG units, equal to that of the chart of the noisiest points.
_HEIGHT: Final = 284.0
#: SQNR in dB from which a point counts as exact: its noise is the rounding of float arithmetic.
_EXACT: Final = 100.0


def kind_of(layer: LayerStatistics) -> str:
    """The kind of a quantization point: its group, or ``se activations`` or ``se weights``."""
    if layer.group == "se":
        return "se weights" if layer.weights else "se activations"
    return layer.group


def block_of(name: str, last: int) -> int:
    """Number of the block that a module is in: 0 is the stem, ``last`` is the head."""
    found = re.match(r"feature\.(\d+)\.", name)
    return int(found[1]) if found else last


def layer_figures(layers: Sequence[LayerStatistics]) -> list[Figure]:
    """Charts of noise, clipping, scales, sign flips and input signs by block, and of the noisiest points."""
    points = [layer for layer in layers if layer.group != "binary"]
    binary = [layer for layer in layers if layer.group == "binary"]
    figures = []
    if points:
        figures += [
            _clouds(
                "Signal-to-quantization-noise ratio",
                "Of each point, in decibels. 6 dB are one bit; higher is better.",
                points,
                _noisy,
                "SQNR (dB)",
            ),
            _clouds(
                "Clipped values",
                "Share of values beyond the outermost integers.",
                points,
                lambda one: None if one.clipped is None else 100 * one.clipped,
                "clipped (%)",
                least=0.0,
            ),
            _worst(points),
            _clouds(
                "Scales",
                "Step of each grid; of weights the largest of all channels.",
                points,
                lambda one: one.scale_max,
                "scale",
                scale="log",
            ),
        ]
    if any(one.flipped is not None for one in binary):
        flips = any(one.flipped for one in binary)
        figures.append(
            _clouds(
                "Flipped sign bits",
                "Share of binary weights whose sign fine-tuning changed" + ("." if flips else ": none did."),
                binary,
                lambda one: None if one.flipped is None else 100 * one.flipped,
                "flipped (%)",
                least=0.0,
            )
        )
    if binary:
        figures.append(
            _clouds(
                "Input signs",
                "Of binary convolutions. Near 0 or 100 %, a bit carries little information.",
                binary,
                lambda one: None if one.positive is None else 100 * one.positive,
                "signs that are +1 (%)",
            )
        )
    return figures


def _clouds(
    title: str,
    note: str,
    layers: Sequence[LayerStatistics],
    value: Callable[[LayerStatistics], float | None],
    label: str,
    *,
    scale: Literal["linear", "log"] = "linear",
    least: float | None = None,
) -> Figure:
    """A chart with a dot for each layer above its block; kinds have colours and are side by side."""
    last = 1 + max(block_of(layer.name, 0) for layer in layers)
    kinds = _KINDS if any(one.group != "binary" for one in layers) else ("binary",)
    series = []
    for index, kind in enumerate(kinds):
        some = [one for one in layers if kind_of(one) == kind]
        shift = 0.16 * (index - len(kinds) // 2)
        places = [block_of(one.name, last) + shift for one in some]
        series.append(Series(_TITLES[kind], places, [value(one) for one in some], dots=True))
    chart = line_chart(
        f"{title} by block",
        series,
        x_label=f"block (0: stem, {last}: head)",
        y_label=label,
        scale=scale,
        least=least,
        height=_HEIGHT,
    )
    return Figure(title, chart, note)


def _noisy(layer: LayerStatistics) -> float | None:
    """The SQNR in dB; None if the only noise is the rounding of float arithmetic."""
    value = number(layer.sqnr)
    return value if value is not None and value < _EXACT else None


def _worst(points: Sequence[LayerStatistics]) -> Figure:
    known = [(value, one) for one in points if (value := _noisy(one)) is not None]
    known.sort(key=lambda item: item[0])
    colours = dict(zip(_KINDS, (f"series-{index}" for index in range(1, 6)), strict=True))
    bars = [Bar(one.name, value, f"{value:.1f} dB", colours[kind_of(one)]) for value, one in known[:_WORST]]
    bars = bars or [Bar("no noise anywhere", None)]
    chart = bar_chart("Points with the lowest signal-to-noise ratio", bars, x_label="SQNR (dB)")
    return Figure("Noisiest points", chart, "Where more bits, or another observer, would help first.")


def group_table(layers: Sequence[LayerStatistics]) -> Table:
    """A table with a row per kind of point: number of points, bits, noise and clipping."""
    rows = []
    for kind in (*_KINDS, "binary"):
        some = [one for one in layers if kind_of(one) == kind]
        if not some:
            continue
        ratios = [value for one in some if (value := _noisy(one)) is not None]
        clipped = [one.clipped for one in some if one.clipped is not None]
        flipped = [one.flipped for one in some if one.flipped is not None]
        rows.append(
            (
                _TITLES[kind],
                f"{len(some)}",
                ", ".join(sorted({one.type for one in some})),
                f"{statistics.median(ratios):.1f}" if ratios else ABSENT,
                f"{min(ratios):.1f}" if ratios else ABSENT,
                _share(max(clipped)) if clipped else ABSENT,
                _share(statistics.mean(flipped)) if flipped else ABSENT,
            )
        )
    headings = (
        "group",
        "points",
        "type",
        "median SQNR dB",
        "lowest SQNR dB",
        "most clipped",
        "mean signs flipped",
    )
    return Table(headings, rows, text_columns=frozenset({0, 2}))


def layer_table(layers: Sequence[LayerStatistics]) -> Table:
    """A table of every point, in the order of the network."""
    headings = (
        "layer",
        "type",
        "bits",
        "what",
        "scale",
        "lowest",
        "highest",
        "clipped",
        "SQNR dB",
        "signs flipped",
        "inputs +1",
    )
    rows = [
        (
            one.name,
            one.type,
            f"{one.bits}",
            "input signs" if one.group == "binary" else "weights" if one.weights else "activations",
            ABSENT if one.group == "binary" else _scale(one),
            _figure(one.low),
            _figure(one.high),
            _share(one.clipped),
            _decibels(one.sqnr),
            _share(one.flipped),
            _share(one.positive),
        )
        for one in layers
    ]
    return Table(headings, rows, text_columns=frozenset({0, 1, 3}))


def _scale(one: LayerStatistics) -> str:
    low, high = f"{one.scale_min:.3g}", f"{one.scale_max:.3g}"
    return low if low == high else f"{low} – {high}"


def _figure(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _share(share: float | None) -> str:
    """A share as percent. A share above 0 is never shown as 0 %."""
    if share is None:
        return ABSENT
    return "0 %" if share == 0 else "< 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def _decibels(value: float | None) -> str:
    if value is None or value != value:
        return ABSENT
    return "exact" if value >= _EXACT else f"{value:.1f}"
