"""The result of an exactness check: figures of every tensor, a printed table, and the bounds.

Tensors of the same kind (the image, the stem, binary sums, PReLU, …) form a level, which is a row of the
table. A setting says how onnxruntime ran: with or without optimizations, and for the logits alone or not.
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
#: Settings of onnxruntime; "none" is that of constants, which are read from the file.
Optimizations = Literal["none", "off", "on", "on, logits alone"]
#: Smallest share of the elements of a level, in percent, that must equal the interpreter's.
EQUAL: Final = 99.99
#: Levels whose elements must all be equal. In the others a few elements may differ by one integer, since a
#: runtime may round a value halfway between two integers to the other one. Whether the value was halfway is
#: not checked.
EXACT: Final = ("constants", "binary sums", "binary convolutions", "logits")
HEADINGS: Final = ("", "elements", "equal", "equal, optimized", "largest difference")

#: Level of a tensor by the last part of its name, in the order of the table.
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
#: For settings in which a single level is compared: row and column of that level in the table.
_CELLS: Final = {"none": ("constants", "off"), "on, logits alone": ("logits alone", "on")}


def level_of(name: str) -> str:
    """The level of the tensor ``name``: image, stem or head, or what the last part of the name says."""
    if name == OUTPUT:
        return "logits"
    place, _, part = name.rpartition("/")
    return _LEVELS.get(place) or _LEVELS[part]


@dataclass
class TensorExactness:
    """The comparison of one tensor in one setting, over all images.

    Attributes:
        name: name as in :attr:`qat_export.integer.network.IntegerNetwork.grids`; ``…/sum`` for binary sums,
            ``logits``, or the place of a constant.
        optimizations: the setting.
        elements, different: number of elements that were compared, and number of those that differ.
        largest: largest absolute difference: of integers, or of the numbers themselves for logits and
            constants.
    """

    name: str
    optimizations: Optimizations
    elements: int = 0
    different: int = 0
    largest: float = 0.0

    def add(self, found: Array, expected: Array) -> None:
        """Compare one more part of the tensor. If the sizes differ, all elements count as different."""
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
    """All tensors of one level in one setting. Other attributes are as in :class:`TensorExactness`.

    Attributes:
        tensors: number of tensors.
        worst: name of the tensor with the largest difference, and among equal ones with the most elements
            that differ; empty if all are equal.
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
        """Share of the elements that are equal, in percent."""
        return 100.0 * (self.elements - self.different) / self.elements

    @property
    def share(self) -> str:
        """The equal share as text; ``100 %`` only if no element differs."""
        return percent(self.equal, 4) if self.different else "100 %"

    def problem(self) -> str | None:
        """A sentence on the broken bound; None if none is broken."""
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
    """An exported model compared with the interpreter.

    Attributes:
        images: number of images.
        batches: sizes of the batches in which all tensors were compared.
        logit_batches: sizes of the batches in which only the logits were compared.
        tensors: results of every tensor in every setting, and of every constant if they can be compared.
        missing: names of tensors of the network that the model doesn't have.
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
        """Heading of the printed table."""
        sizes = " and ".join(map(str, self.batches))
        more = [str(size) for size in self.logit_batches if size not in self.batches]
        text = f"{self.images} images against the integer reference, in batches of {sizes}"
        return f"{text}; logits alone also of {' and '.join(more)}" if more else text

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of the printed table, whose headings are :data:`HEADINGS`."""
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
        """Whether constants were compared: only if the graph is the one that this version exports."""
        return any(tensor.optimizations == "none" for tensor in self.tensors)

    def worst(self) -> list[str]:
        """A line for each level with differences, which names the tensor with the largest one."""
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
        """Raise if a bound is broken.

        Raises:
            VerificationError: the message names the first broken bounds.
        """
        if problems := self.problems():
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise VerificationError(f"the exported model is not exact: {'; '.join(problems[:3])}{more}")

    def to_dict(self) -> dict[str, Any]:
        """Everything that the table says, as JSON values; a difference that is NaN or infinite is null."""
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
