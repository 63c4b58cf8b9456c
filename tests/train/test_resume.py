"""A run that is killed at any moment and resumed ends with the same bytes as an uninterrupted run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.recipe.loading import load_recipe, recipe_yaml
from qat.train.resume import open_run
from qat.train.state_file import State, newest_state, write_state
from tests.helpers.cases import slow
from tests.helpers.killed_training import (
    WIDTHS,
    Ended,
    arguments,
    differences,
    outcome,
    resume,
    train,
    unfinished,
)
from tests.helpers.paths import ROOT
from tests.helpers.toy_runs import fail, pretrain_toy, settings, succeed

# See tests/train/test_parallel.py.
pytestmark = pytest.mark.xdist_group("resume")

TASKS = ("finetune", "pretrain")
EXHAUSTIVE = pytest.mark.exhaustive
#: Run of a task, what it left, how it ended.
Reference = tuple[Path, dict[str, Any], Ended]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain_toy(tmp_path_factory.mktemp("toy"), WIDTHS)


@pytest.fixture(scope="module")
def reference(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """An uninterrupted run of a task, made once."""
    made: dict[tuple[str, ...], Reference] = {}

    def make(task: str, *overrides: str) -> Reference:
        key = (task, *overrides)
        if key not in made:
            out = tmp_path_factory.mktemp(task)
            ended = train(arguments(task, out, start, *overrides))
            assert ended.code == 0, ended.errors
            (run,) = out.iterdir()
            made[key] = run, outcome(run), ended
        return made[key]

    return make


@pytest.fixture
def kill(reference: Callable[..., Reference], start: Path) -> Callable[..., Path]:
    """Begin the reference's run again and kill it at a moment."""

    def begin(task: str, moment: int | str, *overrides: str) -> Path:
        run, _, ended = reference(task, *overrides)
        at = ended.moment(moment) if isinstance(moment, str) else moment
        for before in run.parent.iterdir():
            if before != run:
                shutil.rmtree(before)
        assert train(arguments(task, run.parent, start, *overrides), at).code == -signal.SIGKILL
        return unfinished(run.parent)

    return begin


# Killed and resumed


@pytest.mark.parametrize("task", [slow("finetune"), pytest.param("pretrain", marks=EXHAUSTIVE)])
def test_a_run_killed_twice_at_random_ends_with_the_same_bytes(
    reference: Callable[..., Reference], kill: Callable[..., Path], task: str
) -> None:
    _, expected, ended = reference(task)
    assert ended.moments.count("step") == 12
    draw = random.Random(task)
    run = kill(task, draw.randrange(20, len(ended.moments)))
    assert train(resume(run), draw.randrange(5, 15)).code == -signal.SIGKILL
    last = train(resume(run))
    assert (last.code, "warning" in last.errors) == (0, False), last.errors
    assert differences(outcome(run), expected) == []


@pytest.mark.parametrize(
    ("task", "moment"),
    [
        pytest.param("finetune", "half begun.safetensors", marks=EXHAUSTIVE),
        pytest.param("finetune", "half 00000-0000000.safetensors", marks=EXHAUSTIVE),
        pytest.param("finetune", "00000-0000000.safetensors", marks=EXHAUSTIVE),
        ("finetune", "half 00001-0000002.safetensors"),
        ("pretrain", "00001-0000000.safetensors"),
        # As a run with mixing, averaging and accumulation below.
        pytest.param("pretrain", "00001-0000002.safetensors", marks=EXHAUSTIVE),
        pytest.param("pretrain", "before 00001-0000002.safetensors", marks=EXHAUSTIVE),
        pytest.param("pretrain", "00002-0000000.safetensors", marks=EXHAUSTIVE),
        pytest.param("pretrain", "half last.safetensors", marks=EXHAUSTIVE),
        pytest.param("pretrain", "before summary.json", marks=EXHAUSTIVE),
    ],
)
def test_a_run_killed_while_it_writes_ends_with_the_same_bytes(
    reference: Callable[..., Reference], kill: Callable[..., Path], task: str, moment: str
) -> None:
    run = kill(task, moment)
    assert len(list(run.rglob(".*.tmp"))) == (not moment.startswith("0"))
    last = train(resume(run))
    assert last.code == 0, last.errors
    assert differences(outcome(run), reference(task)[1]) == []


#: 4 steps of 3 batches, mixed; a state after every third step.
RICH = (
    "data.batch_size=107",
    "schedule.accumulate=3",
    "schedule.ema=0.9",
    "loss.label_smoothing=0.1",
    "schedule.reestimate_batch_norm=2",
    "data.augment={pad: 1, mixup: 0.8, cutmix: 1.0, erasing: 0.3}",
)


