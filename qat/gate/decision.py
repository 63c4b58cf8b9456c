"""The accuracy gate: whether a model got worse than its baseline.

Both models classified the same images, so their answers are compared in pairs: only the images that one
model has right and the other has wrong tell something about the change in top-1. The statistics are in
:mod:`qat.gate.paired_statistics`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from qat.errors import GateError
from qat.evaluation import percent, points
from qat.gate.baseline import Baseline
from qat.gate.comparability import check_comparable, differences
from qat.gate.paired_statistics import (
    Pairs,
    detectable_drop,
    images_needed,
    lower_bound,
    mcnemar_p,
    upper_bound,
)

Verdict = Literal["pass", "improved", "fail", "inconclusive"]
#: Statistical power of the figures in an inconclusive result: the probability that a model as good as the
#: baseline passes with ``needed`` images, and that a model with a drop of ``detectable`` points fails.
POWER: Final = 0.8


@dataclass(frozen=True)
class Rules:
    """What a model must fulfil to pass.

    Args:
        max_drop: largest allowed drop of top-1 in percentage points, 0 to 100.
        confidence: confidence of each one-sided bound of the change, above 0.5 and below 1.
        floor: smallest allowed top-1 in percent, 0 to 100. The measured top-1 is compared with it, without
            statistics. ``None`` allows any.
        on_inconclusive: whether an inconclusive comparison passes or fails.

    Raises:
        ValueError: a value is out of range; the message says what is allowed.
    """

    max_drop: float = 1.0
    confidence: float = 0.95
    floor: float | None = None
    on_inconclusive: Literal["pass", "fail"] = "pass"

    def __post_init__(self) -> None:
        """Check the ranges; comparisons are written so that NaN fails them."""
        if not 0 <= self.max_drop <= 100:
            raise ValueError(f"{self.max_drop:g} is not a drop in percentage points, 0 to 100")
        if not 0.5 < self.confidence < 1:
            hint = f": write {self.confidence / 100:g}" if 50 < self.confidence < 100 else ", such as 0.95"
            raise ValueError(f"{self.confidence:g} is not a share between 0.5 and 1, both excluded{hint}")
        if self.floor is not None and not 0 <= self.floor <= 100:
            raise ValueError(f"{self.floor:g} is not an accuracy in percent, 0 to 100")


@dataclass(frozen=True)
class Decision:
    """A model compared with its baseline. Changes of top-1 are in percentage points, negative for a drop.

    Attributes:
        baseline, observed, rules: what was compared, and by which rules.
        pairs: how many images only the baseline, and only this model, has right.
        p: exact two-sided p-value of McNemar's test that nothing changed.
        lower, upper: one-sided confidence bounds of the true change, each with ``rules.confidence``.
        comparison: verdict of the comparison alone, without the floor.
        floor_broken: whether top-1 is below ``rules.floor``.
        needed: number of images with which a model as good as the baseline passes with probability
            :data:`POWER`; set if the comparison is inconclusive and some number is enough, else ``None``. If
            it is at most ``pairs.n``, the model is probably worse than the baseline.
        detectable: smallest true drop that fails with probability :data:`POWER` on these images; set if the
            comparison is inconclusive and there is such a drop, else ``None``.
        warnings: sentences on other differences between the two measurements.
    """

    baseline: Baseline
    observed: Baseline
    rules: Rules
    pairs: Pairs
    p: float
    lower: float
    upper: float
    comparison: Verdict
    floor_broken: bool
    needed: int | None
    detectable: float | None
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The final verdict: "fail" if the floor is broken, else that of the comparison."""
        return "fail" if self.floor_broken else self.comparison

    @property
    def reason(self) -> str:
        """The reason for the verdict, in one sentence."""
        if not self.floor_broken:
            return self.comparison_reason
        more = f"; {self.comparison_reason}" if self.comparison == "fail" else ""
        return f"{self.floor_reason}{more}"

    @property
    def comparison_reason(self) -> str:
        """The reason for the verdict of the comparison, without the floor, in one sentence."""
        allowed, sure = f"{self.rules.max_drop:g}", f"with {_sure(self.rules)} confidence"
        if _identical(self.baseline, self.observed, self.pairs):
            return "the same file as the baseline's, with the same answers"
        change = 100 * self.pairs.change
        amount = f"{abs(change):.2f}" if abs(change) >= 0.005 else "less than 0.01"
        verb = "did not change" if change == 0 else f"{'rose' if change > 0 else 'fell'} by {amount} points"
        if self.comparison == "fail":
            return f"top-1 {verb}; {sure}, by at least {-self.upper:.2f}, and {allowed} is allowed"
        if self.comparison == "improved":
            return f"top-1 {verb}; {sure}, it is better than the baseline's"
        if self.comparison == "pass":
            most = max(-self.lower, 0)
            return f"top-1 {verb}; {sure}, it did not fall by more than {most:.2f}, and {allowed} is allowed"
        if self.needed is None:
            more = "no number of images could"
        elif self.needed > self.pairs.n:
            more = f"about {self.needed:,} images could, if the model is as good as the baseline"
        else:
            more = (
                f"a model as good as the baseline usually passes with about {self.needed:,} images, so this "
                "one is likely worse, but near what is allowed"
            )
        return (
            f"top-1 {verb}; the true change is from {points(self.lower)} to {points(self.upper)} (each bound "
            f"{sure}), so {self.pairs.n:,} images can't tell whether it is a drop of more than {allowed}; "
            f"{more}"
        )

    @property
    def floor_reason(self) -> str:
        """A sentence on top-1 and the floor; empty without a floor."""
        if self.rules.floor is None:
            return ""
        side = "below" if self.floor_broken else "not below"
        return f"top-1 is {_exact(self.observed)}, {side} the floor of {self.rules.floor:g} %"

    @property
    def passes(self) -> bool:
        """Whether the model passes the gate."""
        if self.verdict == "inconclusive":
            return self.rules.on_inconclusive == "pass"
        return self.verdict != "fail"

    def require(self) -> None:
        """Raise unless the model passes.

        Raises:
            GateError: the model fails; the message gives verdict and reason.
        """
        if not self.passes:
            raise GateError(f"{self.verdict}: {self.reason}")

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of the printed table: description, value, bound."""
        rules, sure = self.rules, _sure(self.rules)
        rows = [
            ("images", f"{self.pairs.n:,}", ""),
            ("top-1, baseline", _exact(self.baseline), ""),
            (
                "top-1, this model",
                _exact(self.observed),
                "" if rules.floor is None else f"≥ {rules.floor:g} %",
            ),
            ("top-5, baseline", percent(self.baseline.top5), ""),
            ("top-5, this model", percent(self.observed.top5), ""),
            ("images that only the baseline has right", f"{self.pairs.lost:,}", ""),
            ("images that only this model has right", f"{self.pairs.gained:,}", ""),
            ("change of top-1, points", points(100 * self.pairs.change), ""),
            (f"change, at least ({sure} sure)", points(self.lower), f"≥ {points(-rules.max_drop)} passes"),
            (f"change, at most ({sure} sure)", points(self.upper), f"< {points(-rules.max_drop)} fails"),
            ("McNemar's exact p", f"{self.p:.3g}", ""),
        ]
        if self.detectable is not None:
            rows.append((f"real drop that fails, {POWER:.0%} of the time", f"{self.detectable:.2f}", ""))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The content of :meth:`to_json`."""
        return {
            "verdict": self.verdict,
            "passes": self.passes,
            "reason": self.reason,
            "warnings": list(self.warnings),
            "images": self.pairs.n,
            "top1": self.observed.top1,
            "top5": self.observed.top5,
            "baseline_top1": self.baseline.top1,
            "baseline_top5": self.baseline.top5,
            "lost": self.pairs.lost,
            "gained": self.pairs.gained,
            "change": 100 * self.pairs.change,
            "change_at_least": self.lower,
            "change_at_most": self.upper,
            "mcnemar_p": self.p,
            "images_needed": self.needed,
            "detectable_drop": self.detectable,
            "max_drop": self.rules.max_drop,
            "confidence": self.rules.confidence,
            "floor": self.rules.floor,
            "on_inconclusive": self.rules.on_inconclusive,
            "model": self.observed.model.model_dump(mode="json"),
            "baseline": self.baseline.model.model_dump(mode="json") | {"recorded": self.baseline.recorded},
        }

    def to_json(self) -> str:
        """One JSON object; accuracies in percent, changes in percentage points."""
        return json.dumps(self.to_dict(), indent=2)


