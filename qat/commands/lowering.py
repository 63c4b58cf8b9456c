"""Find, check and lower a fine-tuned checkpoint: the part that `qat export` and `qat verify` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_export.integer.network import IntegerNetwork
from qat_export.lowering.network import lower

from qat import __version__
from qat.checkpoints.format import Checkpoint, load_checkpoint
from qat.checkpoints.loading import build, class_names
from qat.commands.sources import only_data, own_recipe
from qat.errors import QuantizationError, RecipeError
from qat.models.bnext import BNext
from qat.recipe.schema import Data
from qat.runs import find_run, newest_run


@dataclass(frozen=True)
class Source:
    """Where a command finds its checkpoint and its data.

    Attributes:
        run: run directory; ``None`` means the newest one under ``runs``.
        checkpoint: checkpoint file, instead of a run.
        overrides: texts such as ``data.root=DIR`` that change the checkpoint's recipe.
        runs: folder of run directories.
    """

    run: Path | None
    checkpoint: Path | None
    overrides: Sequence[str] = ()
    runs: Path = Path("runs")

    def find(self) -> Path:
        """Path of the checkpoint: the given one, or the best one of the run.

        Raises:
            QatError: there is no such run.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        return (find_run(self.run) if self.run is not None else newest_run(self.runs)).best


def load(source: Source, image_size: int | None) -> tuple[Checkpoint, Data]:
    """The checkpoint, and the data it is exported for and verified on.

    Args:
        source: where they are.
        image_size: side of the images in pixels; ``None`` means the size used in training.

    Raises:
        QatError: the checkpoint can't be read or carries no recipe, or an override is refused.
    """
    checkpoint = load_checkpoint(source.find())
    if checkpoint.recipe is None:
        raise RecipeError(
            f"{checkpoint.source}: carries no recipe; this needs a checkpoint that qat finetune or qat "
            "pretrain wrote"
        )
    fixed = "fixed by the checkpoint, which was trained with it"
    only_data(source.overrides, {"mean": fixed, "std": fixed, "image_size": "say it with --image-size"})
    data = own_recipe(checkpoint, source.overrides).data
    return checkpoint, data if image_size is None else data.model_copy(update={"image_size": image_size})


def build_and_lower(checkpoint: Checkpoint, data: Data) -> tuple[BNext, IntegerNetwork]:
    """The fake-quantized network of ``checkpoint``, and the integer network that it is lowered to.

    Raises:
        QuantizationError: the checkpoint holds a float-rest network, or a layer of it can't be lowered; the
            message names the layer.
    """
    if checkpoint.quantization is None:
        raise QuantizationError(
            f"{checkpoint.source}: a float-rest network has no integers: fine-tune it (qat finetune "
            "--checkpoint FILE), quantize it without training (qat quantize --checkpoint FILE), or export it "
            "as it is (qat export --onnx --float32)"
        )
    model = build(checkpoint)
    return model, lowered(model, checkpoint, data)


def lowered(model: BNext, checkpoint: Checkpoint, data: Data) -> IntegerNetwork:
    """The integers of a fake-quantized network, with the facts that ``checkpoint`` has about it.

    Raises:
        QuantizationError: something that can't be lowered, naming the layer.
    """
    try:
        return lower(
            model,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            class_names=class_names(checkpoint),
            metadata=facts(checkpoint, data.image_size),
        )
    except QuantizationError as error:
        raise QuantizationError(f"{checkpoint.source}: {error}") from error


def facts(checkpoint: Checkpoint, image_size: int, *, as_float: bool = False) -> Mapping[str, str]:
    """Metadata for an exported file, by name: what is known of the network and its training.

    ``recipe`` is the checkpoint's, with ``image_size`` in place of its own; ``resize`` is the shorter side in
    pixels to which an image is scaled before its centre is cropped, ``exif_orientation`` whether it is turned
    upright before that (digits are not cropped and have neither).
    ``accuracy`` was measured of the network as quantized, and is left out of a float32 export of such a
    network (``as_float``).
    """
    assert checkpoint.recipe is not None
    data = checkpoint.recipe.data.model_copy(update={"image_size": image_size})
    recipe = checkpoint.recipe.model_copy(update={"data": data})
    found = {"recipe": recipe.model_dump_json(), "exporter": f"bnext-qat {__version__}"}
    if data.dataset != "digits":
        found["resize"] = str(data.shorter_side)
        found["exif_orientation"] = str(data.exif_orientation).lower()
    for key in ("versions", "accuracy", "test_fingerprint"):
        of_another = key == "accuracy" and as_float and checkpoint.quantization is not None
        if key in checkpoint.metadata and not of_another:
            found[key] = checkpoint.metadata[key]
    return found
