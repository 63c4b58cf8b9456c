"""What `qat sensitivity` does: measure each part of a recipe's quantization, and suggest mixed bits."""

from __future__ import annotations

import json
import math
import shlex
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from qat.errors import DataError, OutputError, QuantizationError, RecipeError
from qat.evaluate import percent
from qat.files import write_atomically
from qat.loop import Reporter
from qat.mixedbits import (
    Candidate,
    Limits,
    Suggestion,
    Width,
    find_candidates,
    measure_widths,
    settings_of,
    suggest,
)
from qat.prepare import GroupName, quantized_layers
from qat.recipe import LoadedRecipe, Quantization, recipe_yaml, resolve_checkpoint
from qat.recipefiles import write_yaml
from qat.sensitivity import (
    GROUPS,
    Measure,
    Sensitivity,
    Variants,
    Watcher,
    grids_of,
    parts_of,
    ranks_of,
)
from qat.train import begin, for_task, pretrained, splits_of

#: Images taken where no number is given, at most: for groups and widths, and for layers, of which there are
#: many.
IMAGES: Final = 512
LAYER_IMAGES: Final = 160


@dataclass(frozen=True)
class Questions:
    """What to measure.

    Attributes:
        by: groups, layers, or both.
        groups: only these groups, and layers of these; all that the recipe quantizes where empty.
        bits: widths to try, 2 to 8.
        images: number of test images, evenly spaced; ``None`` takes at most :data:`IMAGES`, and at most
            :data:`LAYER_IMAGES` for layers.
        limits: what fewer bits may cost.
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
        architecture: of the network, in words.
        images, layer_images: how many, and how many for layers.
        test_images: how many the test split has.
        float_rest, recipe: the network in float, and quantized as the recipe says.
        groups, layers: most sensitive first, see :class:`qat.sensitivity.Ranks`.
        layer_order: names of the layers from input to output.
        widths: each setting at fewer bits.
        candidates: layers that may be worth leaving in float.
        suggestion: a section with mixed bits.
        seconds: how long it took.
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
        """One JSON object. A signal to noise that is infinite, of equal logits, is null."""
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
        """What a reader must know to judge the figures, a sentence or two each."""
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
                f"{', '.join(suggestion.excluded)} in float it doesn't. So the suggestion excludes that."
            )
        elif lost > limits.tolerance:
            found.append(
                f"The recipe itself loses {lost:.2f} points before fine-tuning, more than the tolerance of "
                f"{limits.tolerance:g}; no candidates for exclude bring it within."
            )
        if suggestion.quantization == self.loaded.recipe.quantization:
            found.append("No setting can do with fewer bits: the suggestion is the recipe's own section.")
        elif any(bits < 8 for bits in suggestion.bits.values()):
            found.append(
                "Bytes are counted with weights packed at their bits. An exported graph holds weights and "
                "activations of 2 to 8 bits in bytes: fewer bits gain where the hardware has such types."
            )
        return found

    def verdict(self) -> str:
        """What the suggestion gains and costs, in a sentence."""
        one = self.suggestion
        return (
            f"Suggested: {one.weight_bytes:,} bytes of weights instead of {one.recipe_weight_bytes:,}; "
            f"before fine-tuning, top-1 is {percent(one.measure.top1)} ({0 - one.loss:+.2f} points against "
            f"the recipe's own bits) and the SQNR {decibels(one.measure.sqnr)} dB ({0 - one.drop:+.1f} dB)."
        )


def measure_recipe(loaded: LoadedRecipe, questions: Questions, report: Reporter, watch: Watcher) -> Findings:
    """Measure what ``questions`` asks of a recipe with ``task: finetune``.

    Args:
        loaded: the recipe; its checkpoint is the network.
        questions: what to measure.
        report: told what is unusual about the checkpoint.
        watch: told of each variant.

    Raises:
        QatError: the recipe, its checkpoint or its data can't be used, or it quantizes nothing that was asked
            for.
    """
    started = time.perf_counter()
    recipe = for_task(loaded, "finetune", "sensitivity")
    quantization = recipe.quantization
    assert quantization is not None  # the schema requires it for this task
    device = begin(recipe)
    train, test = splits_of(recipe)
    count = _count(questions.images, len(test))
    model = pretrained(resolve_checkpoint(loaded), recipe, report).to(device)
    groups = _groups(
        loaded, quantization, set(quantized_layers(model, quantization).values()), questions.groups
    )

    images, labels = test.evenly(count)
    variants = Variants(model, recipe, train, images, labels)
    few = variants if questions.images is not None else variants.fewer(LAYER_IMAGES)
    watch.expect(2)
    full = variants.calibrated(quantization)
    grids = grids_of(full, model)
    float_rest, whole = variants.measure(model), variants.measure(full)
    del full
    watch.done("calibrated")
    watch.done("fully quantized")

    kinds: tuple[Literal["group", "layer"], ...] = ("group", "layer")
    parts = {
        kind: parts_of(model, quantization, kind, groups) if questions.by in (kind, "both") else []
        for kind in kinds
    }
    settings = settings_of(quantization, groups)
    found = {
        kind: _sorted(
            (few if kind == "layer" else variants).sensitivities(parts[kind], quantization, grids, watch)
        )
        for kind in kinds
        if parts[kind]
    }
    layers = found.get("layer", ())
    limits = questions.limits
    widths = measure_widths(variants, whole, quantization, grids, settings, questions.bits, limits, watch)
    candidates = find_candidates(variants, whole, quantization, grids, layers, limits.tolerance, watch)
    return Findings(
        loaded=loaded,
        questions=questions,
        architecture=str(model.architecture),
        images=count,
        layer_images=len(few.labels),
        test_images=len(test),
        float_rest=float_rest,
        recipe=whole,
        groups=found.get("group", ()),
        layers=layers,
        layer_order=tuple(part.name for part in parts["layer"]),
        widths=tuple(widths),
        candidates=tuple(candidates),
        suggestion=suggest(variants, float_rest, whole, quantization, widths, candidates, limits, watch),
        seconds=time.perf_counter() - started,
    )


def write_recipe(findings: Findings, path: Path) -> None:
    """Write the whole recipe with the suggested section, to a new file.

    Raises:
        OutputError: it exists, or can't be written.
    """
    require_new(path)
    loaded, suggestion, limits = findings.loaded, findings.suggestion, findings.questions.limits
    recipe = loaded.recipe.model_copy(update={"quantization": suggestion.quantization})
    moved = LoadedRecipe(path.stem, path, recipe)
    start = resolve_checkpoint(loaded)
    # A relative path is looked up beside the recipe first, which now lies elsewhere.
    if not _finds(moved, start):
        model = recipe.model.model_copy(update={"checkpoint": str(start)})
        recipe = recipe.model_copy(update={"model": model})
    made = (
        f"{loaded.name} with the bits that `qat sensitivity` suggests at a tolerance of "
        f"{limits.tolerance:g} points of top-1 and {limits.noise_budget:g} dB of noise, on "
        f"{findings.images} of {findings.test_images} test images. {findings.verdict()}"
    )
    wrapped = textwrap.wrap(made, 106, break_on_hyphens=False)
    lines = [f"qat finetune --recipe {shlex.quote(str(path))}", "", *wrapped]
    header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    write_atomically(path, f"{header}\n{recipe_yaml(recipe)}")


def decibels(value: float) -> str:
    """A ratio in dB as text; equal logits have none."""
    return f"{value:.1f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def require_new(path: Path) -> None:
    """Raise ``OutputError`` where ``path`` exists: a recipe may have been written by hand."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path}: exists already; recipes are not overwritten: give another name")


