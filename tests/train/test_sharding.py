"""Sharded networks: each process has a part of the network, and the result is that of one process."""

from __future__ import annotations

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.format import load_checkpoint
from qat.errors import RecipeError
from qat.models.bnext import BNext
from qat.nn.block import bounded
from qat.nn.layers import BinaryConv2d
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Optimizer, Recipe
from qat.system.collectives import as_one_of, world
from qat.system.launch import World
from qat.train.optimizer import make_optimizer
from qat.train.parallel import Parallel, check_parallel
from qat.train.sharding import (
    clamp_parts,
    copy_of,
    first_with_nan,
    full_tensor,
    is_sharded,
    local_part,
    part_like,
    shard,
    shards,
    whole_network,
)
from qat.train.state_file import newest_state
from qat.train.weight_average import ExponentialMovingAverage
from tests.helpers.joined_processes import (
    LONG,
    arguments,
    by_launcher,
    call,
    codes,
    rows,
    send,
    the_run,
    together,
)
from tests.helpers.killed_training import differences, timeless, unfinished
from tests.helpers.toy_networks import toy_images
from tests.helpers.toy_runs import qat, succeed
from tests.train.test_parallel import ACCELERATE, EVERYTHING, TORCHRUN, alone, launched, left, require_same

# See tests/train/test_parallel.py.
pytestmark = pytest.mark.xdist_group("sharding")

CPU = torch.device("cpu")
FSDP = "parallel=fsdp"
#: One block beside the stem, of the kind that has most layers: each tensor in parts takes its time.
SMALL = "model.widths=[8,16]"
#: As `LONG`, with an average of the weights, which lies in parts, too, and its statistics taken anew.
AVERAGED = (*LONG, SMALL, "schedule.ema=0.9", "schedule.reestimate_batch_norm=3")


def toy(widths: tuple[int, ...] = (8, 8, 16)) -> BNext:
    torch.manual_seed(0)
    return BNext(10, widths=widths).train()


def one_step(model: BNext) -> torch.optim.Optimizer:
    """Do a step of AdamW, with other images in each process."""
    optimizer = make_optimizer(model, Optimizer())
    network = Parallel(model, CPU)
    images = toy_images(4 * world().size)[world().share.of(4 * world().size)]
    network(images).square().mean().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return optimizer


# Whole and parts


def _of_two() -> dict[str, Any]:
    return {"held": _held(), "bounds": _kept_in_bounds(), "spoilt": _spoilt_parts()}


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    """What each of two processes found out about several sharded networks."""
    return call(_of_two)


def _held() -> dict[str, Any]:
    """Bytes that this process keeps in memory, by kind, and the bytes of the unsharded tensors."""
    model = toy()
    shard(model, CPU)
    average = ExponentialMovingAverage(model, 0.9)
    optimizer = one_step(model)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    kinds: dict[str, list[Tensor]] = {
        "weights": list(model.parameters()),
        "gradients": [value.grad for value in model.parameters() if value.grad is not None],
        "moments": moments,
        "average": list(average.network.parameters()),
    }
    assert not is_sharded(whole_network(model))
    return {
        kind: (_occupied([local_part(one) for one in held]), sum(one.nbytes for one in held))
        for kind, held in kinds.items()
    }


def _occupied(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors, of which a tensor may be a part."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def test_each_process_holds_its_share_of_weights_gradients_moments_and_average(
    of_two: list[dict[str, Any]],
) -> None:
    model = toy()
    optimizer = one_step(model)
    weights = sum(value.nbytes for value in model.parameters())
    used = sum(value.nbytes for value in model.parameters() if value.grad is not None)
    assert len(optimizer.state) < len(list(model.parameters()))
    everything = {"weights": weights, "gradients": used, "moments": 2 * used, "average": weights}
    first, second = (found["held"] for found in of_two)
    for kind, size in everything.items():
        (mine, of), (its, of_the_other) = first[kind], second[kind]
        assert of == of_the_other == size
        # Vectors of shape (1, C, 1, 1) have one row, which the first process has.
        assert mine + its <= 1.15 * size
        assert max(mine, its) < 0.6 * size, kind


