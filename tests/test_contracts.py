"""Import rules that lint-imports doesn't check: in function bodies, and for what a process really loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted(path for package in ("qat", "export") for path in (ROOT / package).rglob("*.py"))


def torch_ao_uses(source: str) -> list[int]:
    """Lines that import ``torch.ao`` (or its old names) or reach it through ``torch``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names = [node.value]  # importlib.import_module("torch.ao")
        if any(f"{name}.".startswith(("torch.ao.", "torch.quantization.")) for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import torch.ao.quantization",
        "from torch import ao",
        "def f():\n    from torch.ao.quantization import FakeQuantize",
        "import torch\nx = torch.ao.quantization.FakeQuantize",
        "import torch.quantization",
        "import importlib\nimportlib.import_module('torch.ao')",
    ],
)
def test_every_way_to_torch_ao_is_seen(source: str) -> None:
    assert torch_ao_uses(source) != []


@pytest.mark.parametrize(
    "source", ["import torch", "from torch import nn", "from qat import torch_ao", "x.ao"]
)
def test_nothing_else_is_taken_for_torch_ao(source: str) -> None:
    assert torch_ao_uses(source) == []


def test_torch_ao_is_imported_by_its_adapter_alone() -> None:
    assert len(SOURCES) > 20
    users = {path.relative_to(ROOT).as_posix() for path in SOURCES if torch_ao_uses(path.read_text("utf-8"))}
    assert users == {"qat/quantize/observers.py"}


def loaded_by(module: str) -> set[str]:
    """Top-level packages in memory once a fresh process has imported ``module``."""
    script = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "export")])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["qat_export", "qat_export.integer.network", "qat_export.integer.reference", "qat.quantize.dyadic"],
)
def test_description_and_interpreter_load_no_torch(module: str) -> None:
    assert not loaded_by(module) & {"torch", "onnx", "onnxruntime"}


def test_the_portable_target_loads_no_torch() -> None:
    assert "torch" not in loaded_by("qat_export.graphs.portable")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("qat") & {"torch", "numpy", "onnx", "pydantic", "kornia", "datasets"}
