"""The network that a run starts from: classes, classifier and stem stride, and what the run says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build, load_state
from qat.data.split import MemorySplit
from qat.errors import CheckpointError, DataError
from qat.models.bnext import BNext, binary_convolutions
from qat.recipe.loading import LoadedRecipe, load_recipe
from qat.recipe.schema import FLOAT_EPOCHS
from qat.train.starting_point import StartingPoint, starting_point
from tests.helpers import checkpoints
from tests.helpers.toy_runs import Silent

WIDTHS = list(checkpoints.WIDTHS)


def images(classes: int, count: int = 40) -> MemorySplit:
    names = [f"class {number}" for number in range(classes)]
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return MemorySplit(names, pixels, torch.arange(count) % classes)


def recipe(checkpoint: Path, **model: Any) -> LoadedRecipe:
    settings = {"widths": WIDTHS, "num_classes": None, "checkpoint": str(checkpoint), **model}
    loaded = load_recipe("tiny_int8")
    section = type(loaded.recipe.model).model_validate(settings)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"model": section}))


def start(checkpoint: Path, classes: int, **model: Any) -> tuple[StartingPoint, Silent]:
    report = Silent()
    return starting_point(recipe(checkpoint, **model), images(classes), report), report


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A binary network of ten classes, in this project's format."""
    path = tmp_path / "ours.safetensors"
    save_checkpoint(path, checkpoints.toy(), recipe=None)
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Weights of 1000 classes in the authors' format."""
    path = tmp_path / "published.pth.tar"
    torch.save(checkpoints.prefixed(checkpoints.toy(num_classes=1000).state_dict()), path)
    return path


def test_other_classes_start_the_classifier_anew_and_keep_everything_else(published: Path) -> None:
    point, report = start(published, 3)
    assert point.new_classifier
    assert point.network.architecture.num_classes == point.recipe.model.num_classes == 3
    assert [line for line in report.messages if "starts anew" in line] == [
        f"{published}: the classifier starts anew: its classifier tells 1000 classes apart, the images have 3"
    ]
    state, expected = point.network.state_dict(), checkpoints.toy(num_classes=1000).state_dict()
    for key, value in state.items():
        assert key.startswith("fc.") or torch.equal(value, expected[key]), key
    assert state["fc.weight"].shape == (3, WIDTHS[-1])


def test_the_bodys_signs_are_the_checkpoints(published: Path) -> None:
    point, _ = start(published, 3)
    theirs = load_checkpoint(published).state
    for name, convolution in binary_convolutions(point.network).items():
        assert torch.equal(convolution.weight >= 0, theirs[f"{name}.weight"] >= 0)
        assert convolution.is_binary()


@pytest.mark.parametrize(("choice", "anew"), [("auto", False), ("keep", False), ("new", True)])
def test_as_many_classes_keep_the_classifier_unless_a_new_one_is_asked_for(
    ours: Path, choice: str, anew: bool
) -> None:
    point, report = start(ours, 10, classifier=choice)
    assert point.new_classifier is anew
    same = torch.equal(point.network.fc.weight, checkpoints.toy().fc.weight)
    assert same is not anew
    assert any("as model.classifier asks" in line for line in report.messages) is anew


def test_a_classifier_to_keep_must_fit(ours: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tells 10 classes apart.* 3, .* 'auto' or 'new'"):
        start(ours, 3, classifier="keep")


def test_the_choices_are_written_into_the_recipe(published: Path) -> None:
    """So that the run can be repeated from its folder."""
    model = start(published, 3)[0].recipe.model
    assert (model.num_classes, model.stem_stride, model.classifier) == (3, 2, "new")
    again = start(published, 3, classifier="new", num_classes=3, stem_stride=2)[0]
    assert again.recipe.model == model


@pytest.mark.parametrize(("asked", "epochs"), [(None, FLOAT_EPOCHS), (0, 0), (2, 2)])
def test_a_new_classifier_is_trained_in_float_first_by_default(
    published: Path, asked: int | None, epochs: int
) -> None:
    loaded = recipe(published)
    schedule = loaded.recipe.schedule.model_copy(update={"float_epochs": asked})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"schedule": schedule}))
    point = starting_point(loaded, images(3), Silent())
    assert point.float_epochs == point.recipe.schedule.float_epochs == epochs


def test_a_kept_classifier_needs_no_training_in_float(ours: Path) -> None:
    assert start(ours, 10)[0].float_epochs == 0


