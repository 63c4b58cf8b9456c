"""Exact statistics of two models that classify the same images: the arithmetic of the accuracy gate.

Of ``n`` images, the candidate loses some that the baseline has right, and gains some that the baseline has
wrong. The counts (lost, gained, rest) follow a trinomial distribution with unknown shares ``p_lost`` and
``p_gained``. The true change of top-1 is ``p_gained - p_lost``; it leaves the discordance,
``p_lost + p_gained``, open. All functions take and return shares, not percent.

The bounds of the change are exact and unconditional (Buehler 1957; for matched pairs Lloyd and Moldovan 2007,
Statistics in Medicine 26:3369). All possible outcomes are ordered by an approximate bound. The exact upper
bound is the largest change at which the outcomes that are at least as extreme as the observed one still have
probability ``1 - confidence`` for some discordance. The lower bound is its mirror image.

The approximate bound is that of Tango's score interval (1998, Statistics in Medicine 17:891). Its statistic
has a closed form, rises with ``lost`` and falls with ``gained``. So the outcomes at least as extreme as a
given one are a region: for each ``lost``, every ``gained`` up to a threshold. A larger ``p_lost`` or a
smaller ``p_gained`` makes the region likelier. So among all shares whose change is at least some value, the
region is likeliest where the change equals that value, and only the discordance has to be searched.

The alternative is to maximize the p-value of each tested change (Chan 1998; Hsueh, Liu and Chen 2001). It
orders the outcomes anew for each change, so the p-value is not monotone in the change and is hard to invert.
With a single order, probabilities are monotone, no other bound with that order is tighter, and bounds,
verdicts and power agree with each other.

The discordance is searched on a grid finer than the scale on which the probability varies, then refined
around the best points. This is not a proof. Tests enumerate small n between the grid points and find the
error rate exceeded by at most 1e-6. With no discordant pair, the lower bound at 95 % is Clopper and Pearson's
bound for no loss, ``0.05**(1/n) - 1`` (n = 360: -0.829 %), to 1e-7 for n up to 1,000; at n = 5,000 it is
0.3 % wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincc, betaincinv, gammaln, ndtri, xlog1py, xlogy

_Array = NDArray[np.float64]

#: Share of the error rate that is reserved for errors of rounding and of truncated sums.
_SLACK: Final = 1e-6
#: Precision of every bound. The error makes an interval wider, never narrower.
_PRECISION: Final = 1e-10
#: :func:`images_needed` uses the approximate bound above the first number, and returns None above the second.
_MANY_IMAGES, _MOST_IMAGES = 50_000, 10_000_000


@dataclass(frozen=True)
class Pairs:
    """Two models on ``n`` images: ``lost`` only the baseline has right, ``gained`` only the candidate."""

    n: int
    lost: int
    gained: int

    def __post_init__(self) -> None:
        """ValueError where ``n`` is below 1, a count is negative, or both together exceed ``n``."""
        if self.n < 1:
            raise ValueError(f"n is {self.n}: at least one image is needed")
        if self.lost < 0 or self.gained < 0 or self.lost + self.gained > self.n:
            raise ValueError(f"lost {self.lost} and gained {self.gained} must be counts within n = {self.n}")

    @property
    def change(self) -> float:
        """Top-1 of the candidate minus top-1 of the baseline, a share in -1..1."""
        return (self.gained - self.lost) / self.n

    @property
    def discordant(self) -> int:
        """Images on which exactly one of both models is right."""
        return self.lost + self.gained


def mcnemar_p(pairs: Pairs) -> float:
    """Exact two-sided p-value of McNemar's test of "no change"; 1.0 if no pair is discordant.

    ``2 · P(B ≤ min(lost, gained))`` with ``B`` binomial of ``lost + gained`` trials at 1/2, at most 1.
    """
    return min(1.0, 2 * float(bdtr(min(pairs.lost, pairs.gained), pairs.discordant, 0.5)))


def upper_bound(pairs: Pairs, confidence: float) -> float:
    """One-sided upper confidence bound of the true change, a share in -1..1.

    It is below the true change with probability ``1 - confidence`` at most, whatever the true shares are.
    ValueError where ``confidence`` is not above 0.5 and below 1.
    """
    _check(confidence)
    n, lost, gained = pairs.n, pairs.lost, pairs.gained
    # The approximate bound of this outcome by bisection, rounded down so that its region holds the outcome.
    limit, above = -1.0, 1.0
    while above - limit > _PRECISION / 1000:
        middle = (limit + above) / 2
        reached = tango_score(n, lost, gained, middle) >= ndtri(confidence)
        limit, above = (middle, above) if reached else (limit, middle)
    region = Region(n, limit, confidence)
    return -_largest(lambda angles, drop: region.probability(*_shares(drop, angles)), n, 1 - confidence)


def lower_bound(pairs: Pairs, confidence: float) -> float:
    """One-sided lower confidence bound of the true change: minus the upper bound of the reverse change."""
    return -upper_bound(Pairs(pairs.n, pairs.gained, pairs.lost), confidence)


def power_to_pass(n: int, p_lost: float, p_gained: float, max_drop: float, confidence: float) -> float:
    """Probability that ``lower_bound >= -max_drop`` on ``n`` images, given the true shares.

    In that case a drop above ``max_drop`` is ruled out. The probability is at most ``1 - confidence`` if the
    true drop ``p_lost - p_gained`` is above ``max_drop``.

    Raises:
        ValueError: ``n`` is below 1, a share or ``max_drop`` is not in 0..1, or ``confidence`` is not above
            0.5 and below 1.
    """
    _check(confidence, n, max_drop, p_lost, p_gained)
    return critical_region(n, -max_drop, confidence).chance(p_gained, p_lost)


def power_to_fail(n: int, p_lost: float, p_gained: float, max_drop: float, confidence: float) -> float:
    """Probability that ``upper_bound < -max_drop`` on ``n`` images, given the true shares.

    In that case a drop above ``max_drop`` is shown. The probability is at most ``1 - confidence`` if the true
    drop is at most ``max_drop``. Raises like :func:`power_to_pass`.
    """
    _check(confidence, n, max_drop, p_lost, p_gained)
    return critical_region(n, max_drop, confidence).chance(p_lost, p_gained)


def images_needed(discordance: float, max_drop: float, confidence: float, power: float = 0.8) -> int | None:
    """Number of images with which a candidate as good as the baseline passes with probability ``power``.

    Such a candidate has ``p_lost = p_gained = discordance / 2``. The power is not monotone in the number of
    images, since counts are whole: the returned number reaches it, and some number at most 2 % (or one image)
    smaller does not. Above 50,000 images the approximate bound is used instead of the exact one.

    Returns:
        None if ``max_drop`` is 0 or more than ten million images are needed.

    Raises:
        ValueError: ``power`` is not from 0.5 to below 1; otherwise as :func:`power_to_pass`.
    """
    half = discordance / 2
    _check(confidence, 1, max_drop, half, half, power)

    def enough(n: int, exact: bool = True) -> bool:
        region = critical_region if exact else Region
        return region(n, -max_drop, confidence).chance(half, half) >= power

    if max_drop == 0 or not enough(_MOST_IMAGES, exact=False):
        return None
    few, n = 0, _MOST_IMAGES
    while n - few > max(1, n // 500):
        middle = max(math.isqrt(few * n), few + 1) if few else n // 2
        few, n = (few, middle) if enough(middle, exact=False) else (middle, n)
    if n > _MANY_IMAGES:
        return n
    few, step = n, 1.02
    while few and enough(few):
        few, n, step = min(int(few / step), few - 1), few, step**2
    while not enough(n):
        few, n, step = n, math.ceil(n * step), step**2
    while n - few > max(1, 0.02 * n):
        middle = (few + n) // 2
        few, n = (few, middle) if enough(middle) else (middle, n)
    return n


def detectable_drop(
    n: int, discordance: float, max_drop: float, confidence: float, power: float = 0.8
) -> float | None:
    """Smallest true drop, to 1e-7, that fails with probability ``power``: a share above ``max_drop``.

    ``p_gained`` is ``discordance / 2`` and ``p_lost`` is ``p_gained`` plus the drop. Returns None if even the
    largest possible drop fails less often. Raises like :func:`images_needed`.
    """
    gained = discordance / 2
    _check(confidence, n, max_drop, gained, gained, power)
    region = critical_region(n, max_drop, confidence)
    below, above = max_drop, 1 - discordance
    if above <= below or region.chance(gained + above, gained) < power:
        return None
    while above - below > 1e-7:
        middle = (below + above) / 2
        reached = region.chance(gained + middle, gained) >= power
        below, above = (below, middle) if reached else (middle, above)
    return above


def accuracy_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of an accuracy of ``correct / n``: lower and upper end, shares.

    Raises:
        ValueError: ``correct`` is not in 0..n, or ``confidence`` is not above 0.5 and below 1.
    """
    _check(confidence, n)
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct}: it must be within 0..{n}")
    tail = (1 - confidence) / 2
    lower = float(betaincinv(correct, n - correct + 1, tail)) if correct else 0.0
    upper = float(betaincinv(correct + 1, n - correct, 1 - tail)) if correct < n else 1.0
    return lower, upper


