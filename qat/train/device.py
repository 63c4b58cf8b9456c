"""Sets the seed and the number of threads of a run, and chooses its device."""

from __future__ import annotations

import os

import torch

from qat.errors import RecipeError
from qat.recipe.schema import Recipe
from qat.system.collectives import world
from qat.system.memory import keep_pages
from qat.train.precision import check_precision


def begin(recipe: Recipe) -> torch.device:
    """Set the seed and the number of threads, let the process keep freed memory, and choose the device.

    Raises:
        RecipeError: the device doesn't exist, or doesn't support the recipe's precision.
    """
    torch.manual_seed(recipe.seed)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    keep_pages()
    device = choose_device(recipe.device)
    check_precision(recipe.precision, device)
    return device


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` means CUDA if there is a GPU, else the CPU.

    If several processes train together, each gets a GPU of its own.

    Raises:
        RecipeError: the device doesn't exist, or there are fewer GPUs than processes.
    """
    if world().size > 1:
        return _own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise RecipeError(f"device: {name!r} cannot be used here, which has {count} CUDA devices") from error
    return torch.device(name)


def _own_device(name: str) -> torch.device:
    """The device of this process among several. With ``accelerate launch --cpu``, ``auto`` means the CPU."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if name == "cpu" or (name == "auto" and (forced or not torch.cuda.is_available())):
        return torch.device("cpu")
    count, number = torch.cuda.device_count(), world().local_rank
    if name not in ("auto", "cuda"):
        raise RecipeError(
            f"device: found {name!r}, allowed with {world().size} processes: 'auto', 'cuda' or 'cpu'; each "
            "gets a GPU of its own"
        )
    if number >= count:
        raise RecipeError(
            f"device: this machine has {count} CUDA devices, and more processes than that were launched on it"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
