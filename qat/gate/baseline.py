"""Baselines of the accuracy gate: which images a model got right, and what it was measured with.

A baseline is a JSON file that is kept in a repository. ``correct`` holds one bit per image in the order of
the data set, 1 where top-1 is right. Each line has 64 hexadecimal digits for 256 images, the first image in
the most significant bit (``numpy.packbits``); the last line is filled up with zeros to whole bytes. So a
diff of two baselines shows which answers changed. :mod:`qat.gate.baseline_file` reads and writes the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import PIL
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from qat.data.split import Split
from qat.evaluation import ranks
from qat.recipe.schema import Data, Recipe
from qat.system.machine import machine

FORMAT: Final = "bnext-qat baseline"
FORMAT_VERSION: Final = 1
#: Images in one line of ``correct``.
LINE: Final = 256
#: If there are more class names than this, their hash is stored instead.
MOST_NAMES: Final = 1000
#: Packages that can change a prediction.
_PACKAGES: Final = ("bnext-qat", "numpy", "onnxruntime", "torch")
#: Decimals of a stored percentage.
_DIGITS: Final = 4

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Percent = Annotated[float, Field(ge=0, le=100)]
_Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelFacts(_Strict):
    """The model: name, SHA-256 and format of its file, and a line of text on the network."""

    file: str
    sha256: _Hash
    format: str
    architecture: str


class DataFacts(_Strict):
    """The images, their order and their preprocessing; made by :func:`describe_data`."""

    dataset: str
    test_split: str
    fingerprint: _Hash
    image_size: _Count
    resize: _Count | None
    mean: _Channels
    std: _Channels
    exif_orientation: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what older baselines don't have where it is as it was for them."""
        content: dict[str, Any] = write(self)
        if not self.exif_orientation:
            del content["exif_orientation"]
        return content


class Processor(_Strict):
    """The processor that computed the predictions, as :func:`qat.system.machine.machine` describes it."""

    name: str | None
    architecture: str | None
    instruction_sets: list[str] | None


class Baseline(_Strict):
    """The predictions of one model on one data set, as right or wrong.

    Attributes:
        format: ``bnext-qat baseline`` and the version of this layout.
        recorded: date and time in UTC.
        images: number N of images.
        num_classes: number of logits per image.
        top1, top5: percent, rounded to 4 decimals; :attr:`correct_count` is exact.
        model, data: what was measured, and on which images.
        versions, processor: packages and processor that computed the predictions.
        class_names: in the order of the labels; the SHA-256 of the list if there are more than 1000.
        recipe: recipe of the run that made the model, with file names in place of paths.
        correct: a bit per image in the layout that the module describes; :meth:`answers` unpacks it.
    """

    format: str
    recorded: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    images: _Count
    num_classes: _Count
    top1: _Percent
    top5: _Percent
    model: ModelFacts
    data: DataFacts
    versions: dict[str, str | None]
    processor: Processor
    recipe: dict[str, Any] | None
    class_names: list[str] | _Hash
    correct: list[str]

    def answers(self) -> NDArray[np.bool_]:
        """Whether top-1 is right, image by image: bool (N,)."""
        return unpack(self.correct, self.images)

    @property
    def correct_count(self) -> int:
        """Images whose top-1 is right."""
        return int(self.answers().sum())


# What is observed of a model.


def describe_data(split: Split, data: Data) -> DataFacts:
    """The record of a data set. Reads every image of an image folder, for the fingerprint.

    ``resize`` is the shorter side in pixels before the crop; None for digits, which are not cropped.

    Raises:
        DataError: a file cannot be read.
    """
    return DataFacts(
        dataset=data.dataset,
        test_split=file_name(split.name or data.evaluated_split),
        fingerprint=split.content_fingerprint(),
        image_size=data.image_size,
        resize=split.resize,
        mean=list(data.mean),
        std=list(data.std),
        exif_orientation=data.exif_orientation,
    )


def observe(
    logits: Tensor, split: Split, data: DataFacts, model: ModelFacts, recipe: Recipe | None
) -> Baseline:
    """Make a baseline from a model's logits on a test split.

    Args:
        logits: (N, classes), for the N images of ``split`` in order.
        split: the images and their labels.
        data, model, recipe: recorded as they are, the recipe without paths.
    """
    before = ranks(logits, split.labels)
    found = machine()
    versions = found["versions"]
    names = [_text(name) for name in split.class_names]
    return Baseline(
        format=f"{FORMAT} {FORMAT_VERSION}",
        recorded=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        images=len(split),
        num_classes=logits.shape[1],
        top1=percentage(int((before < 1).sum()), len(split)),
        top5=percentage(int((before < 5).sum()), len(split)),
        model=model,
        data=data,
        versions={name: versions[name] for name in _PACKAGES}
        | {"pillow": PIL.__version__, "python": ".".join(found["python"].split(".")[:2])},
        processor=Processor(
            name=found["processor"],
            architecture=found["architecture"],
            instruction_sets=found["instruction_sets"],
        ),
        recipe=None if recipe is None else _without_paths(recipe),
        class_names=names if len(names) <= MOST_NAMES else _hash(names),
        correct=pack((before < 1).numpy()),
    )


def _without_paths(recipe: Recipe) -> dict[str, Any]:
    """The recipe with file names in place of paths, since the baseline is committed to a repository."""
    content = recipe.model_dump(mode="json")
    del content["data"]["root"], content["output"]["dir"]
    for section, key in (
        ("model", "checkpoint"),
        ("data", "train_split"),
        ("data", "test_split"),
        ("data", "final_split"),
    ):
        if content[section][key] is not None:
            content[section][key] = file_name(content[section][key])
    return content


def file_name(path: str | Path) -> str:
    """The last part of an absolute or relative path."""
    return _text(Path(path).name or str(path))


def _text(name: str) -> str:
    r"""``name``, with the bytes of a file name that are not UTF-8 as escapes such as ``\udc80``."""
    return name.encode(errors="backslashreplace").decode()


def _hash(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def percentage(count: int, n: int) -> float:
    """``count`` of ``n`` in percent, rounded as baselines store it."""
    return round(100 * count / n, _DIGITS)


# Bits.


def pack(correct: NDArray[np.bool_]) -> list[str]:
    """Bits (N,) as lines of hexadecimal digits."""
    return [
        np.packbits(correct[start : start + LINE]).tobytes().hex() for start in range(0, len(correct), LINE)
    ]


def unpack(lines: Sequence[str], n: int) -> NDArray[np.bool_]:
    """The ``n`` bits (N,) that :func:`pack` packed.

    Raises:
        ValueError: another number of lines or digits, other characters, or bits set beyond the last image.
    """
    if len(lines) != -(-n // LINE):
        raise ValueError(f"found {len(lines)} lines, {n} images need {-(-n // LINE)}")
    for index, line in enumerate(lines):
        digits = 2 * -(-min(LINE, n - LINE * index) // 8)
        if len(line) != digits:
            raise ValueError(f"line {index + 1}: found {len(line)} digits, needs {digits}")
        if odd := sorted(set(line) - set("0123456789abcdef")):
            raise ValueError(f"line {index + 1}: {odd[0]!r} is no hexadecimal digit in lower case")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(lines)), np.uint8))
    if bits[n:].any():
        raise ValueError(f"line {len(lines)}: bits are set beyond image {n}")
    return bits[:n].astype(np.bool_)
