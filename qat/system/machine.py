"""Describes the machine that a measurement ran on: processor, memory, operating system and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from qat import __version__

#: Instruction sets that decide how fast integers and bits are computed, by Linux's names for them.
#: (``asimddp`` is ARM's dot product of bytes.)
INSTRUCTION_SETS: Final = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_vpopcntdq",
    "avx512_bitalg",
    "avx_vnni",
    "avx_vnni_int8",
    "amx_int8",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
)
#: Packages other than this one whose version can change a measured time or number.
PACKAGES: Final = ("onnxruntime", "onnx", "numpy", "torch")
#: Where Linux describes its processors.
CPUINFO: Final = Path("/proc/cpuinfo")


def machine(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """The machine as a JSON object. What can't be found out is null.

    Args:
        cpuinfo: file in the format of Linux's ``/proc/cpuinfo``; it may be missing.

    Returns:
        ``processor`` (its name), ``architecture``, ``logical_cores``, ``usable_cores`` (the cores that this
        process may run on), ``instruction_sets`` (those of :data:`INSTRUCTION_SETS` that the processor has),
        ``memory_bytes``, ``system``, ``python``, and ``versions`` by package.
    """
    name, features = read_cpuinfo(_text(cpuinfo))
    return {
        "processor": name or platform.processor() or None,
        "architecture": platform.machine() or None,
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "instruction_sets": features,
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"bnext-qat": __version__} | {package: _version(package) for package in PACKAGES},
    }


def usable_cores() -> int:
    """Number of logical cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has this function
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def read_cpuinfo(text: str) -> tuple[str | None, list[str] | None]:
    """Name and instruction sets of the first processor in the text of Linux's ``/proc/cpuinfo``.

    ARM processors are listed without a name, but with the numbers of their maker and part. The name that is
    returned is then made of these. Either result is ``None`` where the text doesn't say.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Hardware")
    if name is None and "CPU part" in fields:
        name = f"implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    flags = fields.get("flags", fields.get("Features"))
    if flags is None:
        return name, None
    present = set(flags.split())
    return name, [feature for feature in INSTRUCTION_SETS if feature in present]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such function, or no such names, on this system
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
