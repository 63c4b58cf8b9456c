"""The questions that `qat sensitivity` is asked, and its findings, as data and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from qat.evaluation import percent
from qat.quantize.overrides import GroupName
from qat.recipe.files import write_yaml
from qat.recipe.loading import LoadedRecipe
from qat.sensitivity.bitwidths import Limits, Width
from qat.sensitivity.parts import Sensitivity, ranks_of
from qat.sensitivity.suggestion import Candidate, Suggestion
from qat.sensitivity.variants import Measure

#: Largest number of images if none is given: for groups and bits, and for layers, of which there are many.
IMAGES: Final = 512
LAYER_IMAGES: Final = 160


@dataclass(frozen=True)
class Questions:
    """What to measure.

    Attributes:
        by: whether to measure groups, layers or both.
        groups: groups to measure, also by their layers; empty means all that the recipe quantizes.
        bits: numbers of bits to try, each from 2 to 8.
        images: number of test images, evenly spaced; ``None`` means at most :data:`IMAGES`, and at most
            :data:`LAYER_IMAGES` for layers.
        limits: how much fewer bits may cost.
    """

    by: Literal["group", "layer", "both"]
    groups: tuple[GroupName, ...]
    bits: tuple[int, ...]
    images: int | None
    limits: Limits


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        loaded: the recipe.
        questions: what was asked.
        architecture: description of the network, one line of text.
        images, layer_images: number of images measured on: for all but layers, and for layers.
        test_images: number of images in the test split.
        float_rest, recipe: the float-rest network, and the network quantized by the recipe.
        groups, layers: most sensitive first, by ``by_loss`` of :class:`qat.sensitivity.parts.Ranks`.
        layer_order: names of the layers from input to output.
        widths: each setting at each lower number of bits.
        candidates: layers that may be worth leaving in float.
        suggestion: the suggested section with mixed bits.
        seconds: duration of the measurement.
    """

    loaded: LoadedRecipe
    questions: Questions
    architecture: str
    images: int
    layer_images: int
    test_images: int
    float_rest: Measure
    recipe: Measure
    groups: tuple[Sensitivity, ...]
    layers: tuple[Sensitivity, ...]
    layer_order: tuple[str, ...]
    widths: tuple[Width, ...]
    candidates: tuple[Candidate, ...]
    suggestion: Suggestion
    seconds: float

    def section(self) -> str:
        """The suggested section as YAML."""
        return write_yaml({"quantization": self.suggestion.quantization.model_dump(mode="json")})

    def to_json(self) -> str:
        """One JSON object. An infinite SQNR, that of equal logits, is null."""
        limits, suggestion = self.questions.limits, self.suggestion
        content: dict[str, Any] = {
            "recipe": str(self.loaded.path),
            "architecture": self.architecture,
            "images": self.images,
            "layer_images": self.layer_images,
            "test_images": self.test_images,
            "float_rest": asdict(self.float_rest),
            "quantized": asdict(self.recipe),
            "groups": _ranked(self.groups),
            "layers": _ranked(self.layers),
            "widths": [asdict(one) | {"setting": str(one.setting)} for one in self.widths],
            "exclude_candidates": [asdict(one) for one in self.candidates],
            "limits": asdict(limits),
            "suggestion": asdict(replace(suggestion, bits={}))
            | {
                "quantization": suggestion.quantization.model_dump(mode="json"),
                "bits": {str(setting): bits for setting, bits in suggestion.bits.items()},
            },
            "seconds": self.seconds,
        }
        return json.dumps(_finite(content), indent=2)

    def notes(self) -> list[str]:
        """What a reader must know to judge the figures: notes of a sentence or two."""
        suggestion, limits = self.suggestion, self.questions.limits
        count = self.layer_images if self.layers else self.images
        found = [
            f"One of {count} images is {100 / count:.2f} points of top-1: differences of an image or two are "
            "chance. Where accuracies are equal, noise decides the order."
        ]
        if self.layers and self.layer_images < self.images:
            found.append(
                f"Layers were measured on {self.layer_images} images, all else on {self.images}; --images N "
                "measures all on N."
            )
        if self.candidates:
            names = ", ".join(f"{one.name} ({one.gain:+.2f} points)" for one in self.candidates)
            found.append(f"Candidates for quantization.exclude, each left out by itself: {names}.")
            if any(one.group == "trunk" for one in self.candidates):
                found.append("With a layer of the trunk in float, no integer graph can be exported.")
        lost = self.float_rest.top1 - self.recipe.top1
        if suggestion.excluded:
            found.append(
                f"The recipe loses {lost:.2f} points, more than the tolerance of {limits.tolerance:g}; with "
                f"{', '.join(suggestion.excluded)} in float it doesn't, so the suggestion excludes them."
            )
        elif lost > limits.tolerance:
            found.append(
                f"The recipe itself loses {lost:.2f} points before fine-tuning, more than the tolerance of "
                f"{limits.tolerance:g}; excluding layers does not bring it within."
            )
        if suggestion.quantization == self.loaded.recipe.quantization:
            found.append("Fewer bits exceed the limits: the suggestion is the recipe's own section.")
            return found
        found.append(
            "The suggestion was chosen on these test images, which may flatter it: fine-tune it, then "
            "judge it on others."
        )
        if any(bits < 8 for bits in suggestion.bits.values()):
            found.append(
                "Bytes are counted with weights packed at their bits. An exported graph holds weights and "
                "activations of 2 to 8 bits in bytes: fewer bits gain where the hardware has such types."
            )
        return found

    def verdict(self) -> str:
        """One sentence on the bytes that the suggestion saves and the accuracy that it costs."""
        one = self.suggestion
        return (
            f"Suggested: {one.weight_bytes:,} bytes of weights instead of {one.recipe_weight_bytes:,}; "
            f"before fine-tuning, top-1 is {percent(one.measure.top1)} ({0 - one.loss:+.2f} points against "
            f"the recipe's own bits) and the SQNR {decibels(one.measure.sqnr)} dB ({0 - one.drop:+.1f} dB)."
        )


def decibels(value: float) -> str:
    """A number of dB as text, with ∞ for an infinite one."""
    return f"{value:.1f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _ranked(found: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    ranks = ranks_of(found)
    return [asdict(one) | {"ranks": asdict(ranks[one.name])} for one in found]


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON can't write."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
