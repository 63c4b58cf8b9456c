"""Run the command line in this process, and replace what differs between runs in its output."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from click.testing import CliRunner, Result

from benchmarks.behaviour.project import ROOT, main

#: Settings of a toy network that trains in a second.
TOY: Final = ("model.widths=[8,8,16]", "data.image_size=12", "threads=1", "device=cpu")


def qat(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Run a command, and return its standard output; ends the program if it fails."""
    result = qat(*arguments)
    if result.exit_code:
        raise SystemExit(f"qat {' '.join(map(str, arguments))}: {result.exit_code}\n{result.output}")
    return alike(result.stdout)


def alike(text: str) -> str:
    """``text`` with placeholders for the folder of the record and that of the repository."""
    return text.replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")


def settings(overrides: Iterable[str]) -> list[str]:
    """Arguments with ``--set`` for each override. If a key occurs twice, the later one is used."""
    last = {override.partition("=")[0]: override for override in overrides}
    return [word for override in last.values() for word in ("--set", override)]
