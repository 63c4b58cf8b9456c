"""`qat export`, `qat verify` and `qat evaluate`: the commands for a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, recipe_options, set_option
from qat.cli.terminal import print_table, spinner, warn

if TYPE_CHECKING:
    from qat_export.verify.agreement import Comparison
    from qat_export.verify.figures import Exactness

#: Value of --onnx where no path is given. It can't be a path: those must end in .onnx.
_BESIDE: Final = "beside the checkpoint"


@main.command()
@click.option(
    "--onnx",
    "onnx_path",
    type=NonEmptyPath(),
    is_flag=False,
    flag_value=_BESIDE,
    default=None,
    metavar="[PATH]",
    help="Write an ONNX model, to PATH or beside the checkpoint, as model.onnx, native.onnx or float32.onnx.",
)
@click.option("--run", "run_path", type=NonEmptyPath(), help="Run directory [default: the newest].")
@click.option("--checkpoint", type=NonEmptyPath(), help="A fine-tuned checkpoint instead of a run.")
@click.option("--runs", type=NonEmptyPath(), default="runs", show_default=True, help="Where runs are.")
@click.option(
    "--image-size", type=click.IntRange(8, 4096), help="Side of the model's input [default: as trained]."
)
@click.option(
    "--input",
    "input_type",
    type=click.Choice(["float32", "uint8"]),
    default="float32",
    show_default=True,
    help="Normalized images, or raw pixels with the normalization folded in.",
)
@click.option(
    "--layout",
    type=click.Choice(["NCHW", "NHWC"], case_sensitive=False),
    metavar="[NCHW|NHWC]",
    default="NCHW",
    show_default=True,
    help="Order of raw pixels: N×3×H×W or N×H×W×3.",
)
@click.option(
    "--target",
    type=click.Choice(["portable", "native"]),
    default="portable",
    show_default=True,
    help="Standard operators, or this project's own for onnxruntime, which are at least three times as fast "
    "and need their library registered (docs/native.md).",
)
@click.option(
    "--strict-onnx",
    "strict",
    is_flag=True,
    help="For runtimes other than onnxruntime: the same integers, without quantized operators, which some "
    "runtimes compute differently.",
)
@click.option(
    "--float32", "as_float", is_flag=True, help="Export the float32 network: the baseline for `qat bench`."
)
@click.option(
    "--integer-network",
    "network_path",
    type=NonEmptyPath(),
    help="Also write the lowered network, as a .safetensors file for `qat verify` and other tools.",
)
@click.option("--layers", is_flag=True, help="Print every layer: shape, bits, bytes, multipliers.")
@set_option(
    "Override where the verification finds its data, such as --set data.root=DIR. Repeatable.",
    metavar="data.KEY=VALUE",
)
def export(
    onnx_path: Path | None,
    run_path: Path | None,
    checkpoint: Path | None,
    runs: Path,
    image_size: int | None,
    input_type: str,
    layout: str,
    target: str,
    strict: bool,
    as_float: bool,
    network_path: Path | None,
    layers: bool,
    overrides: tuple[str, ...],
) -> None:
    """Export a fine-tuned network to ONNX.

    The graph has binary convolutions, and integers of at most 8 bits elsewhere. It runs in stock onnxruntime;
    with --target native it needs the library of this project's operators.

    The model is verified on the test set against the network it came from, and tensor by tensor against the
    integer reference. It is written only if it agrees with both.
    """
    if onnx_path is None:
        raise click.UsageError("say what to export: --onnx, or --onnx PATH")
    path = None if str(onnx_path) == _BESIDE else onnx_path
    if path is not None and path.suffix.lower() != ".onnx":
        # A file of another kind, such as a checkpoint, must not be overwritten by mistake.
        raise click.UsageError(f"--onnx: {str(path)!r} does not end in .onnx")
    if network_path is not None and network_path.suffix.lower() != ".safetensors":
        raise click.UsageError(f"--integer-network: {str(network_path)!r} does not end in .safetensors")
    if run_path is not None and checkpoint is not None:
        raise click.UsageError("--run and --checkpoint exclude each other")
    if input_type == "float32" and layout == "NHWC":
        raise click.UsageError("--layout NHWC needs --input uint8: normalized images are N×3×H×W")
    integers_only = {
        "--input uint8": input_type == "uint8",
        "--target native": target == "native",
        "--strict-onnx": strict,
        "--integer-network": network_path is not None,
        "--layers": layers,
    }
    for option, given in integers_only.items():
        if as_float and given:
            raise click.UsageError(f"--float32 and {option} exclude each other")
    if strict and target == "native":
        raise click.UsageError("--strict-onnx and --target native exclude each other")
    from qat_export.graphs.metadata import kind_of_input
    from qat_export.integer.listing import describe

    from qat.commands.exporting import Form, Target, export_float32, export_onnx
    from qat.commands.lowering import Source

    source = Source(run_path, checkpoint, overrides, runs)
    if as_float:
        with spinner("exporting and comparing"):
            written, comparison = export_float32(source, Target(path, image_size), warn)
        _print_comparison(comparison)
        if comparison.problems():
            warn(f"{written}: not written")
        comparison.require()
    else:
        kind = kind_of_input(input_type, layout)
        with spinner("lowering, exporting and verifying"):
            form = Form.NATIVE if target == "native" else Form.STRICT if strict else Form.PORTABLE
            exported = export_onnx(source, Target(path, image_size, kind, form, network_path))
        click.echo(f"{describe(exported.network) if layers else exported.network}\n")
        _print_comparison(exported.comparison)
        _print_exactness(exported.exactness)
        written = exported.path
        if exported.problems():
            warn(f"{written}: not written")
        exported.require()
        if network_path is not None:
            click.echo(f"{network_path}: {network_path.stat().st_size / 1e6:.2f} MB, integer network")
    click.echo(f"{written}: {written.stat().st_size / 1e6:.2f} MB, verified")


@main.command()
@click.argument("model", type=NonEmptyPath())
@click.option("--run", "run_path", type=NonEmptyPath(), help="Run directory [default: where MODEL lies].")
@click.option("--checkpoint", type=NonEmptyPath(), help="A fine-tuned checkpoint instead of a run.")
@click.option(
    "--integer-network",
    "network_path",
    type=NonEmptyPath(),
    help="A file that `qat export --integer-network` wrote, instead of a run.",
)
@set_option(
    "Override where the data is found, such as --set data.root=DIR. Repeatable.", metavar="data.KEY=VALUE"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    model: Path,
    run_path: Path | None,
    checkpoint: Path | None,
    network_path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Verify an exported .onnx file against the network it came from.

    Every integer tensor is compared with the integer reference, without and with onnxruntime's
    optimizations. Top-1 and logits are compared with those of the fake-quantized network on the whole test
    set. Exit code 1 if a difference is larger than allowed.
    """
    given = [option for option in (run_path, checkpoint, network_path) if option is not None]
    if len(given) > 1:
        raise click.UsageError("--run, --checkpoint and --integer-network exclude each other")
    from qat.commands.lowering import Source
    from qat.commands.verification import verify_model

    with spinner("verifying"):
        verified = verify_model(model, Source(run_path, checkpoint, overrides), network_path)
    if as_json:
        click.echo(verified.to_json())
    else:
        if verified.comparison is not None:
            _print_comparison(verified.comparison)
        _print_exactness(verified.exactness)
    verified.require()
    if not as_json:
        click.echo(f"{model}: verified")


def _print_comparison(comparison: Comparison) -> None:
    print_table(comparison.title, ("", "value", "bound"), comparison.rows())


def _print_exactness(exactness: Exactness) -> None:
    from qat_export.verify.figures import HEADINGS

    print_table(exactness.title, HEADINGS, exactness.rows())
    for line in exactness.worst():
        click.echo(line)


@main.command()
@click.argument("model", type=NonEmptyPath())
@recipe_options(None, metavar="data.KEY=VALUE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: Path, recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure the accuracy of a run, a checkpoint or an .onnx file.

    The images are the split that epochs are chosen on, as the model's own recipe says, or the one that
    --recipe names; --set data.KEY=VALUE changes it, such as --set data.test_split=test.
    """
    from qat.commands.evaluation import evaluate_model
    from qat.system.collectives import joined

    with joined() as world:
        accuracy = evaluate_model(model, recipe, overrides, warn if world.rank == 0 else lambda _: None)
    if world.rank:
        return
    if as_json:
        click.echo(accuracy.to_json())
    else:
        click.echo(f"top-1 {accuracy.top1:.2f}%  top-5 {accuracy.top5:.2f}%  of {accuracy.n} images")
