"""Measuring models against each other. Times themselves are never asserted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qat_export.bench import measurement as benchmark
from qat_export.bench.any_model import AnyModel
from qat_export.bench.measurement import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    WARM_UP_ROUNDS,
    Candidate,
    Conditions,
    Measurement,
    alternate,
    file_bytes,
    measure,
    order,
)

from qat.errors import CheckpointError, QatError, VerificationError
from qat.system.machine import usable_cores
from tests.helpers.tiny_models import image_model, save


class Clock:
    """Stands still but for the work of doubles."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, durations: Iterator[float]) -> Callable[[], None]:
        """A model that takes the next of these times."""

        def run() -> None:
            self.log.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def pair(tmp_path: Path) -> list[Candidate]:
    """Two models."""
    return [Candidate(name, image_model(tmp_path / f"{name}.onnx")) for name in ("first", "second")]


# Alternation.


def test_every_round_runs_each_model_twice_in_a_row() -> None:
    clock = Clock()
    alternate([clock.run(name, iter(lambda: 1.0, 0)) for name in "abc"], 7, clock)
    assert len(clock.log) == 2 * 3 * (7 + WARM_UP_ROUNDS)
    turns = list(zip(clock.log[::2], clock.log[1::2], strict=True))
    assert all(first == second for first, second in turns)
    rounds = [[name for name, _ in turns[start : start + 3]] for start in range(0, len(turns), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)


def test_the_second_run_of_each_turn_is_timed_after_the_warm_up() -> None:
    clock = Clock()
    times = alternate([clock.run("a", map(float, count())), clock.run("b", iter(lambda: 0.5, 0))], 4, clock)
    untimed = 2 * WARM_UP_ROUNDS
    assert times == [[untimed + 1, untimed + 3, untimed + 5, untimed + 7], [0.5] * 4]


@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_no_model_has_a_place_or_a_predecessor_of_its_own(models: int) -> None:
    rounds = [order(range(models), number) for number in range(2 * models)]
    assert all(sorted(found) == list(range(models)) for found in rounds)
    for place in range(models):
        assert sorted(found[place] for found in rounds) == sorted([*range(models)] * 2)
    followed = {
        before: {after for r in rounds for b, after in pairwise(r) if b == before} for before in range(models)
    }
    assert all(len(after) == min(models - 1, 2) for after in followed.values())


# Rounds.


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(1e-6, MOST_ROUNDS), (0.125, 40), (1.0, FEWEST_ROUNDS), (60.0, FEWEST_ROUNDS)]
)
def test_as_many_rounds_as_fit_into_the_time(seconds: float, rounds: int) -> None:
    clock = Clock()
    runs = [clock.run(name, iter(lambda: seconds, 0)) for name in "ab"]
    assert benchmark.rounds_in_time(runs, clock) == rounds


def test_the_repeats_asked_for_are_taken(pair: list[Candidate]) -> None:
    found = measure(pair, Conditions(repeats=3))
    assert [len(each.milliseconds) for each in found] == [3, 3]
    assert all(time > 0 for each in found for time in each.milliseconds)


# Measuring.


def test_results_come_in_the_order_given_with_all_that_is_known(pair: list[Candidate]) -> None:
    found = measure(pair[::-1], Conditions(repeats=1))
    assert [each.candidate for each in found] == pair[::-1]
    for each in found:
        assert each.file_bytes == each.candidate.path.stat().st_size
        assert each.load_ms > 0
        assert each.peak_rss_bytes is None or each.peak_rss_bytes > 2**24
        assert each.metadata == {}


