"""What `qat report` does: write a page on a run, from the run directory and the test images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qat.checkpoints.format import Checkpoint, file_hash, load_checkpoint
from qat.checkpoints.loading import build, without_quantizers
from qat.commands.sources import load_test_split, only_data
from qat.data.augment import normalize
from qat.data.split import Split
from qat.errors import CheckpointError, QatError, RecipeError
from qat.evaluation import predictor
from qat.models.bnext import BNext
from qat.quantize.naming import quantization_name
from qat.recipe.loading import LoadedRecipe, load_recipe, resolve_checkpoint
from qat.recipe.schema import Data
from qat.report.answers import compare
from qat.report.content import Measured, report_page
from qat.report.files import RunFiles, read_run
from qat.report.layer_statistics import measure
from qat.runs import find_run, newest_run
from qat.system.files import require_writable, write_atomically
from qat.train.device import choose_device

REPORT: Final = "report.html"
#: Number of images for the statistics of layers. More images change them little.
_MEASURED: Final = 128


def write_report(
    run: Path | None, output: Path | None = None, overrides: Sequence[str] = (), runs: Path = Path("runs")
) -> Path:
    """Write the report on a run, finished or stopped early; an older report is replaced.

    Args:
        run: run directory; ``None`` takes the newest fine-tuning run under ``runs``.
        output: file to write; ``None`` means ``report.html`` in the run directory.
        overrides: texts such as ``data.root=DIR``, for test images that have moved.
        runs: folder of run directories.

    Returns:
        The file written.

    Raises:
        QatError: there is no such run, its best checkpoint or its test images can't be read, an override is
            refused, or the file can't be written.
    """
    directory = find_run(run) if run is not None else newest_run(runs)
    path = directory.path / REPORT if output is None else output
    require_writable(path)
    fixed = "fixed by the checkpoint, which was trained with it"
    only_data(overrides, {"mean": fixed, "std": fixed, "image_size": fixed})
    loaded = load_recipe(directory.path / "recipe.yaml", overrides)
    checkpoint = load_checkpoint(directory.best)
    files = read_run(directory)
    measured = _measure(checkpoint, loaded, files)
    write_atomically(path, report_page(files, loaded.recipe, checkpoint, measured))
    return path


def _measure(checkpoint: Checkpoint, loaded: LoadedRecipe, files: RunFiles) -> Measured:
    """Evaluate the run's network, and the one it started from, on the test images; measure its layers."""
    data, notes = loaded.recipe.data, []
    split = load_test_split(data, checkpoint.architecture.num_classes)
    if files.test_fingerprint is not None and files.test_fingerprint != split.fingerprint():
        notes.append(
            "These are not the test images that the run was evaluated on: their fingerprint is another. "
            "Accuracies here are of the present ones."
        )
    try:
        device = choose_device(loaded.recipe.device)
    except RecipeError:  # the report is written on a machine without the run's accelerator
        device = torch.device("cpu")
    network = build(checkpoint).to(device)
    start: BNext | None = None
    if checkpoint.quantization is not None:
        try:
            start = _start(loaded, files).to(device)
        except QatError as error:
            notes.append(f"Without the float-rest network there is nothing to compare with. {error}.")
    answers = compare(predictor(network), None if start is None else predictor(start), split, data, device)
    if checkpoint.quantization is None:
        return Measured(answers, [], 0, None, notes, device)
    name = quantization_name(network, checkpoint.quantization)
    size = min(data.eval_batch_size, _MEASURED)
    count = _MEASURED // size
    layers = measure(network, _sample(split, data, size, count), start)
    return Measured(answers, layers, min(count * size, answers.n), name, notes, device)


def _start(loaded: LoadedRecipe, files: RunFiles) -> BNext:
    """The float-rest network that fine-tuning started from, or that it trained before quantization.

    Raises:
        QatError: its file is gone, another one has taken its place, or its classifier was never trained.
    """
    model = loaded.recipe.model
    if loaded.recipe.schedule.float_epochs:
        return build(load_checkpoint(files.run.float_stage.best, latent=model.latent))
    if model.classifier == "new":
        raise CheckpointError("With schedule.float_epochs 0 the new classifier was trained quantized only")
    path = resolve_checkpoint(loaded)
    if files.pretrained_sha256 is not None and files.pretrained_sha256 != file_hash(path):
        raise CheckpointError(f"{path} has changed since the run")
    found = load_checkpoint(
        path, latent=model.latent, stem_stride=model.stem_stride, state_key=model.state_key
    )
    return build(without_quantizers(found))


def _sample(split: Split, data: Data, size: int, count: int) -> Iterator[Tensor]:
    """``count`` normalized batches (``size``, 3, H, W) of test images.

    They are drawn at random with a fixed seed, since a test set may be sorted by class.
    """
    for images, _ in itertools.islice(split.batches(size, shuffle_seed=0), count):
        yield normalize(images, data.mean, data.std)