def equal_and_apart(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal and lie in different places, if there are any."""
    return torch.equal(a, b) and (not a.numel() or a.data_ptr() != b.data_ptr())


def _parts() -> dict[str, Any]:
    plain, model = toy(), toy()
    shard(model, CPU)
    before = plain.state_dict()
    gathered = whole_network(model)
    cut = {name: part_like(before[name], value) for name, value in model.named_parameters()}
    average = copy_of(model)
    gathered.get_buffer("feature.0.bn1.running_mean").fill_(7.0)
    scalar = torch.ones(())
    return {
        "equal": all(torch.equal(value, before[key]) for key, value in gathered.named_parameters()),
        "keys": [*gathered.state_dict()] == [*before] == [*model.state_dict()],
        "frozen": not any(value.requires_grad for value in gathered.parameters()),
        "whole": all(torch.equal(full_tensor(value), before[key]) for key, value in model.named_parameters()),
        "cut": all(
            equal_and_apart(local_part(cut[key]), local_part(value))
            for key, value in model.named_parameters()
        ),
        "copied": all(
            equal_and_apart(local_part(mine), local_part(its))
            for mine, its in zip(average.parameters(), model.parameters(), strict=True)
        ),
        "buffers": float(model.get_buffer("feature.0.bn1.running_mean")[0]),
        "other_shape": part_like(scalar, model.fc.bias) is scalar,
        "random": torch.rand(1).item(),
    }


def test_parts_are_cut_and_put_together_without_a_loss_where_three_processes_do_not_divide_it() -> None:
    toy(), toy()
    expected = torch.rand(1).item()  # neither draws random numbers
    for found in call(_parts, size=3):
        assert found.pop("buffers") == 7.0
        assert found.pop("random") == expected
        assert all(found.values()), found


def test_a_whole_network_is_given_back_as_it_is() -> None:
    model = toy()
    assert not is_sharded(model)
    assert whole_network(model) is model
    weight = model.fc.weight
    assert local_part(weight).data_ptr() == full_tensor(weight).data_ptr() == weight.data_ptr()
    assert part_like(weight, weight) is weight


def _kept_in_bounds() -> tuple[float, list[float]]:
    model = toy()
    shard(model, CPU)
    with torch.no_grad():
        for parameter, _, highest in bounded(model):
            local_part(parameter).add_(10 * highest)
    network = Parallel(model, CPU)
    network(toy_images(4)).sum().backward()  # type: ignore[no-untyped-call]
    parts = [(local_part(parameter), highest) for parameter, _, highest in bounded(model)]
    return len(parts), [float((part - highest).abs().max()) for part, highest in parts if part.numel()]


def test_parts_are_kept_within_the_bounds_of_their_layers(of_two: list[dict[str, Any]]) -> None:
    for count, distances in (found["bounds"] for found in of_two):
        assert count == 2 * len([m for m in toy().modules() if isinstance(m, BinaryConv2d)])
        assert set(distances) == {0.0}


def test_bounds_are_those_that_layers_keep_in_a_training_pass() -> None:
    passed, bound = toy(), toy()
    for model in (passed, bound):
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(5.0)
    passed(toy_images(4))
    clamp_parts(bound)
    for (name, mine), its in zip(bound.named_parameters(), passed.parameters(), strict=True):
        assert torch.equal(mine, its), name


def _spoilt_parts() -> list[str | None]:
    model = toy()
    shard(model, CPU)
    found = [first_with_nan(model)]
    with torch.no_grad():
        part = local_part(model.fc.weight)
        if world().rank == 1:
            part[-1, -1] = torch.nan
    found.append(first_with_nan(model))
    with torch.no_grad():
        if world().rank == 0:
            local_part(model.prelu.weight)[0] = torch.nan
    return [*found, first_with_nan(model)]


def test_all_processes_learn_which_tensor_is_the_first_with_nan_whoever_has_that_part(
    of_two: list[dict[str, Any]],
) -> None:
    assert [found["spoilt"] for found in of_two] == [[None, "fc.weight", "prelu.weight"]] * 2


# Training


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process alone has pretrained; that it would share the network makes no difference to it."""
    out = tmp_path_factory.mktemp("alone")
    said = alone(arguments("pretrain", out, *EVERYTHING, SMALL, FSDP))
    assert "FSDP" not in said
    return the_run(out)


def test_two_processes_with_parts_pretrain_as_one_and_write_whole_checkpoints(
    start: Path, tmp_path: Path
) -> None:
    first, second = together(arguments("pretrain", tmp_path, *EVERYTHING, SMALL, FSDP))
    assert (first.code, second.code) == (0, 0), first.errors + second.errors
    assert "FSDP: each of 2 processes keeps its part of the network" in first.output
    assert second.output == second.errors == first.errors == ""
    run = the_run(tmp_path)
    require_same(run, start)
    kept = run / "best.safetensors"
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert json.loads(succeed("evaluate", kept, "--json"))["top1"] == summary["binary"]["top1"]
    assert load_checkpoint(kept).architecture == load_checkpoint(start / "best.safetensors").architecture
    state = newest_state(run, pytest.fail)
    assert state is not None
    assert state.record.sharded


@pytest.mark.slow
def test_alone_it_makes_no_difference(start: Path, tmp_path: Path) -> None:
    alone(arguments("pretrain", tmp_path, *EVERYTHING, SMALL))
    mine, its = (load_checkpoint(run / "last.safetensors").state for run in (start, the_run(tmp_path)))
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[key]) for key, value in mine.items())


