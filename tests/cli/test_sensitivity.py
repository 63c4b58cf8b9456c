"""`qat sensitivity`: tables, JSON, the page, the written recipe, and how each wrong input ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.recipe.loading import load_recipe
from tests.helpers.cases import slow
from tests.helpers.toy_runs import fail, qat, recipe, succeed, tune

# One process: each would measure for itself.
pytestmark = pytest.mark.xdist_group("sensitivity")


def arguments(toys: Path, out: Path, *overrides: str) -> list[str]:
    """Arguments of a toy `qat sensitivity`; ``out`` is never written to."""
    return ["sensitivity", *tune(toys, out, *overrides)[1:]]


@pytest.fixture(scope="module")
def quick(toys: Path) -> list[str]:
    return [*arguments(toys, toys / "unused"), "--images", "60", "--bits", "4,2"]


@pytest.fixture(scope="module")
def outcome(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The JSON that a run with every output prints, and the folder with the files that it wrote."""
    folder = tmp_path_factory.mktemp("sensitivity")
    result = qat(*quick, "--json", "-o", folder / "page.html", "--recipe-out", folder / "mixed.yaml")
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        str(folder / "page.html"),
        str(folder / "mixed.yaml"),
    ]
    return json.loads(result.stdout, parse_constant=pytest.fail), folder


def test_everything_is_in_the_json(outcome: tuple[dict[str, Any], Path]) -> None:
    found, _ = outcome
    assert found["images"] == found["layer_images"] == 60
    assert found["test_images"] == 360
    assert found["float_rest"]["sqnr"] is None  # equal logits
    assert sorted(one["name"] for one in found["groups"]) == ["classifier", "se", "stem", "trunk"]
    names = [one["name"] for one in found["layers"]]
    assert len(names) == len(set(names)) == 18
    for kind in ("groups", "layers"):
        assert [one["ranks"]["by_loss"] for one in found[kind]] == list(range(1, len(found[kind]) + 1))
        order = [(-one["loss"], one["alone"]["sqnr"] or 1e9) for one in found[kind]]
        assert order == sorted(order)
    assert len(found["widths"]) == 6 * 2
    assert {one["bits"] for one in found["widths"]} == {4, 2}


@pytest.mark.exhaustive
def test_the_same_command_finds_the_same(outcome: tuple[dict[str, Any], Path], quick: list[str]) -> None:
    again = json.loads(succeed(*quick, "--json"))
    found, _ = outcome
    assert again | {"seconds": 0} == found | {"seconds": 0}


def test_the_same_command_about_one_group_finds_the_same(quick: list[str]) -> None:
    once, again = (json.loads(succeed(*quick, "--group", "stem", "--json")) for _ in range(2))
    assert {kind for kind in ("groups", "layers", "widths") if once[kind]} == {"groups", "layers", "widths"}
    assert again | {"seconds": 0} == once | {"seconds": 0}


def test_the_written_recipe_is_the_given_one_with_the_suggested_section(
    toys: Path, outcome: tuple[dict[str, Any], Path]
) -> None:
    found, folder = outcome
    written = load_recipe(folder / "mixed.yaml").recipe
    given = load_recipe("tiny_int8", arguments(toys, toys / "unused")[2::2]).recipe
    assert written.quantization is not None
    assert written.quantization.model_dump(mode="json") == found["suggestion"]["quantization"]
    assert written.model_copy(update={"quantization": given.quantization}) == given
    assert written.quantization != given.quantization
    text = (folder / "mixed.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# qat finetune --recipe {folder / 'mixed.yaml'}\n#\n# tiny_int8 with the bits")
    assert "on 60 of 360 test images" in text.replace("\n# ", " ")


