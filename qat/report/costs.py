"""Sections of the report on costs: parameters, bytes, operations, and measured latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qat.models.operation_count import BINARY_PER_OPERATION, INT8_PER_OPERATION, LayerOperations, Operations
from qat.report.charts import Bar, bar_chart
from qat.report.page import ABSENT, Figure, Table, number

_TITLES: Final = {
    "stem": "stem",
    "binary": "binary convolutions",
    "se": "channel attention",
    "classifier": "classifier",
}


@dataclass(frozen=True)
class Costs:
    """Operations and bytes of a network.

    Attributes:
        operations: operation counts of its architecture.
        bits: bits of each layer's weights, by name, from :func:`weight_bits`.
    """

    operations: Operations
    bits: Mapping[str, int]

    def ops(self, layers: Sequence[LayerOperations] | None = None) -> float:
        """OPs of some layers, or of all, for one image, as the paper counts them.

        A multiply-accumulate (MAC) counts 1/64 if binary, 1/8 if its weights are quantized, and 1 in float.
        """
        return sum(
            layer.macs
            / (
                BINARY_PER_OPERATION
                if layer.binary
                else INT8_PER_OPERATION
                if self.bits[layer.name] <= 8
                else 1
            )
            for layer in (self.operations.layers if layers is None else layers)
        )

    @property
    def bytes(self) -> int:
        """Bytes of the parameters: each weight takes its bits, all other parameters are float32."""
        weights = sum(self.bits[layer.name] * layer.weights for layer in self.operations.layers)
        return -(-(weights + 32 * self.operations.parameters.others) // 8)


def weight_bits(operations: Operations, quantization_map: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bits of each layer's weights, by name: 1 if binary, else those of its quantizer, or 32 without one."""
    bits = {}
    for layer in operations.layers:
        owner = "feature.0" if layer.kind == "stem" else layer.name
        found = str(quantization_map.get(f"{owner}.weight_quantizer", {}).get("type", "float32"))
        bits[layer.name] = 1 if layer.binary else int(found.removeprefix("int").removeprefix("float"))
    return bits


def operations_table(costs: Costs) -> Table:
    """Weights, multiply-accumulates and OPs by kind of layer, for one image."""
    kinds = {
        title: [layer for layer in costs.operations.layers if layer.kind == kind]
        for kind, title in _TITLES.items()
    }
    kinds["all layers"] = list(costs.operations.layers)
    rows = []
    for title, layers in kinds.items():
        if not layers:
            continue
        bits = sorted({costs.bits[layer.name] for layer in layers})
        macs = [
            sum(layer.macs for layer in layers if low <= costs.bits[layer.name] <= high)
            for low, high in ((1, 1), (2, 8), (9, 32))
        ]
        rows.append(
            (
                title,
                f"{sum(layer.weights for layer in layers):,}",
                ", ".join(map(str, bits)),
                *(f"{value:,}" if value else ABSENT for value in macs),
                f"{costs.ops(layers):,.0f}",
                f"{100 * costs.ops(layers) / costs.ops():.1f} %",
            )
        )
    headings = ("layers", "weights", "bits", "BOPs", "integer MACs", "float MACs", "OPs", "share")
    side = costs.operations.image_size
    return Table(headings, rows, f"Operations of one image of {side} × {side} pixels")


def operations_figure(costs: Costs, quantization: str | None) -> Figure:
    """OPs by kind of layer, before and after quantization.

    Args:
        costs: of the network.
        quantization: name of its quantization, such as ``int8``; ``None`` for a float-rest network.
    """
    bars = []
    if quantization is not None:
        total = costs.operations.float_rest_ops
        bars.append(Bar("all, float rest", total / 1e6, f"{millions(total)} OPs", "series-6"))
    name = "all" if quantization is None else f"all, {quantization}"
    bars.append(Bar(name, costs.ops() / 1e6, f"{millions(costs.ops())} OPs"))
    for kind, title in _TITLES.items():
        layers = [layer for layer in costs.operations.layers if layer.kind == kind]
        if layers:
            found = costs.ops(layers)
            bars.append(Bar(title, found / 1e6, f"{millions(found)} OPs", "series-3"))
    chart = bar_chart("Operations of one image", bars, x_label="million OPs")
    note = (
        "OPs = BOPs / 64 + integer MACs / 8 + float MACs; BOPs are multiply-accumulates of signs, integer "
        "MACs those of weights of 2 to 8 bits."
    )
    return Figure("Operations", chart, note)


def size_table(costs: Costs, files: Sequence[Path], quantized: bool) -> Table:
    """Bytes of the parameters in several forms of storage, and of the run's files."""
    parameters = costs.operations.parameters
    full = parameters.float32_bytes
    rows = [
        ("all in float32", full),
        ("binary weights as bits, rest in float32", parameters.packed_bytes(32)),
    ]
    if quantized:
        rows.append(("binary weights as bits, rest as fine-tuned", costs.bytes))
    rows += [(path.name, path.stat().st_size) for path in files if path.is_file()]
    return Table(
        ("parameters", "MB", "of float32", "bytes"),
        [(name, f"{size / 1e6:.2f}", f"{100 * size / full:.1f} %", f"{size:,}") for name, size in rows],
        "Size of parameters and files",
    )


def megabytes(size: int) -> str:
    """A number of bytes as text in MB, or in kB if it is small."""
    return f"{size / 1e6:.2f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def millions(value: float) -> str:
    """A large number as short text, such as ``5.6 M`` or ``1.72 G``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def latency(bench: Mapping[str, Any]) -> tuple[Table, Figure, str] | None:
    """The section on latency, from the parsed JSON of ``qat bench --json``.

    Returns:
        A table, a chart, and a sentence on the conditions; None if ``bench`` is something else.
    """
    settings, machine, results = (bench.get(key) for key in ("settings", "machine", "results"))
    if not isinstance(settings, Mapping) or not isinstance(machine, Mapping) or not isinstance(results, list):
        return None
    found = [one for one in results if isinstance(one, Mapping) and number(one.get("ms_median")) is not None]
    if not found:
        return None

    def text(one: Mapping[str, Any], key: str, digits: int, unit: float = 1.0) -> str:
        value = number(one.get(key))
        return ABSENT if value is None else f"{value / unit:,.{digits}f}"

    columns = (
        ("median ms", "ms_median", 2, 1.0),
        ("least ms", "ms_min", 2, 1.0),
        ("most ms", "ms_max", 2, 1.0),
        ("× float32", "ratio_to_float32", 2, 1.0),
        ("file MB", "file_bytes", 2, 1e6),
        ("load ms", "load_ms", 0, 1.0),
        ("peak MB", "peak_rss_bytes", 0, 1e6),
    )
    rows = [
        (str(one.get("target")), *(text(one, key, digits, unit) for _, key, digits, unit in columns))
        for one in found
    ]
    bars = [
        Bar(str(one.get("target")), number(one["ms_median"]), f"{text(one, 'ms_median', 2)} ms")
        for one in found
    ]
    threads = settings.get("threads")
    conditions = (
        f"{threads} {'thread' if threads == 1 else 'threads'}, batch {settings.get('batch')}, "
        f"{settings.get('repeats')} runs of each, on {machine.get('processor') or 'an unknown processor'}"
    )
    chart = bar_chart("Median time of one run", bars, x_label="ms")
    return (
        Table(("model", *(column[0] for column in columns)), rows, "Time, size and memory"),
        Figure("Median time", chart, "Of one run; shorter is better."),
        conditions,
    )
