"""The accuracy gate: whether a model got worse than its baseline.

Both models classified the same images, so their answers are compared in pairs: only the images that one
model has right and the other has wrong tell something about the change in top-1. The statistics are in
:mod:`qat.gate.paired_statistics`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np

from qat.errors import GateError
from qat.evaluation import percent, points
from qat.gate.baseline import Baseline
from qat.gate.comparability import check_comparable, differences
from qat.gate.flips import Flips
from qat.gate.paired_statistics import (
    Pairs,
    detectable_drop,
    images_needed,
    lower_bound,
    mcnemar_p,
    upper_bound,
)
from qat.gate.rules import Rules

Verdict = Literal["pass", "improved", "fail", "inconclusive"]
#: Statistical power of the figures in an inconclusive result: the probability that a model as good as the
#: baseline passes with ``needed`` images, and that a model with a drop of ``detectable`` points fails.
POWER: Final = 0.8


@dataclass(frozen=True)
class Decision:
    """A model compared with its baseline. Changes of top-1 are in percentage points, negative for a drop.

    Attributes:
        baseline, observed, rules: what was compared, and by which rules.
        pairs: how many images only the baseline, and only this model, has right.
        p: exact two-sided p-value of McNemar's test that nothing changed.
        lower, upper: one-sided confidence bounds of the true change, each with ``rules.confidence``.
        comparison: verdict of the comparison alone, without the floor.
        floor_broken: whether top-1 lies below ``rules.floor``.
        needed: of an inconclusive comparison, images with which a model as good as the baseline usually
            passes; ``None`` where no number suffices. Within ``pairs.n``, the model is likely worse.
        detectable: of an inconclusive comparison, the least real drop that these images would find.
        warnings: what else differs between the two measurements.
        flips: the images that changed sides, where they were asked for.
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
    flips: Flips | None = None

    @property
    def limit(self) -> Fraction:
        """The allowed drop of top-1 in percentage points."""
        return self.rules.limit(self.baseline.correct_count, self.pairs.n)

    @property
    def exceeds(self) -> bool:
        """Whether the measured drop is above the allowed one, chance or not."""
        return Fraction(100 * (self.pairs.lost - self.pairs.gained), self.pairs.n) > self.limit

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
    def headline(self) -> str:
        """The verdict; of one that can't tell, also on which side of the limit the measured drop lies."""
        return self._headline(self.verdict)

    @property
    def comparison_headline(self) -> str:
        """The same of the comparison without the floor."""
        return self._headline(self.comparison)

    def _headline(self, verdict: Verdict) -> str:
        if verdict != "inconclusive":
            return verdict
        return f"inconclusive, measured drop {'above' if self.exceeds else 'within'} what is allowed"

    @property
    def comparison_reason(self) -> str:
        """Why the comparison, without the floor, ended as it did, in one sentence."""
        allowed = f"{self.rules.allowed(self.baseline.correct_count, self.pairs.n)} is allowed"
        sure = f"with {self.rules.sure} confidence"
        if self.pairs.discordant == 0 and self.comparison == "pass":
            if self.baseline.model.sha256 == self.observed.model.sha256:
                return "the same file as the baseline's, with the same answers"
            return f"the same images are right as the baseline's: 0 of {self.pairs.n:,} changed sides"
        change = 100 * self.pairs.change
        amount = f"{abs(change):.2f}" if abs(change) >= 0.005 else "less than 0.01"
        verb = "did not change" if change == 0 else f"{'rose' if change > 0 else 'fell'} by {amount} points"
        verb = f"{verb} ({_changed(self.pairs)})"
        if self.comparison == "fail":
            return f"top-1 {verb}; {sure}, by at least {-self.upper:.2f}, and {allowed}"
        if self.comparison == "improved":
            return f"top-1 {verb}; {sure}, it is better than the baseline's"
        if self.comparison == "pass":
            most = max(-self.lower, 0)
            return f"top-1 {verb}; {sure}, it did not fall by more than {most:.2f}, and {allowed}"
        if self.needed is None:
            more = "no number of images could"
        elif self.needed > self.pairs.n:
            more = f"about {self.needed:,} images could, if the model is as good as the baseline"
        else:
            more = (
                f"a model as good as the baseline usually passes with about {self.needed:,} images, so this "
                "one is likely worse, but near what is allowed"
            )
        doubt = "which may be chance" if self.exceeds else "but a larger drop may hide"
        return (
            f"top-1 {verb}, and {allowed}, {doubt}: the real change is from {points(self.lower)} to "
            f"{points(self.upper)} (each bound {sure}), and the data can't tell; {more}"
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
        """Whether the gate opens."""
        return not self.floor_broken and self.comparison_passes

    @property
    def comparison_passes(self) -> bool:
        """Whether it opens as far as the comparison goes, whatever the floor says."""
        if self.comparison != "inconclusive":
            return self.comparison != "fail"
        if self.rules.on_inconclusive == "measured":
            return not self.exceeds
        return self.rules.on_inconclusive == "pass"

    def require(self) -> None:
        """Raise unless the model passes.

        Raises:
            GateError: the model fails; the message gives verdict and reason.
        """
        if not self.passes:
            raise GateError(f"{self.headline}: {self.reason}")

    def rows(self) -> list[tuple[str, str, str]]:
        """Table for people: what, value, bound."""
        rules, sure, least = self.rules, self.rules.sure, points(-float(self.limit))
        measured = f"≥ {least}" if rules.on_inconclusive == "measured" else ""
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
            ("images that changed sides", f"{self.pairs.discordant:,}", ""),
            ("change of top-1, points", points(100 * self.pairs.change), measured),
            (f"change, at least ({sure} sure)", points(self.lower), f"≥ {least} passes"),
            (f"change, at most ({sure} sure)", points(self.upper), f"< {least} fails"),
            ("McNemar's exact p", f"{self.p:.3g}", ""),
        ]
        if self.detectable is not None:
            rows.append((f"drop that surely fails, {POWER:.0%} of the time", f"{self.detectable:.2f}", ""))
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
            "pairs": self.pairs.discordant,
            "lost": self.pairs.lost,
            "gained": self.pairs.gained,
            "change": 100 * self.pairs.change,
            "change_at_least": self.lower,
            "change_at_most": self.upper,
            "mcnemar_p": self.p,
            "images_needed": self.needed,
            "detectable_drop": self.detectable,
            "max_drop": float(self.limit),
            "max_relative_drop": self.rules.max_relative_drop,
            "measured_drop_exceeds": self.exceeds,
            "confidence": self.rules.confidence,
            "floor": self.rules.floor,
            "on_inconclusive": self.rules.on_inconclusive,
            "model": self.observed.model.model_dump(mode="json"),
            "baseline": self.baseline.model.model_dump(mode="json") | {"recorded": self.baseline.recorded},
            "flips": None if self.flips is None else self.flips.to_dict(),
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
    # The bounds hold for the true change whatever the limit is made of, so a limit that depends on the
    # baseline's measured accuracy leaves their error rates as they are.
    limit = float(rules.limit(int(before.sum()), len(before)))
    if pairs.discordant == 0:
        verdict: Verdict = "pass"  # nothing changed: there is nothing to infer
    elif upper < -limit:
        verdict = "fail"
    elif lower >= -limit:
        verdict = "improved" if lower > 0 else "pass"
    else:
        verdict = "inconclusive"
        discordance, allowed = pairs.discordant / pairs.n, limit / 100
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


def _exact(one: Baseline) -> str:
    return percent(100 * one.correct_count / one.images)


def _changed(pairs: Pairs) -> str:
    """The images that a verdict rests on, by what became of them."""
    return (
        f"{pairs.discordant:,} of {pairs.n:,} images changed sides: {pairs.lost:,} became wrong, "
        f"{pairs.gained:,} right"
    )
