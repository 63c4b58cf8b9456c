"""benchmarks.quantizers: a table over choices of quantization."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.quantizers import ROWS, lines_of, main, results_of, subset
from qat.data.loading import load_split
from qat.errors import QatError
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Data
from tests.helpers.parquet_sets import write
from tests.helpers.toy_runs import finetune_arguments


def sweep(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quantizers", *map(str, arguments)])
    main()


@pytest.fixture
def toy(toys: Path, tmp_path: Path) -> list[str]:
    """Options that make every row a calibration of a toy."""
    fixed = finetune_arguments(tmp_path, toys / "float.safetensors")[1:]
    wanted = [one for one in fixed if not one.startswith("output.dir=") and one != "--set"]
    return ["--recipe", "tiny_int8", *(word for one in wanted for word in ("--set", one))]


@pytest.mark.slow
def test_each_row_is_measured_once_and_shown_with_bits_and_export(
    toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["the recipe", "SE W4A8", "trunk 16 bits"]
    chosen = [word for row in rows for word in ("--row", row)]
    sweep(monkeypatch, *toy, *chosen[:4], "--out", tmp_path / "q")
    capsys.readouterr()
    sweep(monkeypatch, *toy, *chosen, "--out", tmp_path / "q")
    printed = capsys.readouterr().out
    assert printed.count("calibrated ") == 2  # the new row, and the table's head
    found = {one["row"]: one for one in lines_of(tmp_path / "q" / "results.jsonl")}
    assert list(found) == rows == list(json.loads(printed.splitlines()[-1]))
    assert [one["exports"] for one in found.values()] == [True, True, False]
    # Widths 8, 8, 16: two convolutions 3×3 and three 1×1, five attentions of 2 · 8 weights, stem, classifier.
    binary, attention, others = 2 * 8 * 8 * 9 + 3 * 8 * 8, 5 * 16, 3 * 8 * 9 + 16 * 10
    for row, bits in (("the recipe", 8), ("SE W4A8", 4)):
        assert found[row]["megabytes"] == pytest.approx((binary + bits * attention + 8 * others) / 8e6)


def test_every_row_is_a_valid_recipe_of_its_own() -> None:
    seen = {
        load_recipe("tiny_int8_cifar10", overrides).recipe.model_dump_json() for overrides in ROWS.values()
    }
    assert len(seen) == len(ROWS)


def test_a_subset_holds_so_many_random_images_and_the_whole_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [i % 3 for i in range(30)])
    write(tmp_path / "test.parquet", [0, 1, 2])
    data = Data(dataset="cifar10", root=str(tmp_path), image_size=16)
    with subset(data, 12) as overrides:
        (root,) = overrides
        made = data.model_copy(update={"root": root.removeprefix("data.root=")})
        assert len(load_split(made, "train")) == 12
        assert len(load_split(made, "test")) == 3
        folder = Path(made.root or "")
    assert not folder.exists()
    with subset(data, None) as overrides:
        assert overrides == []


@pytest.mark.parametrize("count", [0, 31])
def test_a_subset_larger_than_the_images_or_empty_is_refused(tmp_path: Path, count: int) -> None:
    write(tmp_path / "train.parquet", [i % 3 for i in range(30)])
    write(tmp_path / "test.parquet", [0])
    data = Data(dataset="cifar10", root=str(tmp_path), image_size=16)
    with pytest.raises(QatError, match=r"allowed with these files: 1 to 30"), subset(data, count):
        pass


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--images", "10"], "goes with data.dataset"),
        (["--set", "quantization.se.weight_bit=4"], "did you mean 'weight_bits'"),
        (["--set", "output.dir=/x"], "each row writes below --out"),
        (["--recipe", "nothing"], "no such recipe"),
    ],
)
def test_an_error_is_one_line_and_ends_with_2(
    arguments: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    toy: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        sweep(monkeypatch, *toy, *arguments, "--out", tmp_path / "q")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ")
    assert part in said


def test_an_output_that_is_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        sweep(monkeypatch, *toy, "--out", tmp_path / "file")
    assert ended.value.code == 2
    assert "file" in capsys.readouterr().err


def test_rows_of_other_settings_are_never_mixed_in_and_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    file, mine = tmp_path / "results.jsonl", {"recipe": "r", "set": [], "images": 3}
    line = json.dumps({"row": "a", "sweep": mine})
    file.write_text(f'{line}\n{{"row": "b", "sw', encoding="utf-8")
    assert results_of(file, mine) == [{"row": "a", "sweep": mine}]
    assert file.read_text("utf-8") == f"{line}\n"
    with pytest.raises(QatError, match="name another --out"):
        results_of(file, mine | {"images": 4})
    file.write_text('{"row": 1}\n', encoding="utf-8")
    with pytest.raises(QatError, match="not results of this benchmark"):
        results_of(file, mine)