def test_the_load_time_is_the_median_of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = Clock(), iter([5.0, 1.0, 2.0])

    class Slow(AnyModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            clock.now += next(durations)

    monkeypatch.setattr(benchmark, "AnyModel", Slow)
    candidate = Candidate("a", image_model(tmp_path / "a.onnx"))
    (found,) = measure([candidate], Conditions(repeats=1), clock=clock)
    assert found.load_ms == 2000.0


def test_garbage_is_not_collected_while_measuring_and_only_then(
    pair: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = AnyModel.run

    def run(self: AnyModel, images: Any) -> list[Any]:
        seen.append(gc.isenabled())
        return plain(self, images)

    monkeypatch.setattr(AnyModel, "run", run)
    assert gc.isenabled()
    measure(pair, Conditions(repeats=2))
    checks, timed = seen[:2], seen[2:]
    assert checks == [True, True]
    assert timed == [False] * 2 * 2 * (2 + WARM_UP_ROUNDS)
    assert gc.isenabled()


def test_the_batch_is_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    plain = AnyModel.run

    def run(self: AnyModel, images: Any) -> list[Any]:
        shapes.add(images.shape)
        return plain(self, images)

    monkeypatch.setattr(AnyModel, "run", run)
    path = image_model(tmp_path / "a.onnx", ("batch", "height", "width", 3), TensorProto.UINT8)
    measure([Candidate("a", path)], Conditions(batch=5, resolution=9, repeats=1))
    assert shapes == {(5, 9, 9, 3)}


def test_one_says_what_is_happening(pair: list[Candidate]) -> None:
    said: list[str] = []
    measure(pair, Conditions(repeats=2), say=said.append)
    assert said == [
        "loading first",
        "loading second",
        "measuring 2 models, 2 rounds",
        "peak memory of first",
        "peak memory of second",
    ]


def test_median_and_quartiles_are_those_of_the_times() -> None:
    def timed(*milliseconds: float) -> Measurement:
        return Measurement(Candidate("a", Path("a.onnx")), milliseconds, 1, 1.0, None, {})

    assert timed(5.0, 1.0, 3.0, 2.0, 4.0).median == 3.0
    assert timed(5.0, 1.0, 3.0, 2.0, 4.0).quartiles == (2.0, 4.0)
    assert timed(7.0).quartiles == (7.0, 7.0)


def test_external_data_is_part_of_the_size(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = helper.make_node("MatMul", ["pixels", "w"], ["score"])
    path = save(tmp_path / "model.onnx", [node], [("pixels", TensorProto.FLOAT, [1, 3, 64, 64])], [weights])
    inline = file_bytes(path)
    assert inline == path.stat().st_size
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    beside = (tmp_path / "weights.bin").stat().st_size
    assert beside == 64 * 64 * 4
    assert file_bytes(path) == path.stat().st_size + beside
    (found,) = measure([Candidate("a", path)], Conditions(repeats=1))
    assert found.file_bytes > beside


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"threads": 0},
            rf"threads is 0, allowed are 1 to {usable_cores()} \(the cores this process may use",
        ),
        ({"threads": 100_000}, "threads is 100000"),
        ({"batch": 0}, "batch is 0, allowed are 1 to 4096"),
        ({"batch": 10**9}, "batch is 1000000000"),
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": -3}, "repeats is -3"),
        ({"seed": -1}, "seed is -1, allowed are 0 to 4294967295"),
        ({"resolution": 0}, "resolution is 0"),
    ],
)
def test_absurd_conditions_are_refused_naming_what_is_allowed(options: dict[str, int], message: str) -> None:
    with pytest.raises(QatError, match=message):
        Conditions(**options)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(QatError, match="no model"):
        measure([], Conditions())


def test_two_models_of_one_name_are_refused(pair: list[Candidate]) -> None:
    namesakes = [Candidate("same", candidate.path) for candidate in pair]
    with pytest.raises(QatError, match="two models are called 'same'"):
        measure(namesakes, Conditions(repeats=1))


def test_a_bad_model_is_refused_before_any_is_timed(
    pair: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "alternate", lambda *_: pytest.fail("timed"))
    bad = image_model(tmp_path / "nan.onnx", scale=float("nan"))
    with pytest.raises(VerificationError, match=r"nan\.onnx: output 'score' holds NaN"):
        measure([*pair, Candidate("bad", bad)], Conditions())
    fixed = image_model(tmp_path / "fixed.onnx", (1, 3, 8, 8))
    with pytest.raises(CheckpointError, match=r"fixed\.onnx: .* takes batches of 1, not of 8"):
        measure([*pair, Candidate("fixed", fixed)], Conditions(batch=8))
