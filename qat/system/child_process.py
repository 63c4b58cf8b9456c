"""Work in a process of its own: what it leaves in memory, prints or warns of does not reach this one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

#: The child finds this project where this process found it, but behind everything else, so that no folder it
#: lies in can hide a module of the standard library.
_START: Final = (
    "import importlib, json, sys; sys.path.extend(json.loads(sys.argv[1])); "
    "result = importlib.import_module(sys.argv[2]).main(json.loads(sys.argv[3])); "
    "print(); print(json.dumps(result))"
)


class ChildFailedError(Exception):
    """The child ended without a result; the message is the last line it wrote. Not for users' eyes alone."""


def run_isolated(module: str, request: dict[str, Any]) -> Any:
    """What ``module.main(request)`` returns in a fresh process; request and result are JSON.

    Raises:
        ChildFailedError: it raised, or was killed.
    """
    roots = _folders("qat", module.partition(".")[0])
    # -P: the working directory is not searched for modules.
    command = [sys.executable, "-P", "-c", _START, json.dumps(roots), module, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "no message"
        if done.returncode < 0:
            reason = f"killed by signal {-done.returncode}"  # 9 is mostly the system running out of memory
        raise ChildFailedError(reason)
    return json.loads(done.stdout.splitlines()[-1])


def _folders(*packages: str) -> list[str]:
    """The folders in which this process finds the packages, or the modules outside of any."""
    specs = [importlib.util.find_spec(name) for name in packages]
    found = [Path(spec.origin) for spec in specs if spec is not None and spec.origin]
    return [str(path.parents[1] if path.name == "__init__.py" else path.parent) for path in found]
