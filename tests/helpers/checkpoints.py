"""Toy networks and the checkpoint files that several test files make of them."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from qat.checkpoints.format import save_checkpoint
from qat.models.bnext import BNext, set_temperature
from qat.quantize.calibration import calibrate
from qat.recipe.loading import parse_recipe
from qat.recipe.schema import Quantization, Recipe

WIDTHS = (8, 8, 16, 16)
CONV = "feature.1.Attention.binary_conv.weight"


def toy(quant: bool | Quantization = False, binary: bool = True, **options: Any) -> BNext:
    torch.manual_seed(0)
    model = BNext(**{"num_classes": 10, "widths": WIDTHS, **options}, quant=quant)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean", "running_var")) and tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    if binary:
        set_temperature(model, 1e-9)
    return model.eval()


def calibrated(quantization: Quantization | None = None, **options: Any) -> BNext:
    model = toy(quantization or Quantization(), **options)

    def forward() -> None:
        model(images())

    calibrate(model, forward)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def recipe() -> Recipe:
    mapping = {
        "task": "finetune",
        "model": {"checkpoint": "start.safetensors", "widths": list(WIDTHS)},
        "data": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "quantization": {},
    }
    return parse_recipe(mapping, "test")


def prefixed(state: dict[str, Tensor]) -> collections.OrderedDict[str, Tensor]:
    return collections.OrderedDict((f"module.{key}", value) for key, value in state.items())


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, object]:
    return {
        "epoch": 511,
        "state_dict": prefixed(state),
        "best_top1_acc": np.float64(72.4),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [],
        },
        "temp": torch.tensor(1e-9),
        "alpha": 0.5,
        "losses": [1.0, np.float32(0.5)],
    }


def with_clip_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "feature.0.conv1.activation_clip_val": torch.ones(1), "fc.scale": torch.ones(1)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def all_files(folder: Path) -> list[Path]:
    save_checkpoint(folder / "ours", toy(widths=(2, 2, 4)), recipe=recipe())
    save_checkpoint(folder / "prepared", toy(True, widths=(2, 2)), recipe=recipe())
    state = toy(widths=(2, 2)).state_dict()
    torch.save(prefixed(state), folder / "zip")
    torch.save(training_checkpoint(state), folder / "training")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "plain")
    return sorted(folder.iterdir())
