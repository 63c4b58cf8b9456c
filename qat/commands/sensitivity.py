"""What `qat sensitivity` does: measure each part of a recipe's quantization, and suggest mixed bits."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qat.errors import DataError, OutputError, QuantizationError, RecipeError
from qat.quantize.overrides import GroupName
from qat.quantize.preparation import quantized_layers
from qat.recipe.loading import LoadedRecipe, recipe_yaml, resolve_checkpoint
from qat.recipe.schema import Quantization
from qat.sensitivity.bitwidths import measure_widths, settings_of
from qat.sensitivity.findings import IMAGES, LAYER_IMAGES, Findings, Questions
from qat.sensitivity.parts import GROUPS, Sensitivity, measure_parts, parts_of, ranks_of
from qat.sensitivity.suggestion import find_candidates, suggest
from qat.sensitivity.variants import Variants, Watcher, quantizer_state
from qat.system.files import write_atomically
from qat.train.device import begin
from qat.train.reporter import Reporter
from qat.train.setup import for_task, splits_of
from qat.train.starting_point import starting_point


def measure_recipe(loaded: LoadedRecipe, questions: Questions, report: Reporter, watch: Watcher) -> Findings:
    """Measure what ``questions`` asks of a recipe with ``task: finetune``.

    Args:
        loaded: the recipe, which names the checkpoint of the float-rest network.
        questions: what to measure.
        report: receives warnings about the checkpoint.
        watch: receives the progress, variant by variant.

    Raises:
        QatError: the recipe, its checkpoint or its data can't be used, or the recipe quantizes nothing of
            what was asked for.
    """
    started = time.perf_counter()
    recipe = for_task(loaded, "finetune", "sensitivity")
    quantization = recipe.quantization
    assert quantization is not None  # the schema requires it for this task
    device = begin(recipe)
    train, test, _ = splits_of(recipe)
    count = _count(questions.images, len(test))
    start = starting_point(loaded, train, report)
    if start.new_classifier:
        raise QuantizationError(
            f"{start.checkpoint}: its classifier would start anew, but what quantization costs is measured "
            "of a trained network: run `qat finetune`, then set model.checkpoint=RUN/float/best.safetensors"
        )
    model = start.network.to(device)
    groups = _groups(
        loaded, quantization, set(quantized_layers(model, quantization).values()), questions.groups
    )

    images, labels = test.evenly(count)
    variants = Variants(model, recipe, train, images, labels)
    few = variants if questions.images is not None else variants.fewer(LAYER_IMAGES)
    watch.expect(2)
    full = variants.calibrated(quantization)
    state = quantizer_state(full, model)
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
            measure_parts(few if kind == "layer" else variants, parts[kind], quantization, state, watch)
        )
        for kind in kinds
        if parts[kind]
    }
    layers = found.get("layer", ())
    limits = questions.limits
    widths = measure_widths(variants, whole, quantization, state, settings, questions.bits, limits, watch)
    candidates = find_candidates(variants, whole, quantization, state, layers, limits.tolerance, watch)
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
    # A relative path to the checkpoint is searched beside the recipe first, and the new recipe may be in
    # another folder: write the absolute path if the relative one no longer leads to the same file.
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


def require_new(path: Path) -> None:
    """Raise ``OutputError`` if ``path`` exists: recipes are written by hand, and must not be lost."""
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
    """The groups to measure, in the order of :data:`qat.sensitivity.parts.GROUPS`.

    Args:
        loaded: the recipe, for messages.
        quantization: its section.
        present: groups of which it quantizes a layer.
        asked: groups given with --group; empty means all that are present.

    Raises:
        QuantizationError: nothing is quantized, or a group that was asked for is left in float.
    """
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