def judge(baseline: Baseline, observed: Baseline, rules: Rules) -> Decision:
    """Compare a model with its baseline.

    Args:
        baseline: the recorded baseline.
        observed: the same record of the model to judge, on the same images.
        rules: what the model must fulfil.

    Raises:
        BaselineError: the two cannot be compared, see
            :func:`qat.gate.comparability.check_comparable`.
    """
    check_comparable(baseline, observed.data, observed.num_classes, observed.images)
    before, now = baseline.answers(), observed.answers()
    pairs = Pairs(len(now), int(np.sum(before & ~now)), int(np.sum(now & ~before)))
    lower, upper = (100 * bound(pairs, rules.confidence) for bound in (lower_bound, upper_bound))
    needed = detectable = None
    if upper < -rules.max_drop:
        verdict: Verdict = "fail"
    elif _identical(baseline, observed, pairs):
        verdict = "pass"
    elif lower >= -rules.max_drop:
        verdict = "improved" if lower > 0 else "pass"
    else:
        verdict = "inconclusive"
        # If no image is discordant, the true discordance is still not 0: estimate it as one image.
        discordance, allowed = max(pairs.discordant, 1) / pairs.n, rules.max_drop / 100
        needed = images_needed(discordance, allowed, rules.confidence, POWER)
        drop = detectable_drop(pairs.n, discordance, allowed, rules.confidence, POWER)
        detectable = None if drop is None else 100 * drop
    return Decision(
        baseline=baseline,
        observed=observed,
        rules=rules,
        pairs=pairs,
        p=mcnemar_p(pairs),
        lower=lower,
        upper=upper,
        comparison=verdict,
        floor_broken=rules.floor is not None and 100 * int(now.sum()) / len(now) < rules.floor,
        needed=needed,
        detectable=detectable,
        warnings=tuple(differences(baseline, observed)),
    )


def _sure(rules: Rules) -> str:
    """The confidence in percent with up to 12 digits, so that 0.9999999 is not shown as 100 %."""
    return f"{100 * rules.confidence:.12g} %"


def _exact(one: Baseline) -> str:
    return percent(100 * one.correct_count / one.images)


def _identical(baseline: Baseline, observed: Baseline, pairs: Pairs) -> bool:
    """Whether both are the same file with the same answers, so that no statistics are needed."""
    return pairs.discordant == 0 and baseline.model.sha256 == observed.model.sha256
