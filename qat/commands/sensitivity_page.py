"""Tables of `qat sensitivity` for the terminal and its HTML page, and the charts of that page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qat.evaluation import percent
from qat.report.charts import Bar, Series, bar_chart, line_chart
from qat.report.page import ABSENT, Figure, Table, Tile, render
from qat.sensitivity.bitwidths import Setting, Width
from qat.sensitivity.findings import Findings, decibels
from qat.sensitivity.parts import GROUPS, Sensitivity, ranks_of
from qat.sensitivity.variants import Measure

#: Number of layers in the terminal's table and in bar charts.
MOST_SENSITIVE = 10


def network_table(findings: Findings) -> Table:
    """A row each for the float-rest network, the network quantized by the recipe, and the suggested one."""
    suggestion = findings.suggestion
    rows = [
        ("float rest", findings.float_rest, ABSENT),
        ("recipe", findings.recipe, f"{suggestion.recipe_weight_bytes:,}"),
        ("suggestion", suggestion.measure, f"{suggestion.weight_bytes:,}"),
    ]
    return Table(
        ("network", "top-1", "answers changed", "SQNR dB", "weight bytes"),
        [(name, percent(one.top1), str(one.changed), decibels(one.sqnr), size) for name, one, size in rows],
        f"Before fine-tuning, on {findings.images} of {findings.test_images} test images",
    )


def sensitivity_table(found: Sequence[Sensitivity], caption: str = "", shown: int | None = None) -> Table:
    """Groups or layers, most sensitive first: the first ``shown`` of ``found``, or all."""
    ranks = ranks_of(found)
    rows = [
        (
            one.name,
            f"{one.loss:+.2f}",
            str(one.alone.changed),
            decibels(one.alone.sqnr),
            str(ranks[one.name].by_noise),
            f"{one.gain:+.2f}",
            f"{one.gain_db:+.2f}",
            str(ranks[one.name].by_gain),
        )
        for one in found[:shown]
    ]
    headings = (
        found[0].kind if found else "part",
        "alone: points lost",
        "answers changed",
        "SQNR dB",
        "rank by noise",
        "left out: points gained",
        "dB gained",
        "rank by gain",
    )
    return Table(headings, rows, caption)


def width_table(findings: Findings) -> Table:
    """A row for every setting at every lower number of bits."""
    rows = [
        (
            one.setting.label,
            str(one.bits),
            percent(one.measure.top1),
            f"{one.loss:+.2f}",
            str(one.measure.changed),
            decibels(one.measure.sqnr),
            f"{one.drop:+.2f}",
            "yes" if one.within else "no",
        )
        for one in findings.widths
    ]
    headings = (
        "setting",
        "bits",
        "top-1",
        "points lost",
        "answers changed",
        "SQNR dB",
        "dB lost",
        "within limits",
    )
    return Table(headings, rows, "One setting at fewer bits, the others as in the recipe")


def page(findings: Findings) -> str:
    """The HTML page on ``findings``: one file that loads nothing."""
    suggestion = findings.suggestion
    tiles = [
        Tile("Float rest", percent(findings.float_rest.top1), "top-1"),
        Tile("As in the recipe", percent(findings.recipe.top1), f"{decibels(findings.recipe.sqnr)} dB"),
        Tile("Suggestion", percent(suggestion.measure.top1), f"{decibels(suggestion.measure.sqnr)} dB"),
        Tile(
            "Weights",
            f"{suggestion.weight_bytes / 1e6:.2f} MB",
            f"instead of {suggestion.recipe_weight_bytes / 1e6:.2f} MB",
        ),
    ]
    layers = findings.layers
    return render(
        "sensitivity.html",
        name=findings.loaded.name,
        facts=(
            f"{findings.architecture} · {findings.images} of {findings.test_images} test images · "
            f"{findings.seconds:.0f} s"
        ),
        verdict=findings.verdict(),
        notes=findings.notes(),
        tiles=tiles,
        networks=network_table(findings),
        groups=sensitivity_table(findings.groups) if findings.groups else None,
        group_charts=_part_charts(findings.groups) if findings.groups else [],
        layers=sensitivity_table(layers) if layers else None,
        layer_charts=[_along(layers, findings), *_part_charts(layers)] if layers else [],
        widths=replace(width_table(findings), caption="") if findings.widths else None,
        width_charts=_width_charts(findings) if findings.widths else [],
        section=findings.section(),
    )


def _part_charts(found: Sequence[Sensitivity]) -> list[Figure]:
    kind = found[0].kind
    most = min(MOST_SENSITIVE, len(found))
    worst = f" The first {most} of {len(found)}." if most < len(found) else ""
    by_noise = sorted(found, key=lambda part: part.alone.sqnr)[:most]
    by_gain = sorted(found, key=lambda part: -part.gain_db)[:most]
    noise = [Bar(part.name, _noise(part.alone), f"{decibels(part.alone.sqnr)} dB") for part in by_noise]
    lost = [Bar(part.name, part.loss, f"{part.loss:+.2f}", "series-2") for part in found[:most]]
    gained = [Bar(part.name, part.gain_db, f"{part.gain_db:+.2f} dB", "series-3") for part in by_gain]
    return [
        Figure(
            "Noise",
            bar_chart(f"Noise of the logits, one {kind} quantized", noise, x_label="noise, % of the signal"),
            f"One {kind} quantized, all else in float: power of the noise in the logits.{worst}",
        ),
        Figure(
            "Accuracy lost",
            bar_chart(f"Top-1 lost, one {kind} quantized", lost, x_label="points of top-1"),
            f"One {kind} quantized, all else in float; equal losses in the order of their noise.{worst}",
        ),
        Figure(
            "Noise saved",
            bar_chart(f"Noise saved, one {kind} in float", gained, x_label="dB"),
            f"One {kind} in float, all else quantized: signal to noise gained.{worst}",
        ),
    ]


def _noise(measure: Measure) -> float | None:
    """Power of the logits' noise in percent of the signal's; None where the logits are not finite."""
    return 100 * 10 ** (-measure.sqnr / 10) if measure.sqnr > -math.inf else None


def _along(layers: Sequence[Sensitivity], findings: Findings) -> Figure:
    """The chart of SQNR (dB) against a layer's place in the network, with one layer quantized at a time."""
    places = {name: place for place, name in enumerate(findings.layer_order, start=1)}
    series = [
        Series(group, *_points(places, [one for one in layers if one.group == group]), dots=True)
        for group in GROUPS
        if any(one.group == group for one in layers)
    ]
    chart = line_chart(
        "Signal to noise of each layer alone, along the network",
        series,
        x_label="layer, from input to output",
        y_label="SQNR of the logits, dB",
    )
    return Figure("Along the network", chart, "One layer quantized, all else in float. Lower is noisier.")


