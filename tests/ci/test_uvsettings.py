"""What pip is configured with is handed to uv, or pip is left to it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cases import slow
from tests.helpers.paths import ROOT

SCRIPT = ROOT / ".ci" / "uvsettings.py"


def told(tmp_path: Path, configuration: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """Exit status, variables and message for a pip configuration file and pip's variables."""
    file = tmp_path / "pip.conf"
    file.write_text(configuration)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    variables = {**kept, "PIP_CONFIG_FILE": str(file), **environment}
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(pip, env=variables, capture_output=True, text=True, check=True).stdout
    # Whatever this machine's own files say.
    own = [
        line for line in listed.splitlines() if line.partition("=")[0] in _given(configuration, environment)
    ]
    done = subprocess.run([sys.executable, SCRIPT], input="\n".join(own), capture_output=True, text=True)
    words = [word for line in done.stdout.splitlines() for word in shlex.split(line)[1:]]
    return done.returncode, dict(word.split("=", 1) for word in words), done.stderr


def _given(configuration: str, environment: dict[str, str]) -> set[str]:
    section, keys = (
        "",
        {f":env:.{name.removeprefix('PIP_').lower().replace('_', '-')}" for name in environment},
    )
    for line in configuration.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith(" "):
            keys.add(f"{section}.{line.partition('=')[0].strip()}")
    return keys


def test_without_settings_there_is_nothing_to_hand_over(tmp_path: Path) -> None:
    assert told(tmp_path, "") == (0, {}, "")


def test_all_that_chooses_packages_is_handed_over(tmp_path: Path) -> None:
    status, found, message = told(
        tmp_path,
        "[global]\nindex-url = https://mirror/simple?a=b&c='d'\nextra-index-url =\n  https://one/\n  https://two/\n"
        "find-links =\n  /wheels\n  /more\nconstraint = /limits.txt\ncert = /ca.crt\ntimeout = 60\n",
    )
    assert (status, message) == (0, "")
    assert found == {
        "UV_DEFAULT_INDEX": "https://mirror/simple?a=b&c='d'",
        "UV_INDEX": "https://one/ https://two/",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_CONSTRAINT": "/limits.txt",
        "SSL_CERT_FILE": "/ca.crt",
    }


def test_what_is_nearer_counts_and_other_commands_do_not(tmp_path: Path) -> None:
    configuration = (
        "[global]\nindex-url = https://a\nfind-links = /a\ncert = /a\n"
        "[install]\nfind-links = /b\ncert = /b\n[wheel]\nindex-url = https://c\nno-index = true\n"
    )
    _, found, _ = told(tmp_path, configuration, PIP_CERT="/d")
    assert found == {"UV_DEFAULT_INDEX": "https://a", "UV_FIND_LINKS": "/b", "SSL_CERT_FILE": "/d"}


@pytest.mark.parametrize(
    "setting", ["no-index = true", *map(slow, ("only-binary = :all:", "trusted-host = a", "pre = true"))]
)
def test_what_uv_might_not_follow_is_left_to_pip(tmp_path: Path, setting: str) -> None:
    status, found, message = told(tmp_path, f"[global]\n{setting}\n")
    assert status == 1
    assert not found
    assert f"pip is configured with {setting.partition(' ')[0]}, which uv might not follow" in message
