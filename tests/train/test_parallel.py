"""Training by two processes has the result of one process with the same batches, also after interruptions."""

from __future__ import annotations

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.errors import RecipeError
from qat.recipe.loading import load_recipe
from qat.system.collectives import as_one_of
from qat.system.launch import Share, World
from qat.train.parallel import check_parallel
from qat.train.state_file import newest_state
from tests.helpers.joined_processes import LONG, arguments, by_launcher, codes, rows, send, the_run, together
from tests.helpers.killed_training import differences, outcome, timeless, unfinished
from tests.helpers.toy_runs import image_folder, qat

# Its processes start from a server, and its runs from a run, of which one is enough.
pytestmark = pytest.mark.xdist_group("parallel")

#: Every random change to images, and every option between the loss and the optimizer step.
EVERYTHING = (
    "data.augment={pad: 1, flip: true, translate: 0.1, rotate: 5.0, randaugment: {count: 2, magnitude: 5}, "
    "jitter: 0.2, erasing: 0.3, mixup: 0.5, cutmix: 0.5}",
    "data.batch_size=160",
    "schedule.accumulate=2",
    "schedule.ema=0.9",
    "schedule.epochs=2",
    "optimizer.clip_norm=1.0",
    "loss.label_smoothing=0.1",
)
#: Ranges and batch statistics that move and freeze under way; an evaluation's last batch is one image.
TUNED = (
    "data.batch_size=480",
    "data.eval_batch_size=359",
    "data.augment.translate=0.1",
    "schedule.epochs=2",
    # The last batch has 477 images, which two can't share evenly.
    "schedule.calibration_batches=3",
    "schedule.freeze_batch_norm=0.5",
    "schedule.reestimate_batch_norm=3",
    "quantization.se.observer=percentile",
    "quantization.classifier.observer=minmax",
)


def alone(words: list[str]) -> str:
    """Run `qat WORDS` in one process; what it says."""
    result = qat(*words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process alone has pretrained."""
    out = tmp_path_factory.mktemp("alone")
    alone(arguments("pretrain", out, *EVERYTHING))
    return the_run(out)


def require_same(run: Path, one: Path, near_to: float = 1e-4) -> None:
    """Metrics are equal but for rounding, since two processes compute sums in another order.

    By that an integer of an evaluation can differ by one step, and a network near chance level can give other
    answers to two of 360 images.
    """
    near = {"loss": 1e-5, "test_loss": 1e-4}
    for mine, expected in zip(rows(run), rows(one), strict=True):
        for key, value in timeless(expected).items():
            if key in ("test_top1", "test_top5"):
                assert mine[key] == pytest.approx(value, abs=200 / 360 + 1e-6), key
                continue
            assert mine[key] == (pytest.approx(value, rel=near[key]) if key in near else value), key
    (mine_kept, kept) = (load_checkpoint(path / "last.safetensors").state for path in (run, one))
    assert mine_kept.keys() == kept.keys()
    for name, value in kept.items():
        torch.testing.assert_close(mine_kept[name], value, rtol=near_to, atol=near_to)


def test_two_processes_pretrain_as_one_and_the_first_alone_writes_and_prints(
    start: Path, tmp_path: Path
) -> None:
    first, second = together(arguments("pretrain", tmp_path, *EVERYTHING))
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    require_same(the_run(tmp_path), start)
    assert second.output == second.errors == first.errors == ""
    assert first.output.count("epoch 2/2") == 1


@pytest.mark.parametrize(
    "options",
    [
        (),
        # Scales that are learned. Adam's first step would make whole steps of rounding errors.
        pytest.param(
            ("quantization.backend=brevitas", "optimizer.name=sgd", "schedule.freeze_observers=0.6"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["observed", "learned"],
)
def test_two_processes_fine_tune_as_one(start: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    changes = (f"model.checkpoint={json.dumps(str(start / 'best.safetensors'))}", *TUNED, *options)
    alone(arguments("finetune", tmp_path / "one", *changes))
    ended = together(arguments("finetune", tmp_path / "two", *changes))
    assert codes(ended) == [0, 0], ended
    one, two = the_run(tmp_path / "one"), the_run(tmp_path / "two")
    # A learned step's gradient is of rounding errors, which jump by a step where a value lies half-way.
    require_same(two, one, 2e-2 if options else 1e-4)
    summaries = [json.loads((run / "summary.json").read_text("utf-8")) for run in (one, two)]
    for name in ("float", "calibrated"):  # no sums over processes before the first step
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.parametrize("size", [359, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_each_image_is_evaluated_once_however_they_divide(start: Path, size: int) -> None:
    evaluation = [
        "evaluate",
        str(start / "best.safetensors"),
        "--json",
        "--set",
        f"data.eval_batch_size={size}",
    ]
    expected = json.loads(qat(*evaluation).stdout)
    first, second = together(evaluation)  # one of which has no part of a batch of one image
    assert json.loads(first.output) == expected
    assert (expected["n"], second.output) == (360, "")


# Endings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes leave that are not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert codes(together(arguments("pretrain", out, *LONG))) == [0, 0]
    return left(the_run(out))


def left(run: Path) -> dict[str, Any]:
    """What a run ends with, apart from the name of its folder, which its recipe has."""
    named = ("best.safetensors", "last.safetensors", "recipe.yaml", "record/recipe")
    return {key: value for key, value in outcome(run).items() if key not in named}


def test_sigterm_to_any_process_saves_and_stops_all_and_resuming_loses_nothing(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    ended = together(arguments("pretrain", tmp_path, *LONG), partial(send, signal.SIGTERM, 1, 5))
    assert codes(ended) == [143, 143], ended
    (said,) = [one.errors for one in ended if one.errors]
    assert "stopped by SIGTERM, everything is saved; go on with: qat pretrain --resume" in said
    run = unfinished(tmp_path)
    assert (run / "state" / "00001-0000001.safetensors").exists()
    assert codes(together(["pretrain", "--resume", str(run)])) == [0, 0]
    assert not differences(left(run), whole)


def test_a_killed_process_ends_the_others_in_words_and_the_run_can_go_on(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    first, second = together(arguments("pretrain", tmp_path, *LONG), partial(send, signal.SIGKILL, 1, 4))
    assert (first.code, second.code) == (2, -signal.SIGKILL), first
    assert first.errors == "error: another process of this training ended without a word; --resume goes on\n"
    run = unfinished(tmp_path)
    ended = together(["pretrain", "--resume", str(run)])
    assert codes(ended) == [0, 0], ended
    assert not differences(left(run), whole)


def break_data(rank: int) -> None:
    """The second process can't decode its share of the third batch."""
    import qat.data.split
    from qat.errors import DataError

    load = qat.data.split.MemorySplit._load

    def broken(split: Any, batches: Any) -> Any:
        for number, batch in enumerate(load(split, batches)):
            if rank == 1 and number == 2:
                raise DataError("seven.png: cannot be decoded")
            yield batch

    qat.data.split.MemorySplit._load = broken  # type: ignore[method-assign]


def test_what_one_process_alone_can_not_do_ends_all_with_its_words(tmp_path: Path) -> None:
    first, second = together(arguments("pretrain", tmp_path, *LONG), break_data)
    assert (first.code, second.code) == (2, 2), (first, second)
    assert first.errors == ""
    assert second.errors == "error: seven.png: cannot be decoded\n"


@pytest.mark.exhaustive  # as a run with parts that goes on without, in tests/train/test_sharding.py
def test_a_run_goes_on_with_another_number_of_processes_and_says_so(tmp_path: Path) -> None:
    ended = together(arguments("pretrain", tmp_path, *LONG), partial(send, signal.SIGTERM, 0, 5))
    assert codes(ended) == [143, 143]
    said = alone(["pretrain", "--resume", str(unfinished(tmp_path))]).replace("\n", " ")
    assert "the number of processes was 2, is 1: the result can differ" in said


def test_shards_of_a_training_are_those_of_its_batches(tmp_path: Path) -> None:
    from qat.data.loading import load_split
    from qat.recipe.schema import Data

    split = load_split(Data(image_size=8), "train")
    whole = list(split.batches(100, shuffle_seed=3, drop_last=True, skip=2))
    found = []
    for rank in range(3):
        split.share = Share(rank, 3)
        found.append(list(split.batches(100, shuffle_seed=3, drop_last=True, skip=2)))
    split.share = Share()
    assert [len(part[0][1]) for part in found] == [33, 33, 34]
    for batch, *parts in zip(whole, *found, strict=True):
        for index in (0, 1):
            assert torch.equal(torch.cat([part[index] for part in parts]), batch[index])


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_accelerate_is_configured_for_and_this_can_not_do_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny_digits_pretrain").recipe
    monkeypatch.setenv(name, "true")
    check_parallel(recipe)  # alone
    refused = pytest.raises(RecipeError, match=r"accelerate is configured for .*, allowed: distributed data")
    with as_one_of(World(0, 2, 0)), refused:
        check_parallel(recipe)


# Launchers

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]


