"""Fixtures that several test files share: a toy network whose every part has something to do."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from qat.models.bnext import BNext, set_temperature
from qat.native.bindings import torch_alone, usable
from qat.nn.layers import BinaryConv2d, SqueezeExcitation
from qat.nn.sub_block import SubBlock
from qat.quantize.calibration import calibrate
from qat.recipe.schema import Quantization, TrunkGroup
from tests.helpers.toy_runs import finetune_arguments, pretrain_toy, succeed, tuned

# The first call into torch, and any call on a busy machine, can outlast a deadline.
settings.register_profile("qat", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("qat")

#: Stem, a block that stays, one that doubles (stride 2), one that stays, one that doubles.
TOY_WIDTHS = (8, 8, 16, 16, 32)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let one worker run the tests of a group: xdist 3.8 names it where pytest 9.2 no longer looks.

    Nothing says so; the tests are merely spread, and each worker makes what they share (pytest-xdist#1386).
    """
    if not config.getoption("loadgroup", False):
        return
    for item in items:
        groups = "_".join(sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")}))
        if groups and hasattr(item, "_id") and not item.nodeid.endswith(f"@{groups}"):
            item._id = type(item._id).parse(f"{item.nodeid}@{groups}")


# onnxruntime starts a thread per core, which spins while it waits: two workers would hinder each other.
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Timings and results that don't depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def with_report() -> None:
    """Let `qat finetune` write its report in this test."""


@pytest.fixture(autouse=True)
def _without_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report, which takes longer than a toy's training, where a test doesn't ask for it."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("qat.cli.training._report", lambda run: None)


def need_passes() -> None:
    """Skip the test where users can do without the native library; fail where it is required, as in CI."""
    if not usable(torch.ones(1)):
        missing = "the native library is not built, or finds no threads"
        if os.environ.get("BNEXT_QAT_NATIVE") == "require":
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(params=["native", "torch"])
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test with passes of the native library, and with torch's operators."""
    if request.param == "torch":
        with torch_alone():
            yield
        return
    need_passes()
    yield


def toy_images(count: int = 16, seed: int = 1) -> Tensor:
    """Normalized images (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give a float network non-trivial parameters and the batch statistics of some images, in place."""
    random = torch.Generator().manual_seed(seed)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=random) * (high - low) + low)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform_(module.weight, 0.5, 1.5)
                uniform_(module.bias, -0.3, 0.3)
            elif isinstance(module, nn.PReLU):
                uniform_(module.weight, 0.1, 0.4)
            elif isinstance(module, BinaryConv2d | nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                uniform_(module.weight, -bound, bound)
            if isinstance(module, SubBlock):
                uniform_(module.move.bias, -0.5, 0.5)
                if module.infor_recoupling:
                    uniform_(module.scale, 0.1, 0.9)
            if isinstance(module, SqueezeExcitation):
                # A toy's hidden layer is one or two units wide: positive biases keep them from dying.
                uniform_(module.se[1].bias, 0.3, 0.9)
                uniform_(module.se[3].bias, -0.5, 0.5)
        for norm in norms:
            norm.momentum = 1.0
        training = model.training
        model.train()
        model(toy_images(64, seed=seed + 100))
        model.train(training)
        for norm in norms:
            norm.momentum = 0.1


def build_float_toy(temperature: float = 1e-8, seed: int = 0, **options: object) -> BNext:
    """A lively float network with 10 classes, in evaluation mode."""
    torch.manual_seed(seed)
    options.setdefault("widths", TOY_WIDTHS)
    model = BNext(10, **options)  # type: ignore[arg-type]
    set_temperature(model, temperature)
    enliven(model, seed)
    return model.eval()


def build_toy(quant: object = True, seed: int = 0, **options: object) -> BNext:
    """The quantized, calibrated network with the parameters of :func:`build_float_toy`, evaluating."""
    torch.manual_seed(seed)
    state = build_float_toy(seed=seed, **options).state_dict()
    options.setdefault("widths", TOY_WIDTHS)
    if quant is True:  # with ranges that go on moving in training
        quant = Quantization(trunk=TrunkGroup(observer="moving_average"))
    model = BNext(10, quant=quant, **options)  # type: ignore[arg-type]
    model.load_state_dict(state)
    calibrate(model, lambda: model(toy_images(64, seed=2)))
    return model.eval()


@pytest.fixture
def make_float_toy() -> Callable[..., BNext]:
    return build_float_toy


@pytest.fixture
def make_toy() -> Callable[..., BNext]:
    return build_toy


@pytest.fixture(scope="session")
def _toys() -> tuple[BNext, BNext]:
    return build_float_toy(), build_toy()


@pytest.fixture
def float_toy(_toys: tuple[BNext, BNext]) -> BNext:
    """A float network of this test's own."""
    return copy.deepcopy(_toys[0])


@pytest.fixture
def toy(_toys: tuple[BNext, BNext]) -> BNext:
    """A prepared and calibrated network of this test's own, with the parameters of ``float_toy``."""
    return copy.deepcopy(_toys[1])


@pytest.fixture
def images() -> Tensor:
    """Normalized images (16, 3, 16, 16)."""
    return toy_images()


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binary checkpoint of a toy's pretraining, in the folder of its run. To be read only."""
    return pretrain_toy(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def toys(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``float.safetensors``, a run below ``runs``, and its ``model.onnx``. To be read only."""
    folder = tmp_path_factory.mktemp("toys")
    shutil.copy(start, folder / "float.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.cli.training._report", lambda run: None)
        succeed(*finetune_arguments(folder / "runs", folder / "float.safetensors"))
    succeed("export", "--onnx", folder / "model.onnx", "--runs", folder / "runs")
    return folder


@pytest.fixture(scope="session")
def reported(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on a copy of the run of ``toys``, in that copy's folder. To be read only."""
    run = shutil.copytree(tuned(toys).parent, tmp_path_factory.mktemp("reported") / "run")
    succeed("report", run)
    return Path(run) / "report.html"
