"""Teachers: which images they get, how the answers of several are averaged, and which are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.data.augment import normalize
from qat.errors import RecipeError
from qat.recipe.loading import LoadedRecipe
from qat.train.finetuning import finetune
from qat.train.pretraining import pretrain
from qat.train.teachers import Input, Teacher, Teachers, load_teachers
from tests.helpers import toy_runs as toyruns
from tests.helpers.cases import slow
from tests.helpers.toy_runs import Silent, fail, finetune_arguments, settings

CPU = torch.device("cpu")
DIGITS = [str(digit) for digit in range(10)]
PIXELS = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recipe(out: Path, *overrides: str) -> LoadedRecipe:
    return toyruns.recipe("tiny_digits_pretrain", out, "schedule.epochs=1", *overrides)


class Fixed(nn.Module):
    """Answers with the same logits for every image, and remembers the images."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return self.logits.expand(len(images), -1)


def test_one_teacher_answers_with_its_own_logits_for_the_images_of_the_run() -> None:
    network = Fixed(1.0, 2.0)
    images = normalize(PIXELS, [0.5] * 3, [0.2] * 3)
    assert torch.equal(Teachers([Teacher(network)], 4.0)(PIXELS, images), network(images))
    assert network.seen[0] is images


def test_several_teachers_answer_with_the_weighted_mean_of_their_probabilities() -> None:
    logits, weights, temperature = [[3.0, 0.0, -1.0], [0.0, 5.0, 1.0]], [3.0, 1.0], 2.0
    teachers = Teachers(
        [Teacher(Fixed(*row), weight=w) for row, w in zip(logits, weights, strict=True)], temperature
    )
    answer = teachers(PIXELS, PIXELS)
    expected = sum(
        w / 4 * F.softmax(torch.tensor(row) / temperature, 0) for row, w in zip(logits, weights, strict=True)
    )
    assert torch.allclose(F.softmax(answer / temperature, 1), expected.expand(6, -1), atol=1e-6)