def test_fine_tuning_starts_from_the_accuracy_that_was_measured(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.yaml"
    command = [*arguments(toys, tmp_path / "runs"), "--by", "group", "--bits", "4", "--images", "360"]
    found = json.loads(qat(*command, "--json", "--recipe-out", out).stdout)
    printed = succeed("finetune", "--recipe", out)
    assert f"float rest: top-1 {found['float_rest']['top1']:.2f}% of 360 images" in printed
    assert f"top-1 {found['suggestion']['measure']['top1']:.2f}% before training" in printed
    printed = succeed(*tune(toys, tmp_path / "runs"))
    assert f"top-1 {found['quantized']['top1']:.2f}% before training" in printed


def test_a_checkpoint_beside_the_recipe_is_found_from_where_the_new_recipe_lies(
    toys: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "start.safetensors").write_bytes((toys / "float.safetensors").read_bytes())
    given = tmp_path / "here" / "r.yaml"
    overrides = arguments(toys, tmp_path / "runs", "model.checkpoint=start.safetensors")
    given.write_text(succeed("recipe", "show", "tiny_int8", *overrides[1:]), encoding="utf-8")
    out = tmp_path / "there" / "mixed.yaml"
    out.parent.mkdir()
    command = ["sensitivity", "--recipe", given, "--by", "group", "--bits", "4", "--images", "20"]
    succeed(*command, "--group", "stem", "--recipe-out", out)
    assert load_recipe(out).recipe.model.checkpoint == str(tmp_path / "here" / "start.safetensors")
    succeed("finetune", "--recipe", out)


def test_the_terminal_shows_tables_notes_and_the_section_last(quick: list[str]) -> None:
    text = succeed(*quick, "--bits", "4")
    assert "Before fine-tuning, on 60 of 360 test images" in text
    assert "Most sensitive of 18 layers" in text
    assert text.count("feature.") - text.partition("One of 60 images")[2].count("feature.") == 10
    assert "One of 60 images is 1.67 points of top-1" in text
    assert "noise decides" in text
    assert "The suggestion was chosen on these test images" in text
    section = text[text.rindex("quantization:\n") :]
    loaded = yaml.safe_load(section)
    assert list(loaded) == ["quantization"]
    assert loaded["quantization"]["stem"].keys() == {"enabled", "weight_bits"}
    assert max(map(len, text.partition("One of 60 images")[0].splitlines())) <= 80


def test_the_page_has_charts_and_every_layer(outcome: tuple[dict[str, Any], Path]) -> None:
    found, folder = outcome
    page = (folder / "page.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert page.count("<svg") == 3 + 4 + 2
    assert all(page.count(f'<th scope="row">{one["name"]}</th>') == 1 for one in found["layers"])
    assert "weight_bits: " in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(("by", "absent"), [("group", "layers"), slow("layer", "groups")])
def test_by_leaves_out_the_other_kind(toys: Path, tmp_path: Path, by: str, absent: str) -> None:
    command = [*arguments(toys, tmp_path), "--images", "8", "--bits", "8", "--group", "se", "--by", by]
    out = tmp_path / "page.html"
    found = json.loads(qat(*command, "--json", "-o", out).stdout)
    assert found[absent] == []
    assert {one["group"] for kind in ("groups", "layers") for one in found[kind]} == {"se"}
    assert found["widths"] == []  # none is lower
    given = recipe("tiny_int8", tmp_path).recipe.quantization
    assert given is not None
    assert found["suggestion"]["quantization"] == given.model_dump(mode="json")
    assert out.read_text(encoding="utf-8").count("<svg") == (3 if by == "group" else 4)


@pytest.mark.parametrize("by", ["group", pytest.param("layer", marks=pytest.mark.exhaustive)])
def test_where_no_width_is_lower_that_is_said(toys: Path, tmp_path: Path, by: str) -> None:
    command = [*arguments(toys, tmp_path), "--images", "8", "--bits", "8", "--group", "se", "--by", by]
    text = succeed(*command)
    assert "Fewer bits exceed the limits" in text
    assert "chosen on these test images" not in text  # nothing was chosen


def test_layers_are_measured_on_fewer_images_where_no_number_is_given(toys: Path, tmp_path: Path) -> None:
    command = [*arguments(toys, tmp_path), "--bits", "8", "--group", "stem"]
    found = json.loads(succeed(*command, "--json"))
    assert (found["images"], found["layer_images"], found["test_images"]) == (360, 160, 360)
    assert "Layers were measured on 160 images, all else on 360" in succeed(*command)


# Wrong input


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (["--images", "0"], (), "--images 0: the test split has 360 images, allowed: 1 to 360"),
        (["--images", "361"], (), "--images 361: the test split has 360 images, allowed: 1 to 360"),
        (["--bits", "8,9"], (), "'9' is no width; write whole numbers of 2 to 8"),
        (["--bits", "1"], (), "'1' is no width"),
        (["--bits", ""], (), "'' is no width"),
        (["--bits", "4.0"], (), "'4.0' is no width"),
        (["--group", "heads"], (), "'heads' is not one of 'stem', 'se', 'classifier', 'trunk'"),
        (["--group", "se"], ("quantization.se.enabled=false",), "leaves it in float; it quantizes stem, cl"),
        ([], ('quantization.exclude=["*"]',), "nothing is left to quantize"),
        ([], ("quantization.exclude=[fd]",), "quantization.exclude: 'fd' matches no module"),
        (["--tolerance", "-1"], (), "-1 is not a number of at least 0"),
        (["--noise-budget", "nan"], (), "nan is not a number of at least 0"),
        (["-o", "page.txt"], (), "'page.txt' does not end in .html"),
        (["--recipe-out", "mixed.json"], (), "'mixed.json' does not end in .yaml"),
        ([], ("model.checkpoint=none.safetensors",), "found no file 'none.safetensors'"),
    ],
)
def test_wrong_input_is_refused(
    toys: Path, tmp_path: Path, words: list[str], overrides: tuple[str, ...], message: str
) -> None:
    assert message in fail(2, *arguments(toys, tmp_path, *overrides), *words)


def test_a_recipe_of_another_task_is_refused() -> None:
    message = fail(2, "sensitivity", "--recipe", "tiny_digits_pretrain")
    assert "this recipe is for `qat pretrain`, not `qat sensitivity`" in message


def test_a_recipe_is_not_overwritten_and_that_is_said_before_measuring(toys: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("# mine\n", encoding="utf-8")
    message = fail(2, *arguments(toys, tmp_path, "model.checkpoint=none"), "--recipe-out", mine)
    assert "mine.yaml: exists already" in message
    assert mine.read_text(encoding="utf-8") == "# mine\n"


@pytest.mark.parametrize("option", [("-o", "folder.html"), ("--recipe-out", "file/mixed.yaml")])
def test_what_cannot_be_written_is_said_before_measuring(
    toys: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    # Measuring would find that there is no checkpoint.
    message = fail(2, *arguments(toys, tmp_path, "model.checkpoint=none"), option[0], tmp_path / option[1])
    assert "cannot be written" in message
