"""Peak memory of a model in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from qat_export.bench.peak_memory import own_peak_rss_bytes, peak_rss_bytes

from qat.errors import CheckpointError
from qat.system.child_process import run_isolated
from tests.helpers.tiny_models import image_model, weighty_model

REQUEST = {"threads": 1, "batch": 1, "resolution": None, "seed": 0}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_the_weights_of_a_model_count(tmp_path: Path) -> None:
    small = peak_rss_bytes(image_model(tmp_path / "small.onnx"))
    large = peak_rss_bytes(weighty_model(tmp_path / "large.onnx", 12_288 * 1000))
    assert small is not None
    assert large is not None
    assert large - small > 4 * 12_288 * 1000


def test_a_batch_counts(tmp_path: Path) -> None:
    model = image_model(tmp_path / "model.onnx", ("batch", 3, 256, 256))
    one, many = (peak_rss_bytes(model, batch=batch) for batch in (1, 64))
    assert one is not None
    assert many is not None
    assert many - one > 4 * 63 * 3 * 256**2


@linux
def test_the_memory_of_this_process_does_not_count(tmp_path: Path) -> None:
    """Which has torch in it; ``ru_maxrss`` would hand it down."""
    ballast = bytearray(b"x" * 2**28)
    found = peak_rss_bytes(image_model(tmp_path / "model.onnx"))
    here = own_peak_rss_bytes()
    assert found is not None
    assert here is not None
    assert found < len(ballast) < here


def test_the_process_loads_no_torch(tmp_path: Path) -> None:
    request = REQUEST | {"path": str(image_model(tmp_path / "model.onnx"))}
    packages = run_isolated("qat_export.bench.peak_memory", request)["packages"]
    assert {"onnxruntime", "numpy", "qat_export"} <= set(packages)
    assert not {"torch", "onnx", "datasets"} & set(packages)


def test_a_failure_there_names_the_model(tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_text("no model")
    with pytest.raises(CheckpointError, match=r"damaged\.onnx: running it in a process of its own failed: "):
        peak_rss_bytes(path)


@pytest.mark.skipif(sys.platform == "win32", reason="has no getrusage")
def test_without_proc_the_system_is_asked(tmp_path: Path) -> None:
    found = own_peak_rss_bytes(tmp_path / "none")
    assert found is not None
    assert found > 2**25


def test_where_nothing_tells_the_peak_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert own_peak_rss_bytes(tmp_path / "none") is None
