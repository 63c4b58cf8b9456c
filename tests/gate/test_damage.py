"""The gate against damage to the network that ships: what a broken kernel or a wrong scale would do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork

from qat.commands.lowering import Source, build_and_lower, load
from qat.recipe.loading import load_recipe
from qat.train.finetuning import finetune
from tests.helpers.network_changes import changed
from tests.helpers.toy_runs import Silent, qat, succeed

# One process: each would calibrate a network for itself.
pytestmark = pytest.mark.xdist_group("damage")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> IntegerNetwork:
    """BNext-Tiny on the digits in int8, calibrated only, lowered."""
    out = json.dumps(str(tmp_path_factory.mktemp("runs")))
    schedule = ["schedule.epochs=0", "schedule.calibration_batches=2"]
    short = [f"output.dir={out}", *schedule, "threads=1", "device=cpu"]
    run = finetune(load_recipe("tiny_int8", short), Silent())
    _, lowered = build_and_lower(*load(Source(run.path, None), None))
    return lowered


@pytest.fixture(scope="module")
def baseline(network: IntegerNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    succeed("gate", "record", _written(network, folder), "-o", folder / "baseline.json")
    return folder / "baseline.json"


def _written(network: IntegerNetwork, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(emit_portable(network).SerializeToString())
    return path


def flip(count: int) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Flips ``count`` sign bits at random places; no weight twice."""

    def flipped(sign_bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        bits = np.unpackbits(sign_bits)
        bits[np.random.default_rng(1).choice(bits.size, count, replace=False)] ^= 1
        return np.packbits(bits)

    return flipped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "damage"),
    [
        # 500 of the 1,024 weights of the first 1×1 convolution.
        ("blocks.0.pointwise.0.conv.sign_bits", flip(500)),
        # The attention of the first 3×3 sub-block has no effect.
        ("blocks.0.spatial.attention.gain", np.zeros_like),
    ],
    ids=["signs", "se_scale"],
)
def test_a_damaged_network_is_caught(
    network: IntegerNetwork,
    baseline: Path,
    tmp_path: Path,
    field: str,
    damage: Callable[[NDArray[np.generic]], NDArray[np.generic]],
) -> None:
    damaged = _written(changed(copy.deepcopy(network), field, damage), tmp_path)
    result = qat("gate", damaged, "--baseline", baseline, "--json")
    assert "error: fail: top-1 fell by" in result.stderr
    found = json.loads(result.stdout)
    assert (result.exit_code, found["verdict"]) == (1, "fail")
    assert found["change_at_most"] < -1  # it is the paired comparison that finds it: no floor is set


@pytest.mark.slow
def test_the_network_itself_and_an_unseen_change_pass(
    network: IntegerNetwork, baseline: Path, tmp_path: Path
) -> None:
    """300 of 2.4 million signs of the twelfth 3×3 convolution change no answer, so no gate can see them."""
    untouched = _written(network, tmp_path)
    assert "pass: the same file as the baseline's" in succeed("gate", untouched, "--baseline", baseline)
    field = "blocks.11.spatial.conv.sign_bits"
    unseen = _written(changed(network, field, flip(300)), tmp_path)
    printed = succeed("gate", unseen, "--baseline", baseline)
    assert "pass: the same images are right as the baseline's: 0 of 360 changed sides" in printed