def test_mixing_averaging_and_accumulation_go_on_to_the_same_bytes(
    reference: Callable[..., Reference], kill: Callable[..., Path]
) -> None:
    _, expected, ended = reference("pretrain", *RICH)
    assert ended.moments.count("step") == 12
    assert any(key.startswith("average/") for key in expected)
    # In the middle of an epoch and, of the second process, after a whole one.
    run = kill("pretrain", "00001-0000002.safetensors", *RICH)
    assert train(resume(run), 6).code == -signal.SIGKILL
    assert train(resume(run)).code == 0
    assert differences(outcome(run), expected) == []


@pytest.mark.slow
def test_a_run_with_a_teacher_goes_on_with_that_teacher_alone(
    reference: Callable[..., Reference], kill: Callable[..., Path], start: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(start, teacher)
    overrides = (f"distillation.teachers=['{teacher}']",)
    _, expected, _ = reference("pretrain", *overrides)
    run = kill("pretrain", "00001-0000002.safetensors", *overrides)
    shutil.copy(pretrain_toy(tmp_path, WIDTHS, "seed=5"), teacher)
    refused = train(resume(run))
    assert refused.code == 2
    assert "of another run: the weights of the teachers differ" in refused.errors
    shutil.copy(start, teacher)
    assert train(resume(run)).code == 0
    assert differences(outcome(run), expected) == []


@EXHAUSTIVE
@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("finetune", ("quantization.trunk.observer=histogram", "output.float_weights=float16")),
        ("finetune", ("optimizer.name=sgd", "schedule.freeze_binary=true", "distillation.teacher=none")),
        (
            "finetune",
            ("schedule.ema=0.9", "schedule.accumulate=2", "data.batch_size=160", "precision=bfloat16"),
        ),
        ("finetune", ("quantization.backend=brevitas", "quantization.trunk.observer=percentile")),
        ("pretrain", ("optimizer.name=sgd", "schedule.keep_states=3", "schedule.save_steps=1")),
        ("pretrain", ("distillation.teacher=none", "data.augment={}", "schedule.save_steps=null")),
    ],
)
def test_other_observers_optimizers_and_storage_end_with_the_same_bytes(
    reference: Callable[..., Reference], kill: Callable[..., Path], task: str, overrides: tuple[str, ...]
) -> None:
    _, expected, ended = reference(task, *overrides)
    draw = random.Random(str(overrides))
    for moment in draw.sample(range(10, len(ended.moments)), 3):
        run = kill(task, moment, *overrides)
        assert train(resume(run)).code == 0
        assert differences(outcome(run), expected) == []


@EXHAUSTIVE
@pytest.mark.parametrize("task", TASKS)
def test_a_process_killed_again_and_again_by_the_clock_ends_with_the_same_bytes(
    reference: Callable[..., Reference], start: Path, task: str
) -> None:
    done, expected, _ = reference(task)
    for before in done.parent.iterdir():
        if before != done:
            shutil.rmtree(before)
    draw = random.Random(task)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, kills = arguments(task, done.parent, start), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "qat", *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        seen = _newest(done.parent)
        while process.poll() is None and (kills == 4 or _newest(done.parent) == seen):
            time.sleep(0.002)  # until it has saved something, so that every round gets further
        time.sleep(0.0 if kills == 4 else draw.uniform(0.0, 0.3))
        process.kill()
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        if not any(not (path / "summary.json").exists() for path in done.parent.iterdir()):
            break  # killed when all but its process had ended
        command = resume(unfinished(done.parent))
    assert kills >= 2
    (run,) = (path for path in done.parent.iterdir() if path != done)
    found = outcome(run)
    assert [key for key in differences(found, expected) if key in found and key != "report.html"] == []
    assert {"best.safetensors", "last.safetensors", "metrics.jsonl", "summary.json"} <= found.keys()


