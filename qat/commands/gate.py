"""What `qat gate` does: record what a model gets right, and judge another model by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qat.checkpoints.format import file_hash
from qat.commands.opening import Opened, open_model
from qat.commands.sources import load_test_split
from qat.data.split import Split
from qat.evaluation import collect_logits
from qat.gate.baseline import Baseline, DataFacts, ModelFacts, describe_data, file_name, observe
from qat.gate.baseline_file import check_replaceable, read_baseline, write_baseline
from qat.gate.comparability import check_comparable, check_preprocessing
from qat.gate.decision import Decision, judge
from qat.gate.flips import find_flips
from qat.gate.rules import Rules


def record_baseline(
    path: Path, output: Path, recipe: str | None, overrides: Sequence[str], warn: Callable[[str], None]
) -> Baseline:
    """Measure the model ``path`` and write its baseline to ``output``.

    Args:
        path, recipe, overrides, warn: as in :func:`qat.commands.opening.open_model`.
        output: a new file, or a baseline to replace.

    Raises:
        QatError: the model or its data cannot be read, or ``output`` cannot be written.
    """
    check_replaceable(output)  # before the evaluation, which takes long
    model = open_model(path, recipe, overrides, warn)
    split = load_test_split(model.data, model.num_classes, warn)
    logits = _answer(model, split, warn)
    baseline = _observe(model, logits, split, describe_data(split, model.data))
    write_baseline(output, baseline)
    return baseline


def judge_model(
    path: Path,
    baseline_path: Path,
    rules: Rules,
    recipe: str | None,
    overrides: Sequence[str],
    show_flips: bool = False,
) -> Decision:
    """Measure the model ``path`` and compare it with the baseline in ``baseline_path``.

    Args:
        path, recipe, overrides: as in :func:`qat.commands.opening.open_model`; its warnings are among those
            of the decision.
        baseline_path: what :func:`record_baseline` wrote.
        rules: what is asked of the model.
        show_flips: also list the images that changed sides.

    Raises:
        QatError: a file or the data cannot be read, or the baseline is of other data, classes or
            preprocessing.
    """
    baseline = read_baseline(baseline_path)
    warnings: list[str] = []
    model = open_model(path, recipe, overrides, warnings.append)
    # `judge` checks both again. Here they are checked before the evaluation, and messages name the file.
    check_preprocessing(baseline, model.data, model.num_classes, str(baseline_path))
    split = load_test_split(model.data, model.num_classes, warnings.append)
    facts = describe_data(split, model.data)
    check_comparable(baseline, facts, model.num_classes, len(split), str(baseline_path))
    logits = _answer(model, split, warnings.append)
    observed = _observe(model, logits, split, facts)
    decision = judge(baseline, observed, rules)
    flips = None
    if show_flips:
        answers = logits.argmax(1).masked_fill(logits.isnan().any(1), -1).tolist()
        flips = find_flips(
            baseline.answers(),
            observed.answers(),
            split.labels.tolist(),
            [None if answer < 0 else answer for answer in answers],
            split.class_names,
            split.image_name,
        )
    return replace(decision, warnings=(*warnings, *decision.warnings), flips=flips)


def _answer(model: Opened, split: Split, warn: Callable[[str], None]) -> Tensor:
    """The logits (N, classes) of every image."""
    logits = collect_logits(model.predict, split, model.data)
    if unusable := int(logits.isnan().any(1).sum()):
        warn(f"{model.file}: logits of {unusable} of {len(split)} images are NaN; they count as wrong")
    return logits


def _observe(model: Opened, logits: Tensor, split: Split, facts: DataFacts) -> Baseline:
    described = ModelFacts(
        file=file_name(model.file),
        sha256=file_hash(model.file),
        format=model.format,
        architecture=model.architecture,
    )
    return observe(logits, split, facts, described, model.recipe)