# Stem stride


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize(("theirs", "stride"), [(1000, 2), (7, 1)])
def test_the_stride_follows_the_checkpoints_classes_and_never_ones_own(
    tmp_path: Path, theirs: int, stride: int, classes: int
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(checkpoints.toy(num_classes=theirs).state_dict(), path)
    report = Silent()
    point = starting_point(recipe(path), images(classes, 1000), report)
    assert point.network.architecture.stem_stride == stride


@pytest.mark.parametrize("stride", [1, 2])
def test_a_recorded_stride_is_kept_and_a_recipes_goes_before(tmp_path: Path, stride: int) -> None:
    path = tmp_path / "ours.safetensors"
    save_checkpoint(path, checkpoints.toy(stem_stride=stride), recipe=None)
    assert start(path, 3)[0].network.architecture.stem_stride == stride
    other = 3 - stride
    point, report = start(path, 3, stem_stride=other)
    assert point.network.architecture.stem_stride == other
    assert f"{path}: was trained with stem stride {stride}, model.stem_stride is {other}" in report.warnings


# Classes from the data


def test_more_classes_than_images_are_refused(ours: Path) -> None:
    many = MemorySplit(list(map(str, range(5000))), torch.zeros(40, 1, 8, 8), torch.arange(40))
    with pytest.raises(DataError, match=r"5,000 classes, but only 40 training images.*data\.label_column"):
        starting_point(recipe(ours), many, Silent())


def test_a_single_class_is_refused(ours: Path) -> None:
    with pytest.raises(DataError, match="the data has 1 class, 'class 0'; a classifier needs at least 2"):
        start(ours, 1)


def test_classes_of_other_names_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    save_checkpoint(path, checkpoints.toy(), recipe=None, metadata={"class_names": '["a", "b"]'})
    _, report = start(path, 10)
    (warning,) = report.warnings
    assert "other names than those of the images" in warning
    assert "model.classifier=new" in warning


# Files that hold more than one network, or half of one


def test_which_of_several_weights_were_taken_is_said_and_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "several.pth"
    average = checkpoints.toy().state_dict() | {"fc.bias": torch.zeros(10)}
    torch.save({"state_dict": checkpoints.toy().state_dict(), "state_dict_ema": average}, path)
    point, report = start(path, 10)
    assert torch.equal(point.network.fc.bias, torch.zeros(10))
    assert report.messages == [
        f"{path}: its weights are those of state_dict_ema, an average, as is usual for evaluation; it also "
        "holds state_dict (model.state_key takes another)"
    ]
    point, report = start(path, 10, state_key="state_dict")
    assert torch.equal(point.network.fc.bias, checkpoints.toy().fc.bias)
    assert report.messages == []
    assert point.recipe.model.state_key == "state_dict"
    with pytest.raises(
        CheckpointError, match=r"model\.state_key: found 'ema', the file has: state_dict, state"
    ):
        start(path, 10, state_key="ema")


def test_a_backbone_is_given_a_classifier_of_the_images(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    state = checkpoints.toy().state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, path)
    point, report = start(path, 3)
    assert (point.new_classifier, point.recipe.model.num_classes) == (True, 3)
    assert report.messages == [
        f"{path}: doesn't tell its stem stride; 2 is taken, as for 1000 classes (set another with "
        "model.stem_stride)",
        f"{path}: the classifier starts anew: it has no classifier, the images have 3",
    ]
    assert torch.equal(point.network.state_dict()["prelu.weight"], state["prelu.weight"])
    with pytest.raises(
        CheckpointError, match=r"it has no classifier, the images have 3, and model\.classifier"
    ):
        start(path, 3, classifier="keep")


# In Python


@pytest.mark.parametrize("as_state", [True, False], ids=["state dict", "checkpoint"])
def test_a_state_is_loaded_into_a_network_of_other_classes(published: Path, as_state: bool) -> None:
    checkpoint = load_checkpoint(published)
    model = BNext(3, widths=WIDTHS, stem_stride=2)
    before = model.fc.weight.clone()
    load_state(model, checkpoint.state if as_state else checkpoint, classifier="new")
    assert torch.equal(model.fc.weight, before)
    whole = build(checkpoint).state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, whole[key]), key


def test_a_state_of_other_classes_does_not_fit_unless_its_classifier_is_left_out(published: Path) -> None:
    model = BNext(3, widths=WIDTHS, stem_stride=2)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_state(model, load_checkpoint(published))
