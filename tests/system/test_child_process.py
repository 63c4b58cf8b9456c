"""A function that runs in a child process."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.system.child_process import ChildFailedError, run_isolated


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``child`` that a child process can import, to be written."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return tmp_path / "modules" / "child.py"


def test_the_result_comes_back_and_nothing_that_was_printed(
    child: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child.write_text(
        "import logging, os, sys, warnings\n"
        "def main(request):\n"
        "    print('chatter', end=''); os.write(2, b'native chatter'); warnings.warn('beware')\n"
        "    logging.warning('consider this')\n"
        "    return {'twice': 2 * request['number'], 'process': os.getpid()}\n"
    )
    result = run_isolated("child", {"number": 21})
    assert result["twice"] == 42
    assert run_isolated("child", {"number": 0})["process"] != result["process"]
    assert capfd.readouterr() == ("", "")


def test_an_error_there_is_an_error_here_with_its_last_line(child: Path) -> None:
    child.write_text("def main(request):\n    raise ValueError('this is why')\n")
    with pytest.raises(ChildFailedError, match=r"^ValueError: this is why$"):
        run_isolated("child", {})


def test_a_killed_process_is_told_by_its_signal(child: Path) -> None:
    child.write_text("import os\ndef main(request):\n    os.kill(os.getpid(), 9)\n")
    with pytest.raises(ChildFailedError, match="killed by signal 9"):
        run_isolated("child", {})


def test_a_silent_end_is_an_error_too(child: Path) -> None:
    child.write_text("import os\ndef main(request):\n    os._exit(3)\n")
    with pytest.raises(ChildFailedError, match="no message"):
        run_isolated("child", {})


def test_files_of_the_working_directory_hide_no_module(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    child.write_text("import json\ndef main(request):\n    return json.__name__\n")
    assert run_isolated("child", {}) == "json"


def test_files_beside_the_project_hide_no_module(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "beside.py").write_text("import colorsys\ndef main(request):\n    return colorsys.__name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run_isolated("beside", {}) == "colorsys"
