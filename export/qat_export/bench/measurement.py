"""Measure the time of several models by turns in one process, so that all run under the same conditions.

The speed of a machine drifts (clock, temperature, other processes), often by more than models differ. So each
round runs every model, in another order than the round before. In its turn a model runs twice. The first run
is not timed; it brings the model's weights back into the caches and wakes its threads.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import onnx

from qat.errors import QatError
from qat.system.machine import usable_cores
from qat_export.bench.any_model import AnyModel
from qat_export.bench.peak_memory import peak_rss_bytes

#: If no number of rounds is given, as many are run as fit into the time, between these bounds.
FEWEST_ROUNDS: Final = 11
MOST_ROUNDS: Final = 200
SECONDS: Final = 20.0
#: Untimed rounds before the first timed one.
WARM_UP_ROUNDS: Final = 2
#: Number of times that a session is created; their median is the time to load.
_LOADS: Final = 3
_LARGEST_BATCH: Final = 4096
_LARGEST_SIDE: Final = 16384
_MOST_REPEATS: Final = 1_000_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Candidate:
    """A model to measure, and its name in the results."""

    target: str
    path: Path


@dataclass(frozen=True)
class Conditions:
    """How to measure; the same for all models.

    Attributes:
        threads: threads per operator, at most as many as this process may use cores.
        batch: images per run.
        repeats: number of timed rounds; ``None`` means as many as fit into :data:`SECONDS`.
        seed: seed of the random images.
        resolution: side of the images in pixels, for models that take any size.

    Raises:
        QatError: a number is out of range; the message names it.
    """

    threads: int = 1
    batch: int = 1
    repeats: int | None = None
    seed: int = 0
    resolution: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _require("threads", self.threads, 1, usable_cores(), " (the cores this process may use)")
        _require("batch", self.batch, 1, _LARGEST_BATCH)
        _require("seed", self.seed, 0, 2**32 - 1)
        if self.repeats is not None:
            _require("repeats", self.repeats, 1, _MOST_REPEATS)
        if self.resolution is not None:
            _require("resolution", self.resolution, 1, _LARGEST_SIDE)


def _require(name: str, value: int, least: int, most: int, reason: str = "") -> None:
    if not least <= value <= most:
        raise QatError(f"{name} is {value}, allowed are {least} to {most}{reason}")


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        candidate: the model.
        milliseconds: time of each timed run, in order.
        file_bytes: size of the file and of the files with its external data, in bytes.
        load_ms: median time to create a session from it, in milliseconds.
        peak_rss_bytes: see :func:`qat_export.bench.peak_memory.peak_rss_bytes`.
        metadata: the file's metadata properties.
    """

    candidate: Candidate
    milliseconds: tuple[float, ...]
    file_bytes: int
    load_ms: float
    peak_rss_bytes: int | None
    metadata: dict[str, str]

    @property
    def median(self) -> float:
        """Median time of a run in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the times, in milliseconds."""
        if len(self.milliseconds) == 1:
            return self.milliseconds * 2
        first, _, third = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return first, third


def measure(
    candidates: Sequence[Candidate],
    conditions: Conditions,
    *,
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure models under the same conditions.

    Before the first one is timed, every model is run once and its outputs are checked.

    Args:
        candidates: at least one model; no two with the same name.
        conditions: conditions of the measurement.
        say: called with a line on what is about to happen.
        clock: returns the time in seconds.

    Returns:
        One measurement for each of ``candidates``, in their order.

    Raises:
        QatError: there is nothing to measure, two models have the same name, or
            :class:`qat_export.bench.any_model.AnyModel` can't open one.
        VerificationError: an output is not finite.
    """
    names = [candidate.target for candidate in candidates]
    if not names:
        raise QatError("no model to measure")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise QatError(f"two models are called {twice!r}: their results could not be told apart")
    # After this, no model is in memory any more: the child processes that follow need the memory.
    timed = _timed(candidates, conditions, say, clock)
    results = []
    for measurement in timed:
        path = measurement.candidate.path
        say(f"peak memory of {measurement.candidate.target}")
        peak = peak_rss_bytes(
            path,
            threads=conditions.threads,
            batch=conditions.batch,
            resolution=conditions.resolution,
            seed=conditions.seed,
        )
        results.append(replace(measurement, peak_rss_bytes=peak))
    return results


def _timed(
    candidates: Sequence[Candidate],
    conditions: Conditions,
    say: Callable[[str], None],
    clock: Callable[[], float],
) -> list[Measurement]:
    """The result of :func:`measure`, without the peak memory."""
    models: list[AnyModel] = []
    results: list[Measurement] = []
    for candidate in candidates:
        say(f"loading {candidate.target}")
        model, load_ms = _loaded(candidate, conditions, clock)
        models.append(model)
        size = file_bytes(candidate.path)
        results.append(Measurement(candidate, (), size, load_ms, None, model.metadata))
    runs = [partial(model.run, model.input.random(conditions.seed)) for model in models]
    with _no_garbage_collection():
        repeats = conditions.repeats or rounds_in_time(runs, clock)
        say(f"measuring {len(runs)} models, {repeats} rounds")
        times = alternate(runs, repeats, clock)
    return [
        replace(result, milliseconds=tuple(1e3 * seconds for seconds in found))
        for result, found in zip(results, times, strict=True)
    ]


def alternate(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Times in seconds of ``repeats`` calls of each of ``runs``, made by turns as the module describes."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(-WARM_UP_ROUNDS, repeats):
        for index in order(list(range(len(runs))), number):
            runs[index]()
            start = clock()
            runs[index]()
            elapsed = clock() - start
            if number >= 0:
                times[index].append(elapsed)
    return times


def order(items: Sequence[Item], number: int) -> list[Item]:
    """``items`` in the order of round ``number``: in every round, another item is first.

    After each has been first once, the order is reversed, so that no item always follows the same other one.
    """
    shift, backwards = number % len(items), (number // len(items)) % 2
    turned = [*items[shift:], *items[:shift]]
    return turned[::-1] if backwards else turned


def file_bytes(path: Path) -> int:
    """Size of a model in bytes: of its file, and of the files with its external data."""
    model = onnx.load(path, load_external_data=False)
    locations = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(part.stat().st_size for part in (path, *(path.parent / location for location in locations)))


def _loaded(
    candidate: Candidate, conditions: Conditions, clock: Callable[[], float]
) -> tuple[AnyModel, float]:
    """The model, checked by one run, and the median time to load it in milliseconds."""
    times = []
    model: AnyModel | None = None
    for _ in range(_LOADS):
        model = None  # free the last one first: the largest models don't fit into memory twice
        start = clock()
        model = AnyModel(
            candidate.path,
            threads=conditions.threads,
            batch=conditions.batch,
            resolution=conditions.resolution,
        )
        times.append(clock() - start)
    assert model is not None
    model.check(model.input.random(conditions.seed))
    return model, 1e3 * statistics.median(times)


def rounds_in_time(runs: Sequence[Callable[[], object]], clock: Callable[[], float]) -> int:
    """Number of rounds that fit into :data:`SECONDS`, estimated from one round."""
    start = clock()
    alternate(runs, 1, clock)
    one = (clock() - start) / (1 + WARM_UP_ROUNDS)
    return min(max(math.ceil(SECONDS / max(one, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collection off in the block: it would add to the time of some run."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
