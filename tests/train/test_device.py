"""The device of a run: the one that the recipe names, and a GPU of its own for each of several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qat.errors import RecipeError
from qat.system.collectives import as_one_of
from qat.system.launch import World
from qat.train.device import choose_device


@pytest.fixture
def third_of_four(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One of four processes on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with as_one_of(World(2, 4, 2)):
        yield monkeypatch


def test_each_process_gets_the_gpu_of_its_number_on_its_machine(third_of_four: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    third_of_four.setattr(torch.cuda, "set_device", chosen.append)
    with as_one_of(World(2, 4, 1)):
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert chosen == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1", "device: found 'cuda:1', allowed with 4 processes: 'auto', 'cuda' or 'cpu'"),
        ("auto", "device: this machine has 2 CUDA devices, and more processes than that were launched on it"),
    ],
)
def test_a_gpu_that_a_process_can_not_have_is_refused(
    third_of_four: pytest.MonkeyPatch, name: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_device(name)


def test_processes_can_be_told_to_use_processors(third_of_four: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    third_of_four.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device("auto") == torch.device("cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        choose_device("cuda:99")
    found = torch.cuda.device_count()
    assert str(caught.value) == f"device: 'cuda:99' cannot be used here, which has {found} CUDA devices"
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
