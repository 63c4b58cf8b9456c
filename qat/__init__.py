"""Quantization-aware fine-tuning of binary BNext networks.

The public names are loaded when they are first asked for, so that ``import qat`` takes no time; types are in
``__init__.pyi``.
"""

import importlib

__version__ = "0.2.0"

#: Module of each public name.
_PLACES = {
    "Architecture": "qat.models.bnext",
    "BNext": "qat.models.bnext",
    "QatError": "qat.errors",
    "Quantization": "qat.recipe.schema",
    "Recipe": "qat.recipe.schema",
    "calibrate": "qat.api.networks",
    "evaluate": "qat.api.runs",
    "export_onnx": "qat.api.exports",
    "finetune": "qat.api.runs",
    "freeze": "qat.api.networks",
    "load": "qat.api.networks",
    "load_recipe": "qat.recipe.loading",
    "load_state": "qat.checkpoints.loading",
    "prepare": "qat.api.networks",
    "pretrain": "qat.api.runs",
    "quantization_map": "qat.quantize.preparation",
    "save": "qat.api.networks",
    "verify": "qat.api.exports",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name):
    if name not in _PLACES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
