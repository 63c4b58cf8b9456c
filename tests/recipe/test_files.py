"""Recipe files: found, read as people write them, refused with the place, copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat.errors import OutputError, RecipeError
from qat.recipe import files as recipefiles
from qat.recipe.files import copy_recipe, recipes_dir
from qat.recipe.loading import load_recipe
from tests.helpers.recipes import SHIPPED, file_problems, write


def test_numbers_are_read_as_people_write_them(folder: Path) -> None:
    text = "task: pretrain\nmodel: {}\ndata: {dataset: imagefolder, root: 2024-01-01}\noptimizer: {lr: %s}\n"
    for written, value in (("1e-3", 1e-3), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), (".5e-2", 5e-3), ("1", 1.0)):
        loaded = load_recipe(write(folder, text % written)).recipe
        assert (loaded.optimizer.lr, loaded.data.root) == (value, "2024-01-01")
    for written in ("1e-", "e-3", "'1e-3'", "1e999", ".nan"):
        [line] = file_problems(write(folder, text % written))
        assert line.startswith("r.yaml: optimizer.lr: found ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task: [pretrain\nmodel: {}\n", "r.yaml: line 2, column 6: not valid YAML: "),
        ("task: pretrain\n\tseed: 1\n", "r.yaml: line 2, column 1: not valid YAML: "),
        ("task: a\x00b\n", "r.yaml: line 1, column 8: "),
        (b"task: pretrain\nseed: \xff\n", "r.yaml: line 2: byte 0xff is not UTF-8"),
        ("task: !!python/object:os.system {}\n", "r.yaml: line 1, column 7: not valid YAML: "),
        ("task: !!int x\n", "r.yaml: not valid YAML: a value does not fit its type: "),
        ("task: !!bool x\n", "r.yaml: not valid YAML: a value does not fit its type: "),
        ("? [a]\n: 1\n", "r.yaml: line 1, column 3: not valid YAML: "),
        ("task: *a\n", "r.yaml: line 1, column 7: not valid YAML: "),
        ("task: pretrain\n---\ntask: pretrain\n", "r.yaml: line 2, column 1: not valid YAML: "),
        ("[" * 5000, "r.yaml: not valid YAML: nested too deeply"),
        ("", "r.yaml: found nothing at the top level, "),
        ("# only a comment\n", "r.yaml: found nothing at the top level, "),
        ("- task\n", "r.yaml: found ['task'] at the top level, "),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_place(
    folder: Path, text: str | bytes, expected: str
) -> None:
    [line] = file_problems(write(folder, text))
    assert line.startswith(expected)


def test_keys_written_twice_are_refused_with_their_lines(folder: Path) -> None:
    text = "task: pretrain\nmodel: {}\ndata:\n  workers: 1\n  workers: 2\nmodel: {}\n"
    assert file_problems(write(folder, text)) == [
        "r.yaml: line 5: key 'workers' appears twice (first on line 4)",
        "r.yaml: line 6: key 'model' appears twice (first on line 2)",
    ]


def test_a_key_may_override_a_merged_one(folder: Path) -> None:
    text = (
        "task: finetune\nmodel: {checkpoint: a}\ndata: {}\nquantization:\n"
        "  se: &g {weight_bits: 4}\n  classifier: {<<: *g, weight_bits: 6}\n"
    )
    quantization = load_recipe(write(folder, text)).recipe.quantization
    assert quantization is not None
    assert (quantization.se.weight_bits, quantization.classifier.weight_bits) == (4, 6)


def test_a_byte_order_mark_is_skipped(folder: Path) -> None:
    assert (
        load_recipe(write(folder, b"\xef\xbb\xbftask: pretrain\nmodel: {}\ndata: {}\n")).recipe.task
        == "pretrain"
    )


def test_a_path_wins_over_a_packaged_name(folder: Path) -> None:
    assert load_recipe("tiny_int8").path == recipes_dir() / "tiny_int8.yaml"
    write(folder, "task: pretrain\nmodel: {}\ndata: {}\n", "tiny_int8")
    loaded = load_recipe("tiny_int8")
    assert (loaded.name, loaded.path, loaded.recipe.task) == ("tiny_int8", Path("tiny_int8"), "pretrain")


@pytest.mark.parametrize(
    "typed", ["tiny_int8", "tiny_int8.yaml", "recipes/tiny_int8.yaml", Path("tiny_int8")]
)
def test_a_packaged_recipe_is_found_from_anywhere(folder: Path, typed: str | Path) -> None:
    loaded = load_recipe(typed)
    assert (loaded.name, loaded.path) == ("tiny_int8", recipes_dir() / "tiny_int8.yaml")


@pytest.mark.parametrize("typed", ["other/tiny_int8.yaml", "./sub/recipes/tiny_int8.yaml", "tiny_int8.yml"])
def test_another_folder_is_taken_literally(folder: Path, typed: str) -> None:
    [line] = file_problems(typed)
    assert line.startswith(f"{typed!r}: no such recipe file (did you mean 'tiny_int8'?)")


def test_an_absent_recipe_is_refused_with_the_known_names(folder: Path) -> None:
    assert file_problems("tiny_int") == [
        "'tiny_int': no such recipe file (did you mean 'tiny_int8'?); recipes known by name: "
        + ", ".join(SHIPPED)
        + " (see `qat recipe list`)"
    ]
    [line] = file_problems("")
    assert line.startswith("'': no such recipe file; ")


def test_a_directory_is_refused_unless_a_packaged_recipe_has_its_name(folder: Path) -> None:
    (folder / "tiny_int8").mkdir()
    (folder / "mine").mkdir()
    assert load_recipe("tiny_int8").path == recipes_dir() / "tiny_int8.yaml"
    assert file_problems("mine") == ["mine: is a directory; a recipe is a YAML file"]


@pytest.mark.parametrize(
    ("typed", "why"), [("x" * 5000, "cannot be read: "), ("a\0b", "'a\\x00b': no such recipe file")]
)
def test_a_name_no_file_can_have_is_refused(folder: Path, typed: str, why: str) -> None:
    [line] = file_problems(typed)
    assert why in line


def test_an_installed_package_reads_the_recipes_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "qat"
    (package / "_recipes").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(recipefiles, "__file__", str(package / "recipe" / "files.py"))
    assert recipefiles.recipes_dir() == package.resolve() / "_recipes"
    (package / "_recipes").rmdir()
    assert recipefiles.recipes_dir() == tmp_path.resolve() / "recipes"


def test_a_copied_recipe_keeps_its_comments_and_loads(folder: Path) -> None:
    original = (recipes_dir() / "tiny_int8.yaml").read_bytes()
    assert copy_recipe("tiny_int8", "mine.yaml") == Path("mine.yaml")
    (folder / "sub").mkdir()
    assert copy_recipe("tiny_int8", folder / "sub") == folder / "sub" / "tiny_int8.yaml"
    assert (folder / "mine.yaml").read_bytes() == (folder / "sub" / "tiny_int8.yaml").read_bytes() == original
    assert load_recipe("mine.yaml").recipe == load_recipe("tiny_int8").recipe


def test_a_file_is_overwritten_only_when_forced(folder: Path) -> None:
    write(folder, "precious", "mine.yaml")
    with pytest.raises(OutputError, match=r"mine\.yaml: exists already; overwrite it with --force"):
        copy_recipe("tiny_int8", "mine.yaml")
    assert (folder / "mine.yaml").read_text() == "precious"
    copy_recipe("tiny_int8", "mine.yaml", force=True)
    assert (folder / "mine.yaml").read_bytes() == (recipes_dir() / "tiny_int8.yaml").read_bytes()


def test_a_copy_that_cannot_be_written_or_read_is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"r\.yaml: cannot be written: No such file or directory"):
        copy_recipe("tiny_int8", folder / "absent" / "r.yaml")
    with pytest.raises(RecipeError, match="did you mean 'tiny_int8'"):
        copy_recipe("tiny_int", "r.yaml")
    assert list(folder.iterdir()) == []
