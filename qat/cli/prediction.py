"""`qat predict`."""

from __future__ import annotations

from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, set_option
from qat.cli.terminal import print_table, warn


@main.command()
@click.argument("model", type=NonEmptyPath())
@click.argument("images", type=NonEmptyPath(), nargs=-1, required=True, metavar="IMAGE…")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes per image.")
@set_option("Override how images are preprocessed, such as --set data.resize=256.", metavar="data.KEY=VALUE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image, each on a line.")
def predict(
    model: Path, images: tuple[Path, ...], top: int, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Classes that MODEL sees in images: files, or folders of them.

    MODEL is a run, a checkpoint or an exported .onnx file.
    """
    from qat.commands.prediction import predict as classes_of

    found = classes_of(model, images, top, overrides, warn)
    if as_json:
        for prediction in found:
            click.echo(prediction.to_json())
        return
    rows = [
        (prediction.image if rank == 0 else "", guess.name, f"{100 * guess.probability:.2f} %")
        for prediction in found
        for rank, guess in enumerate(prediction.classes)
    ]
    print_table("Most probable classes", ("image", "class", "probability"), rows)