def test_a_teacher_is_given_its_own_normalization_and_size() -> None:
    network = Fixed(0.0, 1.0)
    Teachers([Teacher(network, Input([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], 16))], 1.0)(PIXELS, PIXELS)
    resized = F.interpolate(PIXELS, (16, 16), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(network.seen[0], normalize(resized, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))


# Checkpoints


def test_a_checkpoint_teaches_as_the_network_it_holds(start: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    loaded = recipe(tmp_path, f"distillation.teachers=['{start}']")
    teachers = load_teachers(loaded, DIGITS, CPU, Silent())
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        expected = build(load_checkpoint(start))(PIXELS)
        assert torch.equal(teachers(PIXELS, PIXELS), expected)
    assert not any(p.requires_grad for p in teachers.teachers[0].network.parameters())


def test_a_fine_tuned_network_teaches_too(start: Path, tmp_path: Path) -> None:
    tuned = finetune(toyruns.recipe("tiny_int8", tmp_path, "schedule.epochs=0", checkpoint=start), Silent())
    loaded = recipe(tmp_path, f"distillation.teachers=['{start}', '{tuned.best}']")
    assert load_teachers(loaded, DIGITS, CPU, Silent())(PIXELS, PIXELS).shape == (6, 10)


def test_classes_of_other_names_are_warned_of(start: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, f"distillation.teachers=['{start}']")
    for names, warnings in ((DIGITS, 0), (DIGITS[::-1], 1)):
        report = Silent()
        load_teachers(loaded, names, CPU, report)
        assert len(report.warnings) == warnings
    assert "its classes have other names" in report.warnings[0]


def test_a_teacher_of_other_classes_is_refused(start: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, f"distillation.teachers=['{start}']", "model.num_classes=4")
    with pytest.raises(RecipeError, match="found 10 classes, allowed: 4, those of the network"):
        load_teachers(loaded, DIGITS[:4], CPU, Silent())


def test_an_absent_teacher_is_refused_before_there_is_a_run(start: Path, tmp_path: Path) -> None:
    words = settings(
        [*toyruns.TOY, f"output.dir={tmp_path / 'runs'}", "distillation.teachers=[no.safetensors]"]
    )
    message = fail(2, "pretrain", "--recipe", "tiny_digits_pretrain", *words)
    assert "distillation.teachers: found no file 'no.safetensors'; looked for " in message
    assert not (tmp_path / "runs").exists()
    message = fail(2, *finetune_arguments(tmp_path / "runs", start, "distillation.teachers=['timm:']"))
    assert "distillation.teachers[0]: found 'timm:', allowed: the path of a checkpoint, or" in message


@pytest.mark.parametrize("task", [slow("pretrain"), "finetune"])
def test_teachers_change_training_and_are_named_absolutely(
    start: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start.parent)
    weights = []
    for teachers in ("[]", f"[{start.name}]", f"[{start.name}, {start.name}]"):
        overrides = [f"distillation.teachers={teachers}", "data.batch_size=480"]
        if task == "pretrain":
            run = pretrain(recipe(tmp_path, *overrides), Silent())
        else:
            null = ("distillation.teacher=null", "schedule.epochs=1", "schedule.calibration_batches=1")
            run = finetune(
                toyruns.recipe("tiny_int8", tmp_path, *null, *overrides, checkpoint=start), Silent()
            )
        weights.append(load_checkpoint(run.last).state["fc.weight"])
        assert (str(start) in (run.path / "recipe.yaml").read_text()) == (
            teachers != "[]" or task == "finetune"
        )
    if task == "pretrain":  # elsewhere the network before quantization is the teacher
        assert not torch.equal(weights[0], weights[1])
    # Twice the same teacher is the teacher.
    assert torch.allclose(weights[1], weights[2], atol=1e-3)


# timm, which these tests replace by a stand-in


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Put a module in timm's place that makes one network, or fails to."""

    def install(network: nn.Module | None = None, error: Exception | None = None) -> ModuleType:
        module: Any = ModuleType("timm")

        def create_model(name: str, pretrained: bool = False) -> nn.Module:
            module.asked = name, pretrained
            torch.rand(3)
            if error is not None:
                raise error
            assert network is not None
            return network

        module.create_model = create_model
        monkeypatch.setitem(sys.modules, "timm", module)
        return module

    return install


class Model(Fixed):
    """A stand-in for a model of timm, with its attributes."""

    num_classes = 10
    pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "input_size": (3, 12, 12)}  # noqa: RUF012


def test_a_model_of_timm_is_pretrained_and_given_what_its_settings_say(
    timm: Callable[..., ModuleType], tmp_path: Path
) -> None:
    network = Model(*range(10))
    module: Any = timm(network)
    before = torch.get_rng_state()
    loaded = recipe(tmp_path, "distillation.teachers=['timm:some_net.tag']")
    teachers = load_teachers(loaded, DIGITS, CPU, Silent())
    assert torch.equal(before, torch.get_rng_state())
    assert module.asked == ("some_net.tag", True)
    teachers(PIXELS, PIXELS)
    assert teachers.teachers[0].input == Input((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 12)
    assert network.seen[0].shape == (6, 3, 12, 12)
    assert not network.training


def test_other_weights_of_timm_have_another_hash(timm: Callable[..., ModuleType], tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "distillation.teachers=['timm:net']")
    hashes = set()
    for value in (0.0, 1.0):
        network = Model(*range(10))
        network.register_buffer("weight", torch.tensor([value]))
        timm(network)
        hashes.add(load_teachers(loaded, DIGITS, CPU, Silent()).sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (None, RuntimeError("Unknown model (net)"), "timm:net: timm cannot give it: Unknown model"),
        (None, OSError("no connection"), "timm:net: timm cannot give it: no connection"),
        (SimpleNamespace(pretrained_cfg={}), None, "timm:net: timm cannot give it"),
    ],
)
def test_what_timm_cannot_give_is_refused_in_its_words(
    timm: Callable[..., ModuleType], tmp_path: Path, network: Any, error: Any, message: str
) -> None:
    timm(network, error)
    with pytest.raises(RecipeError, match=message):
        load_teachers(recipe(tmp_path, "distillation.teachers=['timm:net']"), DIGITS, CPU, Silent())


def test_a_missing_timm_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    words = settings([*toyruns.TOY, f"output.dir={tmp_path / 'runs'}", "distillation.teachers=['timm:net']"])
    message = fail(2, "pretrain", "--recipe", "tiny_digits_pretrain", *words)
    assert "needs timm, which is not installed here; install it with: pip install timm" in message
    assert not (tmp_path / "runs").exists()
