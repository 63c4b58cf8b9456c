"""What an exactness check found: figures of every tensor, a table for people, and the bounds.

Tensors of the same kind (the image, the stem, binary sums, PReLU, …) form a level, a row of the table. A
setting is one of onnxruntime's: how far it optimizes the graph, and whether it gives the logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qat.errors import VerificationError
from qat.evaluation import percent
from qat_export.graphs.metadata import OUTPUT

Array = NDArray[Any]
#: onnxruntime's; "none" is for constants, which are read from the file.
Optimizations = Literal["none", "off", "on", "on, logits alone"]
#: Share of the elements of each level, in percent, that must equal the interpreter's.
EQUAL: Final = 99.99
#: Levels whose elements must all be equal. In the others single ones may be one integer apart, since a
#: runtime may round a value halfway between two integers the other way. Whether it was such a value is not
#: checked.
EXACT: Final = ("constants", "binary sums", "binary convolutions", "logits")
HEADINGS: Final = ("", "elements", "equal", "equal, optimized", "largest difference")

#: Last part of a tensor's name → level, in the order of the table.
_LEVELS: Final = {
    "image": "image",
    "feature.0": "stem",
    "sum": "binary sums",
    "conv": "binary convolutions",
    "y": "PReLU",
    "prelu1": "PReLU",
    "residual": "2×2 means",
    **dict.fromkeys(("pooled", "hidden", "logits", "attention"), "attention vectors"),
    **dict.fromkeys(("product", "branch", "normalized"), "branch"),
    **dict.fromkeys(("trunk_mid", "trunk_out"), "trunk"),
    "head": "head",
}
_ORDER: Final = ("constants", *dict.fromkeys(_LEVELS.values()), "logits")
#: The row and the column in which a level stands that is compared in one setting alone.
_CELLS: Final = {"none": ("constants", "off"), "on, logits alone": ("logits alone", "on")}


def level_of(name: str) -> str:
    """The level of the tensor ``name``, by its place (image, stem, head) or by its last part."""
    if name == OUTPUT:
        return "logits"
    place, _, part = name.rpartition("/")
    return _LEVELS.get(place) or _LEVELS[part]


@dataclass
class TensorExactness:
    """One tensor, over all images of one setting of onnxruntime.

    Attributes:
        name: as in :attr:`IntegerNetwork.grids`; ``…/sum`` for binary sums, ``logits``; of constants, their
            place.
        optimizations: the setting.
        elements, different: how many were compared, and how many of them differ.
        largest: largest difference, in integers of the grid; of logits and constants, in numbers.
    """

    name: str
    optimizations: Optimizations
    elements: int = 0
    different: int = 0
    largest: float = 0.0

    def add(self, found: Array, expected: Array) -> None:
        """Count one more part of the tensor. Another number of elements counts as all of them wrong."""
        self.elements += expected.size
        if found.size != expected.size:
            self.different += expected.size
            self.largest = float("inf")
            return
        found = found.reshape(expected.shape)
        if found.dtype == expected.dtype == np.float32:
            wrong = found.view(np.int32) != expected.view(np.int32)
        else:
            wrong = found != expected
        self.different += int(wrong.sum())
        if wrong.any():
            difference = np.abs(found[wrong].astype(np.float64) - expected[wrong])
            largest = np.where(np.isnan(difference), np.inf, difference).max()
            self.largest = max(self.largest, float(largest))


@dataclass(frozen=True)
class Level:
    """All tensors of one level in one setting; attributes as in :class:`TensorExactness`.

    Attributes:
        tensors: how many.
        worst: name of the tensor with the largest difference; of several, that with most elements; empty
            where all are equal.
    """

    name: str
    optimizations: Optimizations
    tensors: int
    elements: int
    different: int
    largest: float
    worst: str

    @property
    def equal(self) -> float:
        """Percent of the elements that are equal."""
        return 100.0 * (self.elements - self.different) / self.elements

    @property
    def share(self) -> str:
        """The equal share as text: ``100 %`` if no element differs, else less."""
        return percent(self.equal, 4) if self.different else "100 %"

    def problem(self) -> str | None:
        """What is wrong, in words."""
        setting = f", optimizations {self.optimizations}" if self.optimizations != "none" else ""
        found = (
            f"{self.name}{setting}: {self.different:,} of {self.elements:,} elements differ, "
            f"by up to {self.largest:g} in {self.worst}"
        )
        if self.name in EXACT:
            return f"{found}; none may" if self.different else None
        if self.largest > 1:
            return f"{found}; at most 1 step is allowed"
        return f"{found}; at least {EQUAL:g} % must be equal" if self.equal < EQUAL else None


@dataclass(frozen=True)
class Exactness:
    """An exported model against the interpreter.

    Attributes:
        images: how many.
        batches: sizes of the batches in which all tensors were compared; as large as memory for them allows.
        logit_batches: sizes of the batches in which the logits alone were compared.
        tensors: every tensor in every setting, and every constant if constants can be compared.
        missing: tensors of the network that the model doesn't have.
    """

    images: int
    batches: tuple[int, ...]
    logit_batches: tuple[int, ...]
    tensors: tuple[TensorExactness, ...] = field(repr=False)
    missing: tuple[str, ...] = ()

    def levels(self) -> list[Level]:
        """The tensors by level and setting, in the order of the network."""
        groups: dict[tuple[str, Optimizations], list[TensorExactness]] = {}
        for tensor in self.tensors:
            level = "constants" if tensor.optimizations == "none" else level_of(tensor.name)
            groups.setdefault((level, tensor.optimizations), []).append(tensor)
        ordered = sorted(groups.items(), key=lambda group: _ORDER.index(group[0][0]))
        return [_level(*key, tensors) for key, tensors in ordered]

    @property
    def title(self) -> str:
        """Heading of the table."""
        sizes = " and ".join(map(str, self.batches))
        more = [str(size) for size in self.logit_batches if size not in self.batches]
        text = f"{self.images} images against the integer reference, in batches of {sizes}"
        return f"{text}; logits alone also of {' and '.join(more)}" if more else text

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Table for people, under :data:`HEADINGS`."""
        found: dict[str, dict[str, Level]] = {}
        for level in self.levels():
            name, column = _CELLS.get(level.optimizations, (level.name, level.optimizations))
            found.setdefault(name, {})[column] = level
        rows = []
        if not self.constants_compared:
            rows.append(("constants", "not compared", "", "", ""))
        for name, settings in found.items():
            shares = [settings[key].share if key in settings else "" for key in ("off", "on")]
            worst = max(settings.values(), key=lambda level: (level.largest, level.different))
            rows.append((name, f"{worst.elements:,}", shares[0], shares[1], f"{worst.largest:g}"))
        return rows

    @property
    def constants_compared(self) -> bool:
        """Whether the model's graph is the one that this version exports, so that its constants could be."""
        return any(tensor.optimizations == "none" for tensor in self.tensors)

    def worst(self) -> list[str]:
        """For people: of each level where anything differs, the tensor with the largest difference."""
        found: dict[str, Level] = {}
        for level in self.levels():
            if level.worst and (level.name not in found or level.largest > found[level.name].largest):
                found[level.name] = level
        return [f"{name}: by up to {level.largest:g} in {level.worst}" for name, level in found.items()]

    def problems(self) -> list[str]:
        """Each bound that is broken, in words."""
        problems = [f"the model has no tensor {name!r}" for name in self.missing]
        return problems + [problem for level in self.levels() if (problem := level.problem())]

    def require(self) -> None:
        """Raise where a bound is broken.

        Raises:
            VerificationError: naming the first of the broken bounds.
        """
        if problems := self.problems():
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise VerificationError(f"the exported model is not exact: {'; '.join(problems[:3])}{more}")

    def to_dict(self) -> dict[str, Any]:
        """Everything that the table says, ready for JSON; a difference that is no number is null."""
        return {
            "images": self.images,
            "batches": list(self.batches),
            "logit_batches": list(self.logit_batches),
            "levels": [
                {
                    "level": level.name,
                    "optimizations": level.optimizations,
                    "tensors": level.tensors,
                    "elements": level.elements,
                    "different": level.different,
                    "largest_difference": level.largest if np.isfinite(level.largest) else None,
                    "worst_tensor": level.worst or None,
                }
                for level in self.levels()
            ],
            "constants_compared": self.constants_compared,
            "missing": list(self.missing),
            "problems": self.problems(),
        }


def _level(name: str, optimizations: Optimizations, tensors: Sequence[TensorExactness]) -> Level:
    worst = max(tensors, key=lambda tensor: (tensor.largest, tensor.different))
    return Level(
        name=name,
        optimizations=optimizations,
        tensors=len(tensors),
        elements=sum(tensor.elements for tensor in tensors),
        different=sum(tensor.different for tensor in tensors),
        largest=worst.largest,
        worst=worst.name if worst.different else "",
    )
