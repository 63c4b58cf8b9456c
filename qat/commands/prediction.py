"""What `qat predict` does: the classes that a model sees in single images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qat.commands.opening import Opened, open_model
from qat.data.decode import decode
from qat.errors import DataError
from qat.evaluation import input_for
from qat.recipe.schema import Data

#: Images that a model is given at once.
_BATCH = 32


@dataclass(frozen=True)
class Guess:
    """A class and its probability by the softmax of the logits, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """An image and its classes, the most probable first."""

    image: str
    classes: tuple[Guess, ...]

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps({"image": self.image, "classes": [asdict(guess) for guess in self.classes]})


def predict(
    path: Path, images: Sequence[Path], count: int, overrides: Sequence[str], warn: Callable[[str], None]
) -> Iterator[Prediction]:
    """The ``count`` most probable classes of each image.

    Images are preprocessed as those of an evaluation: shorter side to ``resize``, centre crop, normalization.

    Args:
        path: a run, a checkpoint or an exported model.
        images: files, or folders, whose files that look like images are taken, in order of their names.
        count: classes per image, fewer where the model has fewer.
        overrides: ``data.key=value`` texts.
        warn: told what makes the answers others than the model's usual ones.

    Raises:
        QatError: the model can't be read, or an image can't be decoded.
    """
    files = list(_files(images))
    model = open_model(path, None, overrides, warn)
    for start in range(0, len(files), _BATCH):
        some = files[start : start + _BATCH]
        for file, probabilities in zip(some, _probabilities(model, some), strict=True):
            order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))[:count]
            guesses = tuple(Guess(model.name_of(label), probabilities[label]) for label in order)
            yield Prediction(str(file), guesses)


def _probabilities(model: Opened, files: Sequence[Path]) -> list[list[float]]:
    data = model.data
    resize, side, turn = _shorter_side(data), data.image_size, data.exif_orientation
    pixels = torch.stack([decode(file, resize, side, turn=turn) for file in files])
    logits = model.predict(input_for(model.predict, pixels, data)).double()
    found: list[list[float]] = logits.softmax(1).tolist()
    return found


def _shorter_side(data: Data) -> int:
    # Digits have the size of the network already; a picture of one is brought to it whole.
    return data.image_size if data.dataset == "digits" else data.shorter_side


def _files(images: Sequence[Path]) -> Iterator[Path]:
    from PIL import Image

    known = Image.registered_extensions()
    for image in images:
        if not image.is_dir():
            if not image.exists():
                raise DataError(f"{image}: no such file")
            yield image
            continue
        try:
            inside = sorted(name for name in os.listdir(image) if Path(name).suffix.lower() in known)  # noqa: PTH208
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror}") from error
        if not inside:
            raise DataError(f"{image}: a folder without images")
        yield from (image / name for name in inside)
