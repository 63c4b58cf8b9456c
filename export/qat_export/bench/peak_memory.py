"""Measure the peak memory of loading and running a model, in a child process that does nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from qat.errors import CheckpointError
from qat.system.child_process import ChildFailedError, run_isolated
from qat_export.bench.any_model import AnyModel

#: Number of runs in the child. The first one allocates most memory, but later ones may need more.
_RUNS: Final = 3
#: File in which Linux gives facts about a process, such as its peak memory.
PROCESS_STATUS: Final = Path("/proc/self/status")


def peak_rss_bytes(
    path: Path, *, threads: int = 1, batch: int = 1, resolution: int | None = None, seed: int = 0
) -> int | None:
    """Peak resident memory, in bytes, of a new process that loads the model with onnxruntime and runs it.

    About 70 MB of it are Python, NumPy and onnxruntime. ``None`` if the operating system doesn't tell.

    Args:
        path, threads, batch, resolution: see :class:`qat_export.bench.any_model.AnyModel`.
        seed: seed of the random images.

    Raises:
        CheckpointError: the process failed, perhaps since memory ran out.
    """
    request = {
        "path": str(path.resolve()),
        "threads": threads,
        "batch": batch,
        "resolution": resolution,
        "seed": seed,
    }
    try:
        peak = run_isolated(__name__, request)["peak_rss_bytes"]
    except ChildFailedError as error:
        raise CheckpointError(f"{path}: running it in a process of its own failed: {error}") from error
    return None if peak is None else int(peak)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Entry point of the child process: load a model, run it, and return the process's peak memory.

    The result also has the names of the imported packages, since each takes memory.
    """
    model = AnyModel(
        Path(request["path"]),
        threads=request["threads"],
        batch=request["batch"],
        resolution=request["resolution"],
    )
    images = model.input.random(request["seed"])
    for _ in range(_RUNS):
        model.run(images)
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    return {"peak_rss_bytes": own_peak_rss_bytes(), "packages": packages}


def own_peak_rss_bytes(status: Path = PROCESS_STATUS) -> int | None:
    """Peak resident memory of this process so far, in bytes; ``None`` if the operating system doesn't tell.

    On Linux it is VmHWM in ``status``. The number of ``getrusage`` is not used there, since a process
    inherits it from the one that started it.
    """
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
