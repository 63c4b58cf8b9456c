"""qat gate: data that cannot be compared, wrong calls, and the files that CI reads."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from qat.gate.baseline_file import read_baseline
from tests.helpers.toy_runs import fail, image_folder, qat, settings, succeed, tuned


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)


@pytest.fixture(scope="module")
def recorded(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline of the run in the fixture ``toys``. To be read only."""
    path = tmp_path_factory.mktemp("baseline") / "b.json"
    succeed("gate", "record", tuned(toys).parent, "-o", path)
    return path


# Other data


def test_an_image_folder_is_known_by_its_content(toys: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=1, test=2, classes=[f"class {i}" for i in range(10)])
    moved = tmp_path / "moved"

    def data(where: Path) -> list[str]:
        return settings(["data.dataset=imagefolder", f"data.root={where}"])

    def verdict() -> str:
        return json.loads(succeed("gate", tuned(toys), "--baseline", path, *data(moved), "--json"))["verdict"]

    path = tmp_path / "b.json"
    succeed("gate", "record", tuned(toys), "-o", path, *data(root))
    assert 'images"' not in path.read_text(encoding="utf-8").replace('"images":', "")
    found = read_baseline(path)
    assert (found.images, found.data.dataset, found.data.resize) == (20, "imagefolder", 9)
    root.rename(moved)
    assert verdict() == "pass"
    first = moved / "validation" / "class 0"
    (first / "00.png").rename(first / "0.png")
    (first / "01.png").rename(first / "1.png")
    assert verdict() == "pass"
    (first / "0.png").write_bytes((first / "1.png").read_bytes())
    message = fail(2, "gate", tuned(toys), "--baseline", path, *data(moved))
    assert f"error: {path} cannot be compared with: the SHA-256 of images and labels is " in message
    message = fail(2, "gate", tuned(toys), "--baseline", path)
    assert "data.dataset is 'digits' here and 'imagefolder' there" in message


