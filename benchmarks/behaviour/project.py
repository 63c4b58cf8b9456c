"""All imports from the project, after its version has been replaced by 0."""

# The version is written into checkpoints and exported models. Modules read it when they are imported, so it
# is replaced before that.
# ruff: noqa: E402
from pathlib import Path
from typing import Final

import qat

VERSION: Final = "0"
qat.__version__ = VERSION
#: Folder of the repository, or the one that the package is installed in.
ROOT: Final = Path(qat.__file__).resolve().parents[1]

from qat.cli import main
from qat.models.bnext import WIDTHS, BNext, binary_convolutions, set_temperature
from qat.native.bindings import torch_alone
from qat.native.library import has_library, kernels_in_use
from qat.quantize.calibration import calibrate
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Quantization
from qat.train.finetuning import finetune
from qat.train.precision import autocast

__all__ = [
    "ROOT",
    "VERSION",
    "WIDTHS",
    "BNext",
    "Quantization",
    "autocast",
    "binary_convolutions",
    "calibrate",
    "finetune",
    "has_library",
    "kernels_in_use",
    "load_recipe",
    "main",
    "set_temperature",
    "torch_alone",
]
