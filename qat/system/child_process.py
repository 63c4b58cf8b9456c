"""Runs a function in a child process, so that its memory, output and warnings don't reach this one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

#: The program of the child. It imports this project from the folders where this process found it. They are
#: searched last, so that a file beside the project can't hide a module of the standard library.
_START: Final = (
    "import importlib, json, sys; sys.path.extend(json.loads(sys.argv[1])); "
    "result = importlib.import_module(sys.argv[2]).main(json.loads(sys.argv[3])); "
    "print(); print(json.dumps(result))"
)


class ChildFailedError(Exception):
    """The child ended without a result. The message is the last line that it wrote to standard error.

    Callers turn it into an error that says what the child was needed for.
    """


def run_isolated(module: str, request: dict[str, Any]) -> Any:
    """Call ``module.main(request)`` in a new process and return its result.

    Args:
        module: name of the module, which can be imported from this process.
        request: the argument of ``main``; it must be serializable as JSON, and so must the result.

    Raises:
        ChildFailedError: ``main`` raised an exception, or the process was killed.
    """
    roots = _folders("qat", module.partition(".")[0])
    # With -P the working directory is not searched for modules.
    command = [sys.executable, "-P", "-c", _START, json.dumps(roots), module, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else "no message"
        if done.returncode < 0:
            # Signal 9 mostly means that the system ran out of memory.
            reason = f"killed by signal {-done.returncode}"
        raise ChildFailedError(reason)
    return json.loads(done.stdout.splitlines()[-1])


def _folders(*packages: str) -> list[str]:
    """The folders from which this process imports the given top-level packages or modules."""
    specs = [importlib.util.find_spec(name) for name in packages]
    found = [Path(spec.origin) for spec in specs if spec is not None and spec.origin]
    return [str(path.parents[1] if path.name == "__init__.py" else path.parent) for path in found]