def test_a_refusal_is_an_error_for_ci_too(
    toys: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    arguments = ["gate", tuned(toys), "--baseline", recorded, "--junit", tmp_path / "j.xml"]
    result = qat(*arguments, "--set", "data.image_size=16")
    assert (result.exit_code, result.stdout) == (2, "")
    message = result.stderr.removeprefix("error: ").strip()
    assert message.startswith(f"{recorded} cannot be compared with: data.image_size is 16 here and 8 there")
    suite = ET.parse(tmp_path / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("errors"), suite.get("failures")) == ("1", "1", "0")
    assert suite.find("testcase/error").get("message") == message  # type: ignore[union-attr]
    text = (tmp_path / "s.md").read_text(encoding="utf-8")
    assert text.startswith("### ❌ Accuracy gate: refused\n")
    assert message in text


# What CI is given


def test_a_summary_is_appended_for_each_gate(
    toys: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    for count in (1, 2):
        succeed("gate", tuned(toys), "--baseline", recorded)
        assert path.read_text(encoding="utf-8").count("### ✅ Accuracy gate: pass\n") == count
    assert f"\nqat gate record {tuned(toys)} -o {recorded}\n" in path.read_text(encoding="utf-8")


def test_files_for_ci_that_cannot_be_written_decide_nothing_but_are_told(
    toys: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    result = qat("gate", tuned(toys), "--baseline", recorded)
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {tmp_path}: the file that GITHUB_STEP_SUMMARY names cannot be written: Is a directory\n"
    )
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    (tmp_path / "j.xml").mkdir()
    junit = ("--junit", tmp_path / "j.xml")
    assert "j.xml: cannot be written" in fail(2, "gate", tuned(toys), "--baseline", recorded, *junit)
    # A verdict of "fail" weighs more.
    failed = fail(1, "gate", tuned(toys), "--baseline", recorded, "--floor", 100, *junit)
    assert failed.splitlines()[0].startswith(f"warning: {tmp_path / 'j.xml'}: cannot be written")
    assert failed.splitlines()[-1].startswith("error: fail: top-1 is ")
    # What went wrong first stays the error.
    message = fail(2, "gate", tuned(toys), "--baseline", tmp_path / "nowhere.json", *junit)
    assert message.splitlines()[0].startswith(f"warning: {tmp_path / 'j.xml'}: cannot be written")
    assert message.splitlines()[-1].startswith(f"error: {tmp_path / 'nowhere.json'}: no such file")


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "Missing argument 'MODEL'"),
        ("{model}", "--baseline FILE is missing; `qat gate record MODEL -o FILE` writes one"),
        ("{model} --baseline", "Option '--baseline' requires an argument"),
        ("{model} {model} --baseline {b}", "unexpected extra argument"),
        ("{model} record --baseline {b}", "unexpected extra argument (record)"),
        ("{model} --baseline {tmp}/nowhere.json", "nowhere.json: no such file; `qat gate record MODEL -o "),
        ("{model} --baseline {tmp}", "not a file"),
        ("{model} --baseline {model}", "{model}: not a baseline"),
        ("{tmp}/nowhere --baseline {b}", "nowhere: no such file"),
        ("{tmp} --baseline {b}", "not a run directory"),
        (
            "{model} --baseline {b} --confidence 95",
            "95 is not a share between 0.5 and 1, both excluded: write 0.95",
        ),
        ("{model} --baseline {b} --confidence 95%", "'95%' is not a valid float"),
        ("{model} --baseline {b} --confidence nan", "'--confidence': nan is not a share"),
        (
            "{model} --baseline {b} --max-drop -1",
            "'--max-drop': -1 is not a drop in percentage points, 0 to 100",
        ),
        ("{model} --baseline {b} --floor 101", "'--floor': 101 is not an accuracy in percent, 0 to 100"),
        (
            "{model} --baseline {b} --on-inconclusive maybe",
            "'maybe' is not one of 'measured', 'pass', 'fail'",
        ),
        (
            "{model} --baseline {b} --max-drop 1.0 --max-relative-drop 1",
            "--max-drop and --max-relative-drop exclude each other; give one",
        ),
        (
            "{model} --baseline {b} --max-relative-drop 101",
            "'--max-relative-drop': 101 is not a drop in percent of the baseline's top-1, 0 to 100",
        ),
        ("{model} --baseline {b} --max-relative-drop 1%", "'1%' is not a valid float"),
        ("{model} --baseline {b} --show-flips=5", "'--show-flips' does not take a value"),
        ("{model} --baseline {b} --junit {b}", "b.json' does not end in .xml"),
        (
            "{tmp}/m.xml --baseline {b} --junit {tmp}/../{tmp.name}/m.xml",
            "overwrite MODEL, {tmp}/m.xml; name",
        ),
        ("{model} --baseline {tmp}/b.xml --junit {tmp}/b.xml", "overwrite --baseline, {tmp}/b.xml; name"),
        ("{model} --baseline {b} --set optimizer.lr=1", "only keys of `data` may be set"),
        ("{model} --baseline {b} --recipe nowhere", "no such recipe file"),
        ("record", "Missing argument 'MODEL'"),
        ("record {model}", "Missing option '-o' / '--output'"),
        ("record {model} -o ''", "is empty; give a path"),
        ("record {model} -o {tmp}", "{tmp}: not a file; it is not overwritten"),
        ("record {model} -o {b}/b.json", "cannot be written: "),
        ("record {tmp}/nowhere -o {tmp}/b.json", "nowhere: no such file"),
        ("record {model} -o {tmp}/b.json --set schedule.epochs=1", "only keys of `data` may be set"),
        ("record {model} -o {tmp}/b.json --max-drop 1", "No such option '--max-drop'"),
    ],
)
def test_a_wrong_call_ends_with_2_and_says_why(
    toys: Path, recorded: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    before = recorded.read_bytes()
    names = {"model": tuned(toys), "b": recorded, "tmp": tmp_path}
    words = ["" if word == "''" else word.format(**names) for word in arguments.split()]
    assert part.format(**names) in fail(2, "gate", *words)
    assert recorded.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_another_image_size_is_refused_before_any_image_is_read(
    toys: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.commands.gate.load_test_split", lambda *_: pytest.fail("images were read"))
    message = fail(2, "gate", tuned(toys), "--baseline", recorded, "--set", "data.image_size=100000")
    assert "data.image_size is 100000 here and 8 there" in message