@pytest.mark.slow
def test_in_bfloat16_parts_train_as_copies_do(tmp_path: Path) -> None:
    half = (*LONG, SMALL, "precision=bfloat16", "schedule.epochs=1", "schedule.temperature.share=0.5")
    for name in ("ddp", "fsdp"):
        ended = together(arguments("pretrain", tmp_path / name, *half, f"parallel={name}"))
        assert codes(ended) == [0, 0], ended
    (copies,), (parts,) = (rows(the_run(tmp_path / name)) for name in ("ddp", "fsdp"))
    assert parts["loss"] == pytest.approx(copies["loss"], rel=1e-3)


# Endings


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes with a sharded network leave that are not interrupted."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert codes(together(arguments("pretrain", out, *AVERAGED, FSDP))) == [0, 0]
    return left(the_run(out))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of a sharded network that SIGTERM stopped in its second epoch."""
    out = tmp_path_factory.mktemp("stopped")
    ended = together(arguments("pretrain", out, *AVERAGED, FSDP), partial(send, signal.SIGTERM, 1, 5))
    assert codes(ended) == [143, 143], ended
    (said,) = [one.errors for one in ended if one.errors]
    assert "stopped by SIGTERM, everything is saved; go on with: qat pretrain --resume" in said
    run = unfinished(out)
    assert (run / "state" / "00001-0000001.safetensors").exists()
    return run


@pytest.mark.slow
def test_a_stopped_run_that_is_killed_as_it_goes_on_with_parts_ends_with_the_same_bytes(
    undisturbed: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / stopped.name))
    # In the second step after it was stopped, of which the first leaves a state.
    ended = together(["pretrain", "--resume", str(run)], partial(send, signal.SIGKILL, 1, 2))
    assert (ended[0].code, ended[1].code) == (2, -signal.SIGKILL), ended
    assert (run / "state" / "00001-0000002.safetensors").exists()
    assert codes(together(["pretrain", "--resume", str(run)])) == [0, 0]
    assert not differences(left(run), undisturbed)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of one process alone that is not interrupted."""
    out = tmp_path_factory.mktemp("one")
    alone(arguments("pretrain", out, *AVERAGED))
    return rows(the_run(out))