@dataclass(frozen=True)
class Region:
    """The outcomes of ``n`` images whose approximate lower bound of the drop is at least ``limit``.

    These are the outcomes whose :func:`tango_score` at a drop of ``limit`` is at least the normal quantile of
    ``confidence``.
    """

    n: int
    limit: float
    confidence: float

    def thresholds(self, lost: _Array) -> _Array:
        """Largest ``gained`` in the region for each ``lost``, -1 where there is none: arrays of one shape."""
        inside, outside = np.full(lost.shape, -1.0), self.n - lost + 1
        if self.limit == -1:  # the score may be 0 / 0 here; the region is every outcome
            return outside - 1
        while (outside - inside).max() > 1:
            middle = np.floor((inside + outside) / 2)  # equals ``inside`` where the search has ended
            score = tango_score(self.n, lost, np.maximum(middle, 0), self.limit)
            reached = (middle == inside) | (score >= ndtri(self.confidence))
            inside, outside = np.where(reached, middle, inside), np.where(reached, outside, middle)
        return inside

    def chance(self, p_lost: float, p_gained: float) -> float:
        """Probability of the region under one pair of true shares."""
        return min(1.0, float(self.probability(np.array([p_lost]), np.array([p_gained]))[0]))

    def probability(self, p_lost: _Array, p_gained: _Array) -> _Array:
        """Probability of the region under each pair of true shares; arrays (points,)."""
        # ``lost`` is summed over a window around its mean. By Bernstein's inequality it lies outside with a
        # probability below _SLACK of the error rate.
        log = math.log(4 / (_SLACK * (1 - self.confidence)))
        reach = log / 3 + np.sqrt(log**2 / 9 + 2 * log * self.n * p_lost * (1 - p_lost))
        first = np.maximum(np.floor(self.n * p_lost - reach), 0)
        size = (np.minimum(np.ceil(self.n * p_lost + reach), self.n) - first + 1).astype(np.int64)
        thresholds = self.thresholds(np.arange(first.min(), (first + size).max()))
        # Chance that an image is gained, given that it isn't lost.
        share = np.clip(p_gained / np.maximum(1 - p_lost, 1e-300), 0, 1)
        # One term of the sum for each ``lost`` in the window of each point. The windows of all points follow
        # each other in one array; ``point`` has the index of a term's point.
        point = np.repeat(np.arange(size.size), size)
        lost = first[point] + np.concatenate([np.arange(count) for count in size])
        gained, left = thresholds[(lost - first.min()).astype(np.int64)], self.n - lost
        ways = gammaln(self.n + 1) - gammaln(lost + 1) - gammaln(left + 1)
        chance = np.exp(ways + xlogy(lost, p_lost[point]) + xlog1py(left, -p_lost[point]))
        tail = (gained >= left).astype(np.float64)
        split = (gained >= 0) & (gained < left)
        tail[split] = betaincc(gained[split] + 1, (left - gained)[split], share[point[split]])
        return np.asarray(np.bincount(point, chance * tail, size.size), np.float64)


