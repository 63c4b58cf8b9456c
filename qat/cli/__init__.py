"""The command line: arguments in, exit codes out. :mod:`qat.commands` does the work.

One module per group of commands. Importing a module adds its commands to ``main``.
"""

from qat.cli import (  # noqa: F401, they add their commands to main
    bench,
    data,
    gate,
    inspection,
    models,
    prediction,
    recipes,
    report,
    runs,
    sensitivity,
    training,
)
from qat.cli.group import main

__all__ = ["main"]
