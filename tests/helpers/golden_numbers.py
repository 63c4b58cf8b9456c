"""The rule that fills a BNext with reproducible values, and the numbers the authors' network gave for it.

Every value depends on the state-dict key and its shape alone: a PCG64 generator seeded with the CRC-32 of the
key draws it, from a distribution that the key's last two parts choose. Both networks can so be filled alike
without sharing code. The numbers lie in ``golden/bnext_tiny.json``, rounded to 13 significant digits.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).parents[1] / "golden" / "bnext_tiny.json"
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed=zlib.crc32(name.encode("ascii"))))


def spread(deviation: float) -> Draw:
    """Normal values around 0."""
    return lambda random, shape: deviation * random.standard_normal(shape)


def between(low: float, high: float) -> Draw:
    """Uniform values."""
    return lambda random, shape: random.uniform(low, high, shape)


def one_over_fan_in(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values that keep the size of a weighted sum."""
    return random.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1))


#: By "owner.leaf", then by "*.leaf", then by "owner.*"; the first that is found draws.
DRAWS: dict[str, Draw] = {
    "norm1.running_var": lambda random, shape: 100.0 * random.uniform(0.5, 1.5, shape),
    "*.running_var": between(0.5, 1.5),
    "*.running_mean": spread(0.1),
    "*.scale": between(0.0, 1.0),
    "move.bias": spread(0.3),
    **{f"{norm}.weight": between(0.5, 1.5) for norm in ("bn1", "norm1", "norm2")},
    **{f"{prelu}.weight": between(0.1, 0.4) for prelu in ("prelu", "activation1", "activation2")},
    "binary_conv.weight": spread(0.5),
    "*.bias": spread(0.1),
    "*.weight": one_over_fan_in,
}


def value(key: str, shape: tuple[int, ...]) -> Tensor:
    """Value of one parameter or buffer (temperatures aside): float64, or int64 for a counter."""
    owner, leaf = ["", *key.split(".")][-2:]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    draw = DRAWS.get(f"{owner}.{leaf}") or DRAWS[f"*.{leaf}"]
    return torch.from_numpy(np.asarray(draw(generator(key), shape)))


def fill(model: nn.Module, temperature: float, known: dict[tuple[str, tuple[int, ...]], Tensor]) -> None:
    """Fill ``model`` in place. ``known`` keeps what was drawn, for the next network of the same shapes."""
    state = {}
    for key, old in model.state_dict().items():
        shape = tuple(old.shape)
        if key.endswith(".temperature"):
            state[key] = torch.full(shape, temperature, dtype=torch.float64)
            continue
        if (key, shape) not in known:
            known[key, shape] = value(key, shape)
        state[key] = known[key, shape]
    model.load_state_dict(state)


def images(num_classes: int) -> Tensor:
    """Two images, float64: 64×64 for 1000 classes, else 32×32."""
    side = 64 if num_classes == 1000 else 32
    return torch.from_numpy(generator("input").standard_normal((2, 3, side, side)))


@dataclass(frozen=True)
class Golden:
    """The file's content.

    Attributes:
        cases: ``num_classes``, ``temperature``, ``eval_logits`` (of 1000 classes the first 100) and, for the
            networks that were trained a step, ``train_logits`` and ``train_loss`` (mean squared logit).
        shapes: state-dict key → shape, BNext-Tiny, 1000 classes.
        gradients: L2 norm of each parameter's gradient by temperature; None where there is none.
    """

    cases: list[dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    gradients: dict[float, dict[str, float | None]]


def load() -> Golden:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    rows = content["state"]
    trained = [case["temperature"] for case in content["cases"] if "train_loss" in case]
    return Golden(
        cases=content["cases"],
        shapes={key: tuple(row[0]) for key, row in rows.items()},
        gradients={
            temperature: {key: row[1 + column] for key, row in rows.items() if len(row) > 1}
            for column, temperature in enumerate(trained)
        },
    )