def require_near(run: Path, expected: list[dict[str, Any]]) -> None:
    """The metrics of an undisturbed run, but for the order of sums, which may change an answer near a tie."""
    for mine, its in zip(rows(run), expected, strict=True):
        for key, value in timeless(its).items():
            one_answer = 100 / 360 if key.endswith("top1") else 0.0
            assert mine[key] == pytest.approx(value, rel=1e-4, abs=one_answer + 1e-6), key


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_run_with_parts_goes_on_without_and_says_so(
    processes: int, stopped: Path, by_one: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / stopped.name))
    ended = together(["pretrain", "--resume", str(run), "--set", "parallel=ddp"], size=processes)
    assert codes(ended) == [0] * processes, ended
    said = (ended[0].output + ended[0].errors).replace("\n", " ")
    assert "the sharing of the network was FSDP, is none: the result can differ" in said
    assert ("the number of processes was 2, is 1; " in said) == (processes == 1)
    require_near(run, by_one)


def test_a_run_of_one_process_goes_on_with_parts(by_one: list[dict[str, Any]], tmp_path: Path) -> None:
    ended = together(arguments("pretrain", tmp_path, *AVERAGED), partial(send, signal.SIGTERM, 0, 5), size=1)
    assert codes(ended) == [143], ended
    run = unfinished(tmp_path)
    ended = together(["pretrain", "--resume", str(run), "--set", FSDP])
    assert codes(ended) == [0, 0], ended
    said = (ended[0].output + ended[0].errors).replace("\n", " ")
    assert "the number of processes was 1, is 2; the sharing of the network was none, is FSDP" in said
    require_near(run, by_one)


# What is refused


def _recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, overrides).recipe


def test_where_processes_share_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asks = _recipe("tiny_digits_pretrain"), _recipe("tiny_digits_pretrain", FSDP)
    assert not shards(asks)  # alone
    with as_one_of(World(0, 2, 0)):
        assert shards(asks)
        assert not shards(plain)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        assert shards(plain)
        check_parallel(plain)


def test_what_is_refused_is_said_in_one_line_before_there_is_a_run(tmp_path: Path) -> None:
    ended = together(arguments("pretrain", tmp_path, *LONG, FSDP, "precision=float16"))
    assert codes(ended) == [2, 2]
    (said,) = [one.errors for one in ended if one.errors]
    assert said == "error: precision: found 'float16', allowed with FSDP: 'float32', 'bfloat16'\n"
    assert not list(tmp_path.iterdir())


def test_fine_tuning_with_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = qat("finetune", "--recipe", "tiny_int8", "--set", FSDP)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --set parallel=fsdp: parallel: found 'fsdp', allowed for task 'finetune': 'ddp' (quantized "
        "networks are trained whole)\n"
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_parallel(_recipe("tiny_int8"))  # alone
    refused = pytest.raises(
        RecipeError, match="configured for FSDP, allowed for `qat finetune`: distributed data"
    )
    with as_one_of(World(0, 2, 0)), refused:
        check_parallel(_recipe("tiny_int8"))


@pytest.mark.parametrize("name", ["FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"])
def test_options_of_accelerate_that_would_be_ignored_at_a_cost_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    with as_one_of(World(0, 2, 0)):
        check_parallel(_recipe("tiny_digits_pretrain", FSDP))  # torchrun knows nothing of it
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(RecipeError, match=name):
            check_parallel(_recipe("tiny_digits_pretrain"))


# Launchers


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        # Which starts a training in tests/train/test_parallel.py.
        pytest.param(TORCHRUN, [FSDP], marks=pytest.mark.exhaustive),
        # accelerate itself is loaded for a tracker.
        ([*ACCELERATE, "--use_fsdp"], ["tracking.trackers=[tensorboard]"]),
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.slow
def test_a_launcher_starts_a_training_with_parts_that_is_told_of_once(
    launcher: list[str], changes: list[str], tmp_path: Path
) -> None:
    words = launched(tmp_path, SMALL, "schedule.epochs=1", *changes)
    code, said, errors = by_launcher(launcher, words, tmp_path)
    assert code == 0, errors
    assert re.findall("FSDP: each of 2 processes|epoch 1/1", said) == [
        "FSDP: each of 2 processes",
        "epoch 1/1",
    ]
    assert "Traceback" not in said + errors