def _newest(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*/state/0*.safetensors") if "-" in path.name)


# What a run keeps


def test_saving_more_or_less_often_changes_no_result_and_keeps_as_many_as_asked(
    reference: Callable[..., Reference], start: Path, tmp_path: Path
) -> None:
    _, expected, _ = reference("pretrain")
    ended = train(
        arguments("pretrain", tmp_path, start, "schedule.keep_states=3", "schedule.save_steps=null")
    )
    assert ended.code == 0
    (run,) = tmp_path.iterdir()
    found = outcome(run)
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    assert found["states"] == [
        *(f"0000{i}-0000000.safetensors" for i in (1, 2, 3)),
        "begun.safetensors",
        "lock",
    ]
    assert expected["states"] == [
        "00002-0000004.safetensors",
        "00003-0000000.safetensors",
        "begun.safetensors",
        "lock",
    ]
    written = [name for name in ended.moments if name.startswith("0")]
    assert written == [f"0000{i}-0000000.safetensors" for i in range(4)]


def test_a_finished_run_has_no_states_left_and_resuming_it_says_that_it_has_finished(
    start: Path, tmp_path: Path
) -> None:
    assert train(arguments("pretrain", tmp_path, start, "schedule.epochs=1"), tidy=True).code == 0
    (run,) = tmp_path.iterdir()
    assert not (run / "state").exists()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    printed = succeed("pretrain", "--resume", run)
    assert printed.startswith(f"{run}: this run has finished; nothing is left to do. To train on, ")
    assert f"qat pretrain {run}/recipe.yaml --checkpoint {run}/best.safetensors --epochs N" in printed
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# States that can't be used


@pytest.fixture(scope="module")
def killed_run(
    reference: Callable[..., Reference], start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pretraining killed with states at (2, 0) and (2, 1). To be copied."""
    out = tmp_path_factory.mktemp("killed")
    at = reference("pretrain")[2].moment("00002-0000001.safetensors") + 1
    assert train(arguments("pretrain", out, start), at).code == -signal.SIGKILL
    return unfinished(out)


@pytest.fixture
def run(killed_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed_run, tmp_path / killed_run.name))


def state_of(run: Path) -> State:
    state = newest_state(run, pytest.fail)
    assert state is not None
    return state


@pytest.mark.parametrize(
    "damage",
    ["flipped", "all", *(pytest.param(kind, marks=EXHAUSTIVE) for kind in ("cut", "empty"))],
)
def test_a_damaged_state_is_passed_over_with_a_warning(
    reference: Callable[..., Reference], run: Path, damage: str
) -> None:
    paths = sorted((run / "state").glob("0*.safetensors"), reverse=True)
    assert [path.name for path in paths] == ["00002-0000001.safetensors", "00002-0000000.safetensors"]
    for path in paths if damage == "all" else paths[:1]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
    ended = train(resume(run))
    assert ended.code == 0, ended.errors
    assert f"warning: {paths[0]}: " in ended.errors
    assert ("begins again" in ended.errors) == (damage == "all")
    expected = reference("pretrain")[1]
    # The folder of results stands in checkpoints, and it is another one here.
    found, same = outcome(run), ["metrics.jsonl", "summary.json"]
    same += [key for key in expected if key.startswith(("model/", "optimizer/", "random/"))]
    assert [key for key in same if found[key] != expected[key]] == []
    assert len(same) > 100


def test_a_state_of_another_run_is_refused(run: Path, start: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(arguments("pretrain", other, start, "seed=7", "schedule.epochs=1")).code == 0
    shutil.copy(next(other.glob("*/state/00001-*")), run / "state" / "00009-0000000.safetensors")
    message = fail(2, "pretrain", "--resume", run)
    assert "recipe.yaml: not the recipe of " in message
    assert "seed, schedule.epochs" in message


def test_a_recipe_changed_meanwhile_is_refused_and_named(run: Path) -> None:
    path = run / "recipe.yaml"
    recipe = load_recipe(path, ["optimizer.lr=0.5"]).recipe
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert "optimizer.lr differs; a run goes on with the recipe it began" in fail(
        2, "pretrain", "--resume", run
    )


@pytest.mark.parametrize(
    ("fact", "part"),
    [
        ("train_fingerprint", "the training images differ"),
        ("test_fingerprint", "the test images differ"),
        ("pretrained_sha256", "the checkpoint to start from differs"),
    ],
)
def test_other_data_or_another_checkpoint_is_refused(run: Path, fact: str, part: str) -> None:
    state = state_of(run)
    record = state.record.model_copy(update={"facts": state.record.facts | {fact: "0" * 64}})
    write_state(run, record, dict(state.tensors), 2)
    assert f"of another run: {part}" in fail(2, "pretrain", "--resume", run)


def test_another_number_of_threads_or_version_is_a_warning(run: Path) -> None:
    state = state_of(run)
    versions = state.record.facts["versions"].replace('"numpy": "', '"numpy": "0.')
    record = state.record.model_copy(
        update={"threads": 7, "facts": state.record.facts | {"versions": versions}}
    )
    write_state(run, record, dict(state.tensors), 2)
    ended = train(resume(run))
    assert ended.code == 0
    assert "warning: the number of threads was 7, is 1; numpy was 0." in ended.errors
    assert "last bits" in ended.errors


def test_a_state_of_another_network_is_refused(run: Path) -> None:
    state = state_of(run)
    tensors = {key: value for key, value in state.tensors.items() if key != "model/fc.bias"}
    write_state(run, state.record, tensors, 2)
    message = fail(2, "pretrain", "--resume", run)
    assert "does not fit the run" in message
    assert "fc.bias" in message


# What can't be resumed, and what may change


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--recipe", "tiny_digits_pretrain"], "leave out --recipe"),
        (settings(["optimizer.lr=0.5"]), "--set optimizer.lr: cannot change when a run goes on"),
        (settings(["data.augment={}"]), "--set data.augment.translate: cannot change"),
        (settings(["threads=0"]), "threads: found 0"),
    ],
)
def test_options_that_would_change_the_result_are_refused(run: Path, options: list[str], part: str) -> None:
    assert part in fail(2, "pretrain", "--resume", run, *options)


def test_the_other_command_a_missing_folder_and_one_that_is_no_run_are_refused(
    run: Path, tmp_path: Path
) -> None:
    assert "`qat pretrain`, not `qat finetune`" in fail(2, "finetune", "--resume", run)
    assert "no such run directory" in fail(2, "finetune", "--resume", tmp_path / "absent")
    assert "it has no recipe.yaml" in fail(2, "finetune", "--resume", tmp_path)
    assert "is empty" in fail(2, "finetune", "--resume", "")


def test_what_leaves_the_result_alone_may_be_set(run: Path) -> None:
    overrides = (
        "threads=2",
        "device=cpu",
        "parallel=ddp",
        "data.workers=1",
        "schedule.keep_states=1",
        "schedule.save_steps=1",
    )
    ended = train(resume(run, *overrides))
    assert ended.code == 0
    assert "the number of threads was 1, is 2" in ended.errors
    assert [path.name for path in (run / "state").glob("0*")] == ["00003-0000000.safetensors"]
    assert "00002-0000002.safetensors" in ended.moments


@EXHAUSTIVE
def test_paths_of_a_run_are_found_again_and_checkpoints_repeat_them_as_given(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start.parent)
    command = arguments("finetune", tmp_path, Path(start.name), "schedule.epochs=1")
    whole = train(command)
    (done,) = tmp_path.iterdir()
    assert train(command, whole.moment("00000-0000003.safetensors")).code == -signal.SIGKILL
    run = unfinished(tmp_path)
    monkeypatch.chdir("/")
    assert open_run(run, (), _Quiet()).recipe.model.checkpoint == start.name
    assert train(resume(run)).code == 0
    assert differences(outcome(run), outcome(done)) == []


class _Quiet:
    def warning(self, text: str) -> None:
        pytest.fail(text)


def test_two_processes_do_not_train_in_one_run(run: Path) -> None:
    with (run / "state" / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        ended = train(resume(run))
    assert ended.code == 2
    assert f"{run}: another process is training in this run" in ended.errors


# SIGTERM


@pytest.mark.parametrize(
    ("task", "moment"),
    [
        pytest.param("finetune", "begun.safetensors", marks=EXHAUSTIVE),  # before calibration
        ("finetune", "step"),
        pytest.param("pretrain", "00002-0000000.safetensors", marks=EXHAUSTIVE),  # between two epochs
        ("pretrain", "00002-0000004.safetensors"),  # before an evaluation
    ],
)
def test_sigterm_saves_exits_with_143_and_says_how_to_go_on(
    reference: Callable[..., Reference], start: Path, task: str, moment: str
) -> None:
    done, expected, ended = reference(task)
    for before in done.parent.iterdir():
        if before != done:
            shutil.rmtree(before)
    command = arguments(task, done.parent, start)
    stopped = train(command, ended.moment(moment), send=signal.SIGTERM)
    run = unfinished(done.parent)
    assert stopped.code == 143
    message = f"error: stopped by SIGTERM, everything is saved; go on with: qat {task} --resume {run}"
    assert stopped.errors.splitlines()[-1] == message
    if moment == "step":
        assert (run / "state" / "00000-0000001.safetensors").exists()
    last = train(message.partition(": qat ")[2].split())
    assert last.code == 0, last.errors
    assert differences(outcome(run), expected) == []
    # No step was done twice or left out.
    assert stopped.moments.count("step") + last.moments.count("step") == 12


def test_a_second_sigterm_ends_at_once(
    reference: Callable[..., Reference], start: Path, tmp_path: Path
) -> None:
    at = reference("pretrain")[2].moment("step")
    ended = train(arguments("pretrain", tmp_path, start), at, send=signal.SIGTERM, times=2)
    assert ended.code == -signal.SIGTERM
    with contextlib.suppress(StopIteration):
        pytest.fail(f"saved {next((unfinished(tmp_path) / 'state').glob('00000-0000001*'))}")


@EXHAUSTIVE
def test_sigterm_after_the_last_epoch_lets_the_run_finish(
    reference: Callable[..., Reference], start: Path, tmp_path: Path
) -> None:
    at = reference("pretrain")[2].moment("00003-0000000.safetensors")
    assert train(arguments("pretrain", tmp_path, start), at, send=signal.SIGTERM).code == 0
    assert next(tmp_path.glob("*/summary.json")).is_file()
