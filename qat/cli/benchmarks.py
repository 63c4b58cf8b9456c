"""`qat bench`: how fast, how large, how much memory."""

from __future__ import annotations

from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, NonEmptyText
from qat.cli.terminal import print_table, spinner


@main.command()
@click.argument("models", nargs=-1, type=NonEmptyPath())
@click.option("--size", default="tiny", show_default=True, help="Published network to fill at random.")
@click.option("--classes", type=int, default=1000, show_default=True, help="Classes of that network.")
@click.option("--resolution", type=int, help="Side of the images [default: 224, or what the models take].")
@click.option(
    "--targets",
    type=NonEmptyText("write float32,portable"),
    help="Forms of that network, by commas [default: float32,ort_static,portable,native].",
)
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of one operator.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images per run.")
@click.option("--repeats", type=int, help="Timed runs of each model [default: as many as 20 s hold].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the network and the images.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def bench(
    ctx: click.Context,
    models: tuple[Path, ...],
    size: str,
    classes: int,
    resolution: int | None,
    targets: str | None,
    threads: int,
    batch: int,
    repeats: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure ONNX models: time, size and memory.

    They run in one process, in turns. Without MODELS, a network is filled at random and exported in each of
    the targets. Columns with × say how many times as fast a model is as the float32 export (`qat export
    --onnx --float32` makes one) and as that through onnxruntime's quantize_static.
    """
    given = [
        name
        for name in ("size", "classes", "targets")
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if models and given:
        raise click.UsageError(f"--{given[0]} is of a random network: give it or MODELS, not both")
    from qat_export.bench.comparison import bench_files, bench_random, default_targets
    from qat_export.bench.measurement import Conditions

    from qat.models.bnext import Architecture

    with spinner("measuring") as say:
        if models:
            report = bench_files(models, Conditions(threads, batch, repeats, seed, resolution), say)
        else:
            names = [name.strip() for name in targets.split(",")] if targets else default_targets()
            side = 224 if resolution is None else resolution
            conditions = Conditions(threads, batch, repeats, seed, side)
            report = bench_random(Architecture.of(size, classes), side, names, conditions, say)
    if as_json:
        click.echo(report.to_json())
        return
    titles, *rows = report.rows()
    print_table(report.title, titles, rows)
