"""Mixed precision: which devices are refused, and what is computed in which type."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.errors import RecipeError
from qat.models.bnext import BNext, set_temperature
from qat.train.capture import Parts, capture, first_record, restore
from qat.train.finetuning import finetune
from qat.train.precision import autocast, check_precision, gradient_scaler, saves_no_time
from qat.train.state_file import newest_state, write_state
from qat.train.weight_average import LatestWeights
from tests.helpers import toy_runs as toyruns
from tests.helpers.toy_runs import Silent, fail, settings

CPU = torch.device("cpu")


def test_float16_is_refused_on_a_cpu_and_bfloat16_is_not() -> None:
    check_precision("float32", CPU)
    check_precision("bfloat16", CPU)
    with pytest.raises(RecipeError, match="precision: 'float16' needs CUDA, the device is 'cpu'; allowed"):
        check_precision("float16", CPU)


@pytest.mark.parametrize(
    ("machine", "capability", "warned"),
    [
        ("x86_64", "AVX2", True),
        ("AMD64", "DEFAULT", True),
        ("x86_64", "AVX512", False),
        ("aarch64", "DEFAULT", False),
    ],
)
def test_bfloat16_without_instructions_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, machine: str, capability: str, warned: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    message = saves_no_time("bfloat16", CPU)
    assert (message is not None) == warned
    assert message is None or ("no instructions" in message and "--set precision=float32" in message)
    assert isinstance(autocast("bfloat16", CPU), torch.autocast) != warned
    assert saves_no_time("float32", CPU) is None
    assert saves_no_time("bfloat16", torch.device("cuda")) is None


def test_a_run_in_float16_on_a_cpu_leaves_nothing(tmp_path: Path) -> None:
    words = settings([*toyruns.TOY, "precision=float16", f"output.dir={tmp_path / 'runs'}"])
    message = fail(2, "pretrain", "--recipe", "tiny_digits_pretrain", *words)
    assert "precision: 'float16' needs CUDA" in message
    assert not (tmp_path / "runs").exists()


def test_float32_costs_nothing_and_only_float16_needs_a_scaler() -> None:
    assert isinstance(autocast("float32", CPU), nullcontext)
    assert not gradient_scaler("float32", CPU).is_enabled()
    assert not gradient_scaler("bfloat16", CPU).is_enabled()
    assert gradient_scaler("float16", CPU).is_enabled()


@pytest.mark.parametrize("lacks", [False, True])
def test_bfloat16_is_near_float32_and_gives_gradients_in_float32(
    monkeypatch: pytest.MonkeyPatch, lacks: bool
) -> None:
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: lacks)
    model = BNext(10, widths=[8, 8, 16]).train()
    set_temperature(model, 1e-8)
    images = torch.randn(8, 3, 8, 8)
    plain = model(images)
    with autocast("bfloat16", CPU):
        half = model(images)
    assert half.dtype == torch.bfloat16
    assert not torch.equal(half.float(), plain)
    half.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_fine_tuning_with_fake_quantization_works_in_bfloat16(start: Path, tmp_path: Path) -> None:
    states, tops = {}, {}
    for precision in ("float32", "bfloat16"):
        loaded = toyruns.recipe(
            "tiny_int8",
            tmp_path / precision,
            "schedule.epochs=2",
            "schedule.calibration_batches=2",
            "data.batch_size=320",
            f"precision={precision}",
            checkpoint=start,
        )
        run = finetune(loaded, Silent())
        states[precision] = load_checkpoint(run.last).state
        tops[precision] = run.summary()["int8"]["top1"]
    assert abs(tops["float32"] - tops["bfloat16"]) < 5
    key = "fc.weight"
    assert not torch.equal(states["float32"][key], states["bfloat16"][key])
    assert torch.allclose(states["float32"][key], states["bfloat16"][key], atol=0.1)


def test_a_run_in_bfloat16_without_instructions_says_so(
    monkeypatch: pytest.MonkeyPatch, start: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    told = Silent()
    words = ["precision=bfloat16", "schedule.epochs=0", "schedule.calibration_batches=2"]
    finetune(toyruns.recipe("tiny_int8", tmp_path, *words, checkpoint=start), told)
    assert [warning for warning in told.warnings if "no instructions" in warning]


def test_the_scale_of_the_gradients_is_part_of_a_state(tmp_path: Path) -> None:
    parts = []
    for _ in range(2):
        model = BNext(10, widths=[8, 8, 16])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        parts.append(
            Parts(model, optimizer, scheduler, CPU, LatestWeights(model), gradient_scaler("float16", CPU))
        )
    before, after = parts
    assert before.scaler is not None
    assert after.scaler is not None
    before.scaler.scale(before.model(torch.randn(2, 3, 8, 8)).sum() * float("inf")).backward()
    before.scaler.step(before.optimizer)
    before.scaler.update()
    tensors, fields = capture(before)
    assert fields["scaler"]["scale"] == before.scaler.get_scale() < after.scaler.get_scale()
    recipe = toyruns.recipe("tiny_digits_pretrain", tmp_path).recipe
    write_state(tmp_path, first_record(recipe, {}, CPU).model_copy(update={"epoch": 1, **fields}), tensors, 1)
    state = newest_state(tmp_path, pytest.fail)
    assert state is not None
    restore(after, state)
    assert after.scaler.state_dict() == before.scaler.state_dict()
