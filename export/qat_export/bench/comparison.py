"""`qat bench`: measure models, or a random network in several forms, and make a report."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from qat.errors import QatError
from qat.models.bnext import Architecture
from qat.native.library import has_library
from qat.system.machine import machine
from qat_export.bench.measurement import Candidate, Conditions, Measurement, measure
from qat_export.bench.targets import Subject, check_targets, export_targets
from qat_export.graphs.float32 import FORMAT as FLOAT_FORMAT
from qat_export.graphs.ort_static import FORMAT as STATIC_FORMAT

#: The targets that others are compared with, and the metadata property ``format`` of their files.
FLOAT32: Final = "float32"
ORT_STATIC: Final = "ort_static"
_FORMATS: Final = {FLOAT32: FLOAT_FORMAT, ORT_STATIC: STATIC_FORMAT}
PORTABLE: Final = "portable"
NATIVE: Final = "native"
#: Allowed sides of images in pixels, and numbers of classes, of a random network. Larger ones need too much
#: memory.
_RESOLUTIONS: Final = range(8, 2049)
_MOST_CLASSES: Final = 100_000


def default_targets() -> tuple[str, ...]:
    """The targets that are measured if none are named: all that can run on this machine.

    Raises:
        NativeLibraryError: an environment variable names a native library that doesn't exist.
    """
    return (FLOAT32, ORT_STATIC, PORTABLE, *((NATIVE,) if has_library() else ()))


@dataclass(frozen=True)
class Report:
    """Measurements, with their settings and the machine.

    Attributes:
        measurements: one per model.
        settings: JSON object; ``size``, ``classes`` and ``resolution`` are null if files were measured.
        machine: see :func:`qat.system.machine.machine`.
    """

    measurements: Sequence[Measurement]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def ratio(self, measurement: Measurement, baseline: str = FLOAT32) -> float | None:
        """The median time of ``baseline`` divided by that of ``measurement``: how many times as fast it is.

        ``None`` if no such baseline was measured.
        """
        found = self.baseline(baseline)
        return None if found is None else found.median / measurement.median

    def baseline(self, name: str) -> Measurement | None:
        """The baseline ``name``: the model of that name, or the first whose metadata has its format."""
        called = [found for found in self.measurements if found.candidate.target == name]
        says = [found for found in self.measurements if found.metadata.get("format") == _FORMATS[name]]
        return next(iter([*called, *says]), None)

    def to_json(self) -> str:
        """One JSON object with ``machine``, ``settings`` and ``results``."""
        results = [
            {
                "target": found.candidate.target,
                "ms_median": _rounded(found.median),
                "ms_min": _rounded(min(found.milliseconds)),
                "ms_max": _rounded(max(found.milliseconds)),
                "ratio_to_float32": _rounded(self.ratio(found)),
                "file_bytes": found.file_bytes,
                "load_ms": _rounded(found.load_ms),
                "peak_rss_bytes": found.peak_rss_bytes,
            }
            for found in self.measurements
        ]
        return json.dumps({"machine": self.machine, "settings": self.settings, "results": results}, indent=2)

    @property
    def title(self) -> str:
        """Heading of the printed table."""
        threads, batch, repeats = (self.settings[key] for key in ("threads", "batch", "repeats"))
        runs = "1 run" if repeats == 1 else f"{repeats} runs"
        threading = "1 thread" if threads == 1 else f"{threads} threads"
        processor = self.machine["processor"] or "unknown processor"
        return f"{threading}, batch {batch}, {runs} of each, {processor}"

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the printed table; the first one has the headings."""
        titles = (
            "target",
            "median ms",
            "quartiles",
            "× float32",
            "× ort_static",
            "file MB",
            "load ms",
            "peak MB",
        )
        return [titles, *(self._row(found) for found in self.measurements)]

    def _row(self, found: Measurement) -> tuple[str, ...]:
        first, third = found.quartiles
        ratios = (self.ratio(found, baseline) for baseline in (FLOAT32, ORT_STATIC))
        return (
            found.candidate.target,
            f"{found.median:.2f}",
            f"{first:.2f}–{third:.2f}",
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{found.file_bytes / 1e6:.2f}",
            f"{found.load_ms:.0f}",
            "–" if found.peak_rss_bytes is None else f"{found.peak_rss_bytes / 1e6:.0f}",
        )


def _rounded(value: float | None) -> float | None:
    """``value`` (milliseconds, or a ratio) to four decimals; further digits are noise."""
    return None if value is None else round(value, 4)


def bench_files(
    paths: Sequence[Path], conditions: Conditions, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure models in files.

    The report calls each by its file name without ending, or by its path if several have the same name.

    Args:
        paths: files of the models.
        conditions: conditions of the measurement.
        say: called with a line on what is about to happen.

    Raises:
        QatError: see :func:`qat_export.bench.measurement.measure`.
    """
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in paths]
    candidates = [Candidate(name, path) for name, path in zip(names, paths, strict=True)]
    subject = {"size": None, "classes": None, "resolution": conditions.resolution}
    return _report(candidates, conditions, subject, say)


def bench_random(
    architecture: Architecture,
    resolution: int,
    targets: Sequence[str],
    conditions: Conditions,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Export a network with random weights in several forms, and measure these.

    Args:
        architecture: architecture of the network.
        resolution: side of its images in pixels.
        targets: names from :data:`qat_export.bench.targets.TARGETS`.
        conditions: conditions of the measurement; its seed is also that of the network.
        say: called with a line on what is about to happen.

    Raises:
        QatError: a target is unknown, or a number is out of range.
        VerificationError: an export does not compute what the network does.
    """
    if resolution not in _RESOLUTIONS:
        raise QatError(
            f"resolution is {resolution}, allowed are {_RESOLUTIONS.start} to {_RESOLUTIONS.stop - 1}"
        )
    if architecture.num_classes > _MOST_CLASSES:
        raise QatError(f"classes is {architecture.num_classes}, allowed are 1 to {_MOST_CLASSES}")
    check_targets(targets)
    with tempfile.TemporaryDirectory(prefix="qat-bench-") as folder:
        say(f"filling {architecture} at random")
        subject = Subject.at_random(
            architecture, image_size=resolution, folder=Path(folder), seed=conditions.seed
        )
        candidates = export_targets(subject, targets, say)
        del subject  # free the memory of its parameters for the models
        named = {"size": architecture.size, "classes": architecture.num_classes, "resolution": resolution}
        return _report(candidates, conditions, named, say)


def _report(
    candidates: Sequence[Candidate],
    conditions: Conditions,
    subject: dict[str, Any],
    say: Callable[[str], None],
) -> Report:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    measurements = measure(candidates, conditions, say=say)
    settings = subject | {
        "targets": [candidate.target for candidate in candidates],
        "threads": conditions.threads,
        "batch": conditions.batch,
        "repeats": len(measurements[0].milliseconds),
        "seed": conditions.seed,
        "date": date,
    }
    return Report(measurements, settings, machine())
