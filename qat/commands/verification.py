"""What `qat verify` does: compare an exported model with the network it came from, and with the reference."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qat_export.integer.file import load_network
from qat_export.verify.agreement import Comparison, compare
from qat_export.verify.exactness import check_exactness, sample
from qat_export.verify.figures import Exactness
from qat_export.verify.model import OnnxModel, require_integers

from qat.commands.lowering import Source, build_and_lower, load
from qat.commands.sources import load_test_split, only_data, recipe_of_onnx, verification_images
from qat.errors import CheckpointError, QatError
from qat.evaluation import predictor
from qat.runs import find_run


@dataclass(frozen=True)
class Verified:
    """An exported model, compared with what it was exported from.

    Attributes:
        path: the model.
        exactness: its comparison with the integer reference.
        comparison: its comparison with the torch network on the whole test set; ``None`` where only the
            integer network was given.
    """

    path: Path
    exactness: Exactness
    comparison: Comparison | None

    def problems(self) -> list[str]:
        """Each bound that is broken, in words."""
        return self.exactness.problems() + (self.comparison.problems() if self.comparison else [])

    def require(self) -> None:
        """Raise ``VerificationError`` if a bound is broken.

        The exactness comes first, since its message names the tensor that is wrong.
        """
        self.exactness.require()
        if self.comparison:
            self.comparison.require()

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(
            {
                "model": str(self.path),
                "verified": not self.problems(),
                "problems": self.problems(),
                "comparison": asdict(self.comparison) if self.comparison else None,
                "exactness": self.exactness.to_dict(),
            },
            indent=2,
        )


def verify_model(path: Path, source: Source, network_path: Path | None) -> Verified:
    """Compare the exported model ``path`` with its checkpoint, or with an integer network file alone.

    Args:
        path: the .onnx file.
        source: where the checkpoint and the data are; if it names neither a run nor a checkpoint, the run
            directory that the model lies in.
        network_path: file of an integer network, used instead of a checkpoint.

    Raises:
        QatError: a file can't be read or was not written by this project, or the model was made from another
            network.
    """
    only_data(source.overrides, dict.fromkeys(("image_size", "mean", "std"), "fixed by the model"))
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected an exported model")
    model = OnnxModel(path)
    require_integers(model.metadata, path)
    if network_path is not None:
        network = load_network(network_path)
        data = recipe_of_onnx(model, source.overrides, "give --run or --checkpoint").data
        model.check_data(data)
        split = load_test_split(data, model.num_classes)
        return Verified(path, check_exactness(path, network, sample(split, model.image_size)), None)
    if source.run is None and source.checkpoint is None:
        source = replace(source, run=_run_around(path))
    checkpoint, data = load(source, model.image_size)
    torch_network, network = build_and_lower(checkpoint, data)
    split = verification_images(data, network.class_names, source.overrides)
    # First, since it refuses a model of another network before the comparison on the whole test set.
    exact = check_exactness(path, network, sample(split, model.image_size))
    return Verified(path, exact, compare(predictor(torch_network), model, network, split, data))


def _run_around(path: Path) -> Path:
    try:
        return find_run(path.parent).path
    except QatError as error:
        raise QatError(
            f"{path}: does not lie in a run directory: say what it was exported from with --run, "
            "--checkpoint or --integer-network"
        ) from error