def tango_score(n: int, lost: Any, gained: Any, drop: float) -> Any:
    """Tango's score statistic of the hypothesis that the true drop is ``drop``, with a correction.

    It rises with ``lost`` and falls with ``gained`` and ``drop``::

        (lost - gained - n drop - 2**-rest) / sqrt(n (2 q + drop (1 - drop)))

    ``q`` is the maximum-likelihood estimate of ``p_gained`` under the hypothesis and ``rest`` is
    ``n - lost - gained``. The continuity correction ``2**-rest`` is not Tango's. It matters only if the
    models share almost no answer. No two real models are like that, but without the correction such outcomes,
    in which ``lost - gained`` moves in steps of two, often decide the exact bound (for an even n they can
    widen it by a tenth).

    Args:
        n: number of images.
        lost, gained: counts; floats or arrays of one shape.
        drop: a share in -1..1.

    Returns:
        The score, in the shape of the counts.
    """
    b = (2 * n - lost + gained) * drop - lost - gained
    q = (np.sqrt(np.maximum(b * b + 8 * n * gained * drop * (1 - drop), 0)) - b) / (4 * n)
    variance = n * (2 * np.maximum(q, max(0.0, -drop)) + drop * (1 - drop))
    distance = lost - gained - n * drop - np.exp2(lost + gained - float(n))
    return np.where(distance == 0, 0.0, distance / np.sqrt(np.maximum(variance, 1e-300)))


