"""`qat bench`: time, size and memory of ONNX models."""

from __future__ import annotations

from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, NonEmptyText
from qat.cli.terminal import print_table, spinner


@main.command()
@click.argument("models", nargs=-1, type=NonEmptyPath())
@click.option("--size", default="tiny", show_default=True, help="Published size of the random network.")
@click.option("--classes", type=int, default=1000, show_default=True, help="Classes of the random network.")
@click.option(
    "--resolution", type=int, help="Side of the images in pixels [default: 224, or what the models take]."
)
@click.option(
    "--targets",
    type=NonEmptyText("write float32,portable"),
    help="Forms to export the random network in, separated by commas "
    "[default: float32,ort_static,portable,native].",
)
@click.option("--threads", type=int, default=1, show_default=True, help="Threads per operator.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images per run.")
@click.option("--repeats", type=int, help="Timed runs of each model [default: as many as fit into 20 s].")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random network and the images."
)
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
    """Measure the time, size and memory of ONNX models.

    The models run by turns in one process. Without MODELS, a network with random weights is exported in each
    of the forms that --targets names, and these are measured. The columns with × say how many times as fast
    as two baselines a model is: as the float32 export (`qat export --onnx --float32` makes one), and as the
    float32 export quantized by onnxruntime's quantize_static.
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
