"""The GitHub action of the accuracy gate: its shell steps are run as a runner runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.cli.gate import gate
from qat.gate.output import OUTPUTS
from tests.helpers.paths import ROOT

FOLDER = ROOT / ".github" / "actions" / "gate"
ACTION: dict[str, Any] = yaml.safe_load((FOLDER / "action.yml").read_text(encoding="utf-8"))
FILES = ROOT / "tests" / "fixtures" / "version_0_1"
EXPRESSION = re.compile(r"\$\{\{ (.*?) \}\}")


def step(name: str) -> dict[str, Any]:
    (found,) = (one for one in ACTION["runs"]["steps"] if one["name"] == name)
    return found


def run(
    name: str, inputs: dict[str, str], path: Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A step with these inputs, and ``path`` before the commands of the system."""
    given = {key: one.get("default", "") for key, one in ACTION["inputs"].items()} | inputs
    variables = {
        key: EXPRESSION.sub(lambda match: given[match[1].removeprefix("inputs.")], text)
        for key, text in step(name).get("env", {}).items()
    }
    script = cwd / "step.sh"
    script.write_text(step(name)["run"], encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GITHUB_")}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
        cwd=cwd,
        env=kept | variables | {"PATH": f"{path}:/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
    )


def command(folder: Path, name: str, code: int = 0) -> Path:
    """A command that prints its arguments, a line each; its folder."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit {code}\n", encoding="utf-8")
    file.chmod(0o755)
    return folder


def words(tmp_path: Path, **inputs: str) -> list[str]:
    """The arguments of ``qat`` with these inputs."""
    given = {"model": "m.onnx", "baseline": "b.json"} | {
        key.replace("_", "-"): one for key, one in inputs.items()
    }
    done = run("Gate", given, command(tmp_path / "bin", "qat"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# Its shape


def test_every_option_of_the_gate_is_an_input_and_each_input_reaches_the_step() -> None:
    options = {text for one in gate.params for text in one.opts if text.startswith("--")} | {"model"}
    assert {one.removeprefix("--") for one in options} - {"json", "debug", "help"} == set(ACTION["inputs"])
    used = [match for text in step("Gate")["env"].values() for match in EXPRESSION.findall(text)]
    assert used == [f"inputs.{name}" for name in ACTION["inputs"]]


def test_no_text_of_a_workflow_is_pasted_into_a_script() -> None:
    for one in ACTION["runs"]["steps"]:
        assert (one["shell"], EXPRESSION.findall(one["run"])) == ("bash", [])


def test_its_outputs_are_those_that_the_gate_writes() -> None:
    named = {name.replace("-", "_"): one["value"] for name, one in ACTION["outputs"].items()}
    assert named == {name: f"${{{{ steps.gate.outputs.{name} }}}}" for name in OUTPUTS}


# The gate's step


def test_without_further_inputs_the_gates_own_defaults_hold(tmp_path: Path) -> None:
    assert words(tmp_path) == ["gate", "--baseline=b.json", "--", "m.onnx"]


def test_inputs_become_options_word_for_word(tmp_path: Path) -> None:
    found = words(
        tmp_path,
        model="-my model $(id).onnx",
        baseline="b`id`.json",
        max_drop="-1",
        max_relative_drop="0.5",
        confidence="0.9",
        floor="98",
        on_inconclusive="pass",
        show_flips="true",
        recipe="tiny int8",
        set="data.root=/a b\r\n\ndata.name='x; y'\n",
        junit="gate.xml",
    )
    options = ["max-drop=-1", "max-relative-drop=0.5", "confidence=0.9", "floor=98", "on-inconclusive=pass"]
    options += [
        "recipe=tiny int8",
        "junit=gate.xml",
        "show-flips",
        "set=data.root=/a b",
        "set=data.name='x; y'",
    ]
    assert found == [
        "gate",
        "--baseline=b`id`.json",
        *(f"--{one}" for one in options),
        "--",
        "-my model $(id).onnx",
    ]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": "m.onnx"}, "the input 'baseline' is missing"),
        ({"baseline": "b.json"}, "the input 'model' is missing"),
        (
            {"model": "m.onnx", "baseline": "b.json", "show-flips": "yes"},
            "the input 'show-flips' is 'yes': it must be true or false",
        ),
    ],
)
def test_wrong_inputs_end_with_2_and_one_line(tmp_path: Path, inputs: dict[str, str], message: str) -> None:
    done = run("Gate", inputs, command(tmp_path / "bin", "qat"), tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: accuracy gate: {message}\n"


@pytest.mark.parametrize("code", [1, 2])
def test_the_exit_code_of_the_gate_is_the_steps(tmp_path: Path, code: int) -> None:
    done = run("Gate", {"model": "m", "baseline": "b"}, command(tmp_path / "bin", "qat", code), tmp_path)
    assert done.returncode == code


def test_with_the_real_gate_a_worse_model_fails_the_step_and_outputs_and_summary_say_why(
    tmp_path: Path,
) -> None:
    """In a folder where the model is called ``record``, as a subcommand is."""
    (tmp_path / "record").symlink_to(FILES / "float.safetensors")
    inputs = {"model": "record", "baseline": str(FILES / "baseline.json"), "max-relative-drop": "1"}
    inputs |= {"show-flips": "true", "junit": "gate.xml", "set": "data.eval_batch_size=360\n"}
    files = {"GITHUB_OUTPUT": str(tmp_path / "outputs"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    done = run("Gate", inputs, Path(sys.executable).parent, tmp_path, **files)
    assert done.returncode == 1
    headline = "inconclusive, measured drop above what is allowed"
    assert f"error: {headline}: top-1 fell by " in done.stderr
    assert "right → wrong: image " in done.stdout
    outputs = (tmp_path / "outputs").read_text(encoding="utf-8").splitlines()
    assert outputs[:2] == ["verdict=inconclusive", "passes=false"]
    assert [line.split("=")[0] for line in outputs] == list(OUTPUTS)
    assert f"### ❌ Accuracy gate: {headline}" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f'<failure message="{headline}: ' in (tmp_path / "gate.xml").read_text(encoding="utf-8")


# The installation's step


def test_qat_is_installed_from_the_repository_of_the_action_unless_it_is_there(tmp_path: Path) -> None:
    python = command(tmp_path / "python", "python")
    done = run("Install", {}, python, tmp_path, GITHUB_ACTION_PATH=str(FOLDER))
    assert done.returncode == 0
    torch, own = (
        line.split() for line in done.stdout.replace("\n", " ").replace("-m pip", "\n").splitlines()[1:]
    )
    assert torch[:2] == ["install", torch_requirement()]
    assert own[0] == "install"
    assert Path(own[1]).resolve() == ROOT
    done = run("Install", {}, command(python, "qat"), tmp_path, GITHUB_ACTION_PATH=str(FOLDER))
    assert (done.returncode, done.stdout) == (0, "")


def torch_requirement() -> str:
    (found,) = re.findall(
        r'^    "(torch[><=][^"]*)",$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    return found


# The documentation


def test_the_workflow_in_the_documentation_calls_it_with_inputs_that_it_has() -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    workflows = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    steps = [one for flow in workflows for job in flow["jobs"].values() for one in job["steps"]]
    calls = [one for one in steps if one.get("uses", "").partition("@")[0].endswith("/.github/actions/gate")]
    assert calls
    for one in calls:
        assert set(one["with"]) <= set(ACTION["inputs"])
        assert {"model", "baseline"} <= set(one["with"])
    assert set(re.findall(r'"(torch[><=][^"]*)"', text)) == {torch_requirement()}
