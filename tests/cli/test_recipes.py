"""qat recipe: list, show, copy, schema."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from qat.recipe.files import recipe_names
from tests.helpers.paths import ROOT
from tests.helpers.toy_runs import fail, succeed


def test_recipes_are_listed_shown_copied_and_described(tmp_path: Path) -> None:
    listed = succeed("recipe", "list")
    assert all(name in listed for name in recipe_names())
    shown = succeed("recipe", "show", "tiny_int8")
    assert shown == (ROOT / "recipes" / "tiny_int8.yaml").read_text(encoding="utf-8")
    assert "epochs: 5" in succeed("recipe", "show", "tiny_int8", "--set", "schedule.epochs=5")
    assert succeed("recipe", "copy", "tiny_int8", tmp_path).strip() == str(tmp_path / "tiny_int8.yaml")
    assert succeed("recipe", "show", tmp_path / "tiny_int8.yaml") == shown
    assert "exists already" in fail(2, "recipe", "copy", "tiny_int8", tmp_path)
    succeed("recipe", "copy", "tiny_int8", tmp_path, "--force")
    assert json.loads(succeed("recipe", "schema"))["properties"]["quantization"]
    assert "no such recipe" in fail(2, "recipe", "show", "tiny_int")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("recipe show ''", "'NAME': is empty"),
        ("recipe copy tiny_int8 ''", "'[DESTINATION]': is empty; give a path"),
        ("recipe shows", "No such command"),
        ("recipe copy tiny_int8 {tmp}/file/r.yaml", "cannot be written"),
    ],
)
def test_a_wrong_recipe_command_ends_with_2_and_says_why(tmp_path: Path, arguments: str, part: str) -> None:
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    assert part in fail(2, *(word.format(tmp=tmp_path) for word in shlex.split(arguments)))