def launched(tmp_path: Path, *overrides: str) -> list[str]:
    """Arguments of a pretraining below ``tmp_path / "runs"`` that loads neither scikit-learn nor kornia."""
    images = image_folder(tmp_path / "images", train=4, test=2)
    data = ["data.dataset=imagefolder", f"data.root={json.dumps(str(images))}", "model.num_classes=2"]
    data += ["data.train_split=train", "data.test_split=validation", "data.batch_size=4", "data.augment={}"]
    return arguments("pretrain", tmp_path / "runs", *data, *overrides)


@pytest.mark.exhaustive  # see test_sharding.py, which starts accelerate
@pytest.mark.parametrize("launcher", [TORCHRUN, [*ACCELERATE, "--cpu"]], ids=["torchrun", "accelerate"])
def test_a_launcher_starts_a_training_that_is_told_of_once(launcher: list[str], tmp_path: Path) -> None:
    code, said, errors = by_launcher(launcher, launched(tmp_path, "schedule.epochs=1"), tmp_path)
    assert code == 0, errors
    assert len(rows(the_run(tmp_path / "runs"))) == 1
    assert re.findall(r"epoch 1/1", said) == ["epoch 1/1"]
    assert "Traceback" not in said + errors


@pytest.mark.slow
def test_torchrun_starts_a_training_and_passes_sigterm_on(tmp_path: Path) -> None:
    words = launched(tmp_path, "schedule.epochs=2000")
    code, said, errors = by_launcher(TORCHRUN, words, tmp_path, at="epoch 1/2000")
    assert code != 0
    assert said.count("epoch 1/2000") == 1
    assert errors.count("error: stopped by SIGTERM, everything is saved; go on with: qat pretrain") == 1
    record = newest_state(the_run(tmp_path / "runs"), print)
    assert record is not None
    assert record.record.epoch >= 1
