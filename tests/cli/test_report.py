"""qat report, and the report that qat finetune ends with."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

import qat.commands.report
from qat.errors import DataError
from tests.helpers.toy_runs import fail, succeed, tune, tuned
from tests.helpers.toy_runs import qat as command

# See tests/report/test_browser.py.
pytestmark = pytest.mark.xdist_group("reports")


def test_report_writes_the_newest_run_and_says_where(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(toys / "runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    path = run / "report.html"
    said = succeed("report", "--runs", tmp_path / "runs")
    assert said == f"{path}: {path.stat().st_size / 1e3:.0f} kB\n"
    before = path.read_bytes()
    succeed("report", run, "-o", tmp_path / "other.html", "--set", "data.eval_batch_size=100")
    assert (tmp_path / "other.html").read_bytes()[:15] == before[:15] == b"<!DOCTYPE html>"


@pytest.mark.usefixtures("with_report")
def test_finetune_names_its_report(toys: Path, tmp_path: Path) -> None:
    lines = succeed(*tune(toys, tmp_path)).splitlines()
    (run,) = tmp_path.iterdir()
    assert lines[-2] == f"{run}/report.html: written"
    assert (run / "report.html").is_file()


@pytest.mark.usefixtures("with_report")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("the images are gone"), "warning: no report: the images are gone\n"),
        (
            MemoryError("no more"),
            "warning: no report: MemoryError: no more (see `qat --debug report {run}`)\n",
        ),
    ],
)
def test_a_report_that_fails_does_not_fail_the_finetune(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuses(*_: object) -> None:
        raise error

    monkeypatch.setattr(qat.commands.report, "write_report", refuses)
    result = command(*tune(toys, tmp_path))
    (run,) = tmp_path.iterdir()
    assert result.exit_code == 0
    assert result.stderr == said.format(run=run)
    assert result.stdout.splitlines()[-1].startswith(f"{run}: done.")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("report {tmp}/absent", "no such run directory"),
        ("report {tmp}", "not a run directory"),
        ("report --runs {tmp}", "no finished finetune run here"),
        ("report ''", "is empty; give a path"),
        ("report {run} -o ''", "is empty; give a path"),
        ("report {run} -o {tmp}/report.txt", "does not end in .html"),
        ("report {run} -o {run}/best.safetensors", "does not end in .html"),
        ("report {run} --set schedule.epochs=1", "only keys of `data` may be set"),
        ("report {run} --set data.image_size=16", "fixed by the checkpoint"),
        ("report {run} --set data.eval_batch_size=0", "data.eval_batch_size"),
        ("report {run} extra", "unexpected extra argument"),
    ],
)
def test_a_wrong_report_ends_with_2_and_says_why(
    reported: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    run, before = reported.parent, reported.read_bytes()
    message = fail(2, *(word.format(tmp=tmp_path, run=run) for word in shlex.split(arguments)))
    assert part in message
    assert reported.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "part"), [("pages.html", "it is a folder"), ("file/x.html", "is not a folder")]
)
def test_a_report_that_cannot_be_written_is_refused_before_measuring(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, part: str
) -> None:
    (tmp_path / "pages.html").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(qat.commands.report, "load_checkpoint", lambda _: pytest.fail("measured already"))
    assert part in fail(2, "report", tuned(toys).parent, "-o", tmp_path / output)


def test_the_help_says_how_to_add_latency() -> None:
    assert "qat bench RUN/model.onnx --json > RUN/bench.json" in succeed("report", "--help")
