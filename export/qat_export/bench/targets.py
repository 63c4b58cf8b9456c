"""The forms in which a network is exported for measurements; to add one, add a line to :data:`TARGETS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch

from qat.errors import QatError, VerificationError, nearest
from qat.models.bnext import Architecture, BNext
from qat.quantize.preparation import IMAGENET_MEAN, IMAGENET_STD
from qat.system.files import write_atomically
from qat_export.bench.any_model import AnyModel
from qat_export.bench.measurement import Candidate
from qat_export.bench.random_networks import quantized, random_images, random_network
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.native import emit_native
from qat_export.graphs.ort_static import quantize_static
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork
from qat_export.lowering.network import lower

#: Number of images with which ``quantize_static`` calibrates.
_CALIBRATION_IMAGES: Final = 4


@dataclass
class Subject:
    """One network in all forms that are measured; each is made when it is first needed.

    Attributes:
        model: float-rest network with binary weights, in evaluation mode.
        image_size: side of its images in pixels.
        folder: folder for one file per target.
        seed: seed of calibration and test images.
        mean, std: normalization of its images, per channel.
    """

    model: BNext
    image_size: int
    folder: Path
    seed: int = 0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    _files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def at_random(
        cls, architecture: Architecture, *, image_size: int, folder: Path, seed: int = 0
    ) -> Subject:
        """A network with random parameters, see :func:`qat_export.bench.random_networks.random_network`."""
        model = random_network(architecture, seed=seed, image_size=image_size)
        return cls(model, image_size, folder, seed)

    @cached_property
    def quantized(self) -> BNext:
        """The network quantized with 8 bits and calibrated."""
        return quantized(self.model, seed=self.seed, image_size=self.image_size, mean=self.mean, std=self.std)

    @cached_property
    def network(self) -> IntegerNetwork:
        """The integer network that the quantized one is lowered to."""
        return lower(self.quantized, image_size=self.image_size, mean=self.mean, std=self.std)

    def images(self, count: int) -> torch.Tensor:
        """Normalized random images (count, 3, S, S)."""
        return random_images(self.seed + 2, count, self.image_size, self.mean, self.std)

    def file(self, name: str) -> Path:
        """Path of the exported model of the target ``name``, written at the first call.

        Raises:
            QatError: there is no such target.
            VerificationError: an integer target does not compute what the network does.
        """
        if name not in self._files:
            target, path = find_target(name), self.folder / f"{name}.onnx"
            target.write(self, path)
            if target.exact:
                self._require_exact(path)
            self._files[name] = path
        return self._files[name]

    def _require_exact(self, path: Path) -> None:
        images = self.images(1)
        with torch.no_grad():
            expected = self.quantized(images).numpy()
        (logits,) = AnyModel(path).run(images.numpy())
        if not np.array_equal(logits, expected):
            raise VerificationError(f"{path}: its logits are not the network's on this machine")


@dataclass(frozen=True)
class Target:
    """One form of export.

    Attributes:
        write: function that writes a network's model to a path.
        exact: whether the logits must be those of the quantized network bit for bit, which is checked on one
            image. Such a model takes normalized float32 images (N, 3, S, S).
    """

    write: Callable[[Subject, Path], None]
    exact: bool = False


def export_targets(
    subject: Subject, names: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> list[Candidate]:
    """Export a network as each of ``names``.

    Raises:
        QatError: see :func:`check_targets`; in this case nothing is written.
        VerificationError: an integer target does not compute what the network does.
    """
    check_targets(names)
    candidates = []
    for name in names:
        say(f"exporting {name}")
        candidates.append(Candidate(name, subject.file(name)))
    return candidates


def check_targets(names: Sequence[str]) -> None:
    """Refuse a list of targets that can't be exported.

    Raises:
        QatError: the list is empty, or has an unknown name or one name twice.
    """
    if not names:
        raise QatError(f"no target, allowed: {', '.join(TARGETS)}")
    for name in names:
        find_target(name)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise QatError(f"target {twice!r} is given twice")


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        QatError: there is no such target.
    """
    if name not in TARGETS:
        raise QatError(f"target {name!r} is unknown, allowed: {', '.join(TARGETS)}{nearest(name, TARGETS)}")
    return TARGETS[name]


def _save(model: onnx.ModelProto, path: Path) -> None:
    write_atomically(path, model.SerializeToString(deterministic=True))


def _float32(subject: Subject, path: Path) -> None:
    size, mean, std = subject.image_size, subject.mean, subject.std
    _save(emit_float(subject.model, image_size=size, mean=mean, std=std), path)


def _ort_static(subject: Subject, path: Path) -> None:
    quantize_static(subject.file("float32"), path, subject.images(_CALIBRATION_IMAGES).numpy())


#: All targets, by the name that `qat bench --targets` takes.
TARGETS: Final[dict[str, Target]] = {
    "float32": Target(_float32),
    "ort_static": Target(_ort_static),
    "portable": Target(lambda subject, path: _save(emit_portable(subject.network), path), exact=True),
    "native": Target(lambda subject, path: _save(emit_native(subject.network), path), exact=True),
}
