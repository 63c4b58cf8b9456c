"""`qat inspect`: whether a network is binary, what its file stores, and what the network computes with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath
from qat.cli.terminal import print_table, spinner

if TYPE_CHECKING:
    from qat.inspection.facts import InspectedLayer, Inspection, Range, Total
    from qat.inspection.verdict import Verdict

#: Width in characters of the sentences below the verdict.
_WIDTH: Final = 79
_TOTALS: Final = {
    "binary": "weights of binary convolutions",
    "rest": "weights of stem, SE and classifier",
    "other": "norms, biases, other tensors",
}


@main.command("inspect")
@click.argument("file", type=NonEmptyPath())
@click.option("--layers", "every_layer", is_flag=True, help="List every layer, with all that is known of it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--require-binary", is_flag=True, help="Exit code 1 unless all weights in use are exactly ±1.")
def inspect_command(file: Path, every_layer: bool, as_json: bool, require_binary: bool) -> None:
    """Say what is binary in FILE, layer by layer.

    FILE is a checkpoint (of this project or of BNext's authors), an exported .onnx file, an integer network
    or a run directory.
    """
    from qat.commands.inspection import inspect_file
    from qat.errors import NotBinaryError
    from qat.inspection.verdict import verdict

    with spinner("inspecting"):
        found = inspect_file(file)
        judged = verdict(found)
    if as_json:
        _print_json(found, judged)
    else:
        _print(found, judged, every_layer)
    if require_binary and not judged.binary:
        done = sum(layer.binary for layer in found.binary_layers)
        raise NotBinaryError(
            f"{found.path}: not binary: {done} of {len(found.binary_layers)} layers use weights of exactly ±1"
        )


def _print_json(found: Inspection, judged: Verdict) -> None:
    answer = {"answer": judged.answer, "verdict": judged.line, "explanation": list(judged.explanation)}
    click.echo(json.dumps(found.to_dict() | answer, indent=2))


def _print(found: Inspection, judged: Verdict, every_layer: bool) -> None:
    click.echo("\n".join(map(_printable, _header(found))))
    if every_layer:
        print_every_layer(found)
    else:
        print_compact(found)
    rows = [_total_row(_TOTALS[name], total) for name, total in found.totals().items()]
    around = "graph, names, metadata" if found.exported else "names, metadata, optimizer"
    rows.append((around, "", f"{found.container_size:,}", ""))
    print_table("On disk", ("", "values", "bytes", "as float32"), rows)
    click.echo(judged.line)
    for sentence in judged.explanation:
        click.echo()
        click.echo(click.wrap_text(sentence, _WIDTH, "  ", "  "))


def _header(found: Inspection) -> Iterator[str]:
    """Lines on the file's format, and on the network, its run and its images as the file's metadata say."""
    facts = found.facts
    yield f"{found.path}: {found.format}, {found.file_size / 1e6:.2f} MB"
    yield found.architecture
    run = [f"{facts[key]}" for key in ("task", "dataset") if key in facts]
    if "epoch" in facts:
        run.append(f"epoch {facts['epoch']}")
    accuracy = facts.get("accuracy")
    if isinstance(accuracy, dict) and isinstance(accuracy.get("top1"), int | float):
        run.append(f"top-1 {accuracy['top1']:.2f}% of {accuracy.get('n', 'unknown')} images")
    if "best_top1_acc" in facts:
        run.append(f"best top-1 {facts['best_top1_acc']}")
    if run:
        yield f"run: {', '.join(run)}"
    images = []
    if "image_size" in facts:
        images.append(f"{facts['image_size']}×{facts['image_size']} pixels")
    if "input" in facts:
        images.append(str(facts["input"]))
    images += [f"{key} {_numbers(facts[key])}" for key in ("mean", "std") if key in facts]
    if images:
        yield f"images: {', '.join(images)}"
    if isinstance(names := facts.get("class_names"), list) and names:
        shown = ", ".join(map(str, names[:4]))
        yield f"class names: {len(names)} ({shown}{', …' if len(names) > 4 else ''})"
    if isinstance(versions := facts.get("versions"), dict):
        yield f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    if dropped := facts.get("dropped"):
        yield f"left out: {dropped} tensors of the authors' quantizers, which are not used"
    for note in facts.get("notes", ()):
        yield f"note: {note}"
    temperatures = {x.temperature for x in found.binary_layers if x.temperature is not None}
    if len(temperatures) == 1:
        yield f"temperature: {temperatures.pop():.3g} in all {len(found.binary_layers)} binary convolutions"


def print_compact(found: Inspection) -> None:
    """Print a table with a line per layer, all channel attentions in one line."""
    varied = len({layer.temperature for layer in found.binary_layers}) > 1
    # Temperatures or shares of ±1: a table with both is wider than 80 characters.
    headings = ("layer", "weights", "bits", "min…max", "T" if varied else "±1 stored", "in use")

    def row(name: str, weights: str, layers: Sequence[InspectedLayer]) -> tuple[str, ...]:
        (first, *_) = layers
        bits = ", ".join(map(str, sorted({layer.bits for layer in layers})))
        fifth = _temperature(first) if varied else _share(first.exact_stored)
        return name, weights, bits, _shown(_hull(layer.values for layer in layers)), fifth, _in_use(layers)

    rows = [row(x.name, _shapes(x), [x]) for x in found.layers if x.kind != "attention"]
    if attentions := [layer for layer in found.layers if layer.kind == "attention"]:
        weights = f"{sum(layer.weights for layer in attentions):,}"
        pairs = "pair" if len(attentions) == 1 else "pairs"
        rows.insert(-1, row(f"SE, {len(attentions)} {pairs}", weights, attentions))
    print_table("Layers", headings, rows)


def print_every_layer(found: Inspection) -> None:
    """Print every layer, in two tables, since one with all columns is wider than a terminal."""
    rows = [
        (x.name, x.kind, _shapes(x), "1 bit" if x.bits == 1 else x.stored, f"{x.size:,}")
        for x in found.layers
    ]
    print_table("Layers", ("layer", "kind", "shape", "stored", "bytes"), rows)
    factor = "multiplier" if any(layer.multiplier for layer in found.layers) else "scale"
    columns: dict[str, list[str]] = {
        "layer": [x.name for x in found.layers],
        "T": [_temperature(x) for x in found.layers],
        "min…max": [_shown(x.values) for x in found.layers],
        "±1 stored": [_share(x.exact_stored) for x in found.layers],
        "in use": [_in_use([x]) for x in found.layers],
        factor: [_small(x.multiplier or x.scale) for x in found.layers],
        "result": [x.result for x in found.layers],
    }
    if len({layer.temperature for layer in found.binary_layers}) == 1:
        del columns["T"]  # the header has the one temperature of all layers
    if not any(columns[factor]):
        del columns[factor]
    print_table("Their weights", tuple(columns), list(zip(*columns.values(), strict=True)))


def _total_row(name: str, total: Total) -> tuple[str, ...]:
    return name, f"{total.count:,}", f"{total.size:,}", f"{total.float32_size:,}"


def _shapes(layer: InspectedLayer) -> str:
    """Shape of the weights, such as 64×64×3×3; of an attention, the lengths of its vectors: 64→8→64."""
    if len(layer.shapes) == 2:
        hidden, channels = layer.shapes[0][:2]
        return f"{channels}→{hidden}→{channels}"
    return "×".join(map(str, layer.shapes[0]))


def _hull(ranges: Iterable[Range]) -> Range:
    ranges = list(ranges)
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _shown(ends: Range) -> str:
    """A range as text: integers below 1000 in full, other numbers to two significant digits."""
    return "…".join(f"{end:.0f}" if end.is_integer() and abs(end) < 1000 else f"{end:.2g}" for end in ends)


def _small(ends: Range | None) -> str:
    """A range of scales or multipliers as text: two significant digits and an exponent."""
    return "" if ends is None else "…".join(f"{end:.1e}".replace("e-0", "e-") for end in ends)


def _temperature(layer: InspectedLayer) -> str:
    return "" if layer.temperature is None else f"{layer.temperature:.3g}"


def _share(share: float | None) -> str:
    from qat.inspection.verdict import percent

    return "" if share is None else percent(share)


def _in_use(layers: Sequence[InspectedLayer]) -> str:
    """Type of the weights in use; of a binary convolution that isn't binary yet, the share that is ±1."""
    (first, *_) = layers
    if first.is_binary_convolution and not first.binary:
        return f"{_share(first.exact_in_use)} ±1"
    return ", ".join(sorted({layer.in_use for layer in layers}))


def _numbers(values: Any) -> str:
    if not isinstance(values, list):
        return str(values)
    return f"({', '.join(f'{value:g}' for value in values)})"


def _printable(line: str) -> str:
    """``line`` with control characters escaped: its text comes from a file and must not steer a terminal."""
    return line if line.isprintable() else ascii(line)