def _shares(drop: float, angle: _Array) -> tuple[_Array, _Array]:
    """Shares ``p_lost, p_gained`` whose difference is ``drop``, for angles (points,) in 0..pi/2.

    The smaller share is 0 at angle 0; at pi/2 both add up to 1, so that the models share no answer.
    """
    smaller = (1 - abs(drop)) / 2 * np.sin(angle) ** 2
    return (smaller + drop, smaller) if drop > 0 else (smaller, smaller - drop)


@lru_cache(maxsize=256)
def critical_region(n: int, drop: float, confidence: float) -> Region:
    """The outcomes whose exact lower bound of the drop is at least ``drop``."""
    if drop == -1:  # the region is every outcome
        return Region(n, -1.0, confidence)
    minus_limit = _largest(
        lambda angles, t: Region(n, -t, confidence).probability(*_shares(drop, angles)), n, 1 - confidence
    )
    return Region(n, -minus_limit, confidence)


def _largest(chance: Callable[[_Array, float], _Array], n: int, rate: float) -> float:
    """Largest t in -1..1 at which ``chance(angles, t)`` is at most ``rate`` at all angles in 0..pi/2.

    ``chance`` rises with t. So an angle that keeps the rate at some t keeps it at every smaller t, and as t
    is lowered, only the few angles that exceeded the rate need to be computed again.
    """
    rate *= 1 - _SLACK
    t, step = 1.0, 1.0

    def lower(angles: _Array) -> _Array:
        """Lower t until no angle exceeds the rate; returns the last known chance of each."""
        nonlocal t, step
        known = chance(angles, t)
        while (over := known > rate).any() and t > -1:
            worst = angles[[known.argmax()]]
            above, t = t, max(t - step, -1.0)
            while t > -1 and chance(worst, t)[0] > rate:
                above, t, step = t, max(t - 2 * step, -1.0), 2 * step
            while above - t > _PRECISION:
                middle = (above + t) / 2
                above, t = (middle, t) if chance(worst, middle)[0] > rate else (above, middle)
            step = 1e-3 / math.sqrt(n)
            known[over] = chance(angles[over], t)
        return known

    # The random spread of the counts smooths the chance over 0.35 in units of sqrt(n share / 2), so steps of
    # 0.3 miss no peak. With many discordant images only small waves are left, so the steps grow with the
    # distance from both ends.
    unit = math.sqrt(2 / n)
    grid = unit * np.concatenate([np.arange(0, 20, 0.3), 20 * 1.03 ** np.arange(500)])
    grid = grid[grid < math.pi / 4]
    angles = np.concatenate([grid, math.pi / 2 - grid[::-1]])
    spacing = np.gradient(angles) if angles.size > 1 else np.ones(1)
    lower(angles[::16])
    known = lower(angles)
    for halving in range(1, 9):
        best = np.argsort(known)[-12:]
        around = np.concatenate([angles[best] + side * spacing[best] / 2**halving for side in (-1, 1)])
        around = np.clip(around, 0, math.pi / 2)
        known = np.concatenate([known[best], lower(around)])
        angles, spacing = np.concatenate([angles[best], around]), np.tile(spacing[best], 3)
    return t


def _check(
    confidence: float, n: int = 1, max_drop: float = 0, lost: float = 0, gained: float = 0, power: float = 0.8
) -> None:
    """Raise ``ValueError`` if an argument is out of range or NaN."""
    for name, value, fine, allowed in (
        ("confidence", confidence, 0.5 < confidence < 1, "above 0.5 and below 1"),
        ("n", n, n >= 1, "at least 1"),
        ("max_drop", max_drop, 0 <= max_drop <= 1, "a share from 0 to 1"),
        ("p_lost", lost, 0 <= lost <= 1, "a share from 0 to 1"),
        ("p_gained", gained, 0 <= gained <= 1 - lost + 1e-9, "a share, at most 1 with p_lost"),
        ("power", power, 0.5 <= power < 1, "from 0.5 to below 1"),
    ):
        if not fine:
            raise ValueError(f"{name} is {value}: it must be {allowed}")