def _points(places: dict[str, int], layers: Sequence[Sensitivity]) -> tuple[list[float], list[float | None]]:
    ordered = sorted(layers, key=lambda one: places[one.name])
    return [float(places[one.name]) for one in ordered], [one.alone.sqnr for one in ordered]


def _width_charts(findings: Findings) -> list[Figure]:
    settings: dict[Setting, list[Width]] = {}
    for width in findings.widths:
        settings.setdefault(width.setting, []).append(width)
    quantization = findings.loaded.recipe.quantization

    def series(values: dict[Setting, list[float | None]]) -> list[Series]:
        return [
            Series(
                f"{setting.group} {'W' if setting.key == 'weight_bits' else 'A'}",
                [
                    float(getattr(getattr(quantization, setting.group), setting.key)),
                    *(float(one.bits) for one in widths),
                ],
                values[setting],
            )
            for setting, widths in settings.items()
        ]

    noise: dict[Setting, list[float | None]] = {
        setting: [findings.recipe.sqnr, *(one.measure.sqnr for one in widths)]
        for setting, widths in settings.items()
    }
    accuracy: dict[Setting, list[float | None]] = {
        setting: [findings.recipe.top1, *(one.measure.top1 for one in widths)]
        for setting, widths in settings.items()
    }
    return [
        Figure(
            "Signal to noise",
            line_chart("SQNR by bits", series(noise), x_label="bits", y_label="SQNR of the logits, dB"),
            "Weights (W) or activations (A) of one group at fewer bits, all else as in the recipe.",
        ),
        Figure(
            "Accuracy",
            line_chart("Top-1 by bits", series(accuracy), x_label="bits", y_label="top-1, %"),
            "The same networks, before fine-tuning.",
        ),
    ]