def _finds(loaded: LoadedRecipe, start: Path) -> bool:
    try:
        return resolve_checkpoint(loaded).samefile(start)
    except RecipeError:
        return False


def _count(asked: int | None, available: int) -> int:
    if asked is None:
        return min(IMAGES, available)
    if not 1 <= asked <= available:
        raise DataError(f"--images {asked}: the test split has {available} images, allowed: 1 to {available}")
    return asked


def _groups(
    loaded: LoadedRecipe, quantization: Quantization, present: set[GroupName], asked: Sequence[GroupName]
) -> list[GroupName]:
    """The groups to look at, in order."""
    if not present:
        raise QuantizationError(
            f"{loaded.path}: quantization: nothing is left to quantize; enable stem, se, classifier or "
            "trunk, or check include and exclude"
        )
    if absent := [group for group in asked if group not in present]:
        raise QuantizationError(
            f"--group {absent[0]}: {loaded.path} leaves it in float; it quantizes "
            f"{', '.join(group for group in GROUPS if group in present)}"
        )
    return [group for group in GROUPS if group in (asked or present)]


def _sorted(found: Sequence[Sensitivity]) -> tuple[Sensitivity, ...]:
    ranks = ranks_of(found)
    return tuple(sorted(found, key=lambda one: ranks[one.name].by_loss))


def _ranked(found: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    ranks = ranks_of(found)
    return [asdict(one) | {"ranks": asdict(ranks[one.name])} for one in found]


def _finite(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
