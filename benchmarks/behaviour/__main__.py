"""Make a record, or compare two records."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.behaviour.values import Values, differences

#: Largest number of differences that a comparison prints. It always prints their total number.
SHOWN: Final = 60


def record(quick: bool) -> Values:
    """All values of a record, by name. Progress goes to standard error."""
    # Imported here, since a comparison needs nothing of the project.
    from benchmarks.behaviour import models, refusals, runs, steps

    parts = {
        "environment": runs.environment,
        "toy steps": steps.toy,
        "runs": runs.runs,  # first, since the parts below use the runs that it leaves
        "models": models.models,
        "gate": models.gate,
        "sensitivity": models.sensitivity,
        "refusals": refusals.refusals,
    }
    if not quick:
        parts |= {"BNext-Tiny steps": steps.tiny, "digits": models.digits, "CIFAR-10": models.cifar10}
    content: Values = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, part in parts.items():
            started = time.perf_counter()
            content[name] = part()
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return content


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description="digests of what the product computes, to compare commits")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the record there")
    parser.add_argument("--quick", action="store_true", help="the toy network alone")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RECORD", help="compare two records")
    options = parser.parse_args()
    if options.compare:
        found = differences(*options.compare)
        for line in found[:SHOWN]:
            print(line)
        print(f"{len(found)} values differ")
        raise SystemExit(1 if found else 0)
    # OpenMP reads it when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    text = json.dumps(record(options.quick), indent=1, ensure_ascii=False) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
