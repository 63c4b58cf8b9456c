"""Baselines as files: small, diffable, never over another file, and each damage told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat.errors import BaselineError, OutputError
from qat.gate.baseline_file import check_replaceable, read_baseline, write_baseline
from tests.helpers.recorded_baselines import baseline

Content = dict[str, Any]


def stored(path: Path, change: Callable[[Content], object]) -> Path:
    """A baseline whose JSON object went through ``change``."""
    write_baseline(path, baseline(wrong=[5, 300]))
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def test_a_baseline_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for one in (
        baseline(wrong=[5, 300]),
        baseline(1, recipe=None, class_names="b" * 64),
        baseline(256, class_names=[f"Größe {i}" for i in range(10)], processor={"name": None}),
    ):
        path = tmp_path / "folder" / "b.json"
        path.parent.mkdir(exist_ok=True)
        write_baseline(path, one)
        assert read_baseline(path) == one


def test_a_file_has_a_key_per_line_in_a_fixed_order_and_ends_with_a_line(tmp_path: Path) -> None:
    write_baseline(tmp_path / "1.json", baseline())
    write_baseline(tmp_path / "2.json", baseline(recorded="2027-01-02T03:04:05Z"))
    first, second = ((tmp_path / f"{i}.json").read_text(encoding="utf-8") for i in (1, 2))
    assert first.startswith('{\n  "format": "bnext-qat baseline 1",\n  "recorded": "')
    assert first.endswith("}\n")
    pairs = zip(first.splitlines(), second.splitlines(), strict=True)
    assert [a for a, b in pairs if a != b] == ['  "recorded": "2026-01-02T03:04:05Z",']


@pytest.mark.parametrize(("n", "most"), [(360, 8_000), (50_000, 30_000)])
def test_a_file_is_small_enough_for_a_repository(tmp_path: Path, n: int, most: int) -> None:
    from qat.recipe.loading import load_recipe

    wrong = np.flatnonzero(np.random.default_rng(0).random(n) < 0.2).tolist()
    recipe = load_recipe("tiny_int8").recipe.model_dump(mode="json")
    write_baseline(tmp_path / "b.json", baseline(n, wrong, recipe=recipe))
    assert (tmp_path / "b.json").stat().st_size < most


def test_a_baseline_may_be_replaced_whatever_its_state_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    check_replaceable(path)
    for change in (
        lambda c: None,
        lambda c: c.pop("top1"),
        lambda c: c.update(format="bnext-qat baseline 9"),
    ):
        write_baseline(stored(path, change), baseline(7))
        assert read_baseline(path).images == 7
    for text in ("", "{}", "[]", "3", '{"format": "other 1"}', "key: value\n", '{"format": 1}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BaselineError, match=r"b\.json: not a baseline.* it is not overwritten: delete"):
            write_baseline(path, baseline())
        assert path.read_text(encoding="utf-8") == text
    with pytest.raises(BaselineError, match="not a file; it is not overwritten"):
        write_baseline(tmp_path, baseline())


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_baseline(tmp_path / "file" / "b.json", baseline())


# Damage


def _set(*keys: str | int, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


BITS = "f" * 64
TAMPERED: list[tuple[Callable[[Content], object], str]] = [
    (lambda c: c.pop("top1"), "top1: is missing"),
    (lambda c: c["data"].pop("mean"), "data.mean: is missing"),
    (lambda c: c.pop("correct"), "correct: is missing"),
    (_set("image", value=1), "image: unknown key (did you mean 'images'?)"),
    (_set("model", "path", value="/x"), "model.path: unknown key"),
    (_set("format", value="bnext-qat baseline 2"), "format: found 'bnext-qat baseline 2'; this bnext-qat"),
    (_set("format", value="bnext-qat baseline "), "format: found 'bnext-qat baseline '"),
    (_set("format", value="bnext-qat portable 1"), "not a baseline: its 'format' is not"),
    (_set("recorded", value="yesterday"), "recorded: found 'yesterday'"),
    (_set("images", value=361), "correct: line 2: found 26 digits, needs 28"),
    (_set("images", value=359), "correct: line 2: bits are set beyond image 359"),
    (_set("images", value=256), "correct: found 2 lines, 256 images need 1"),
    (_set("images", value=0), "images: found 0"),
    (_set("images", value=360.0), "images: found 360.0"),
    (_set("images", value="360"), "images: found '360'"),
    (_set("images", value=True), "images: found True"),
    (_set("images", value=10**30), "images: found 1000000"),
    (
        _set("correct", 0, value=BITS),
        "top1: found 99.4444, but 359 of 360 bits of 'correct' are set, 99.7222",
    ),
    (_set("correct", 0, value=BITS[:-1]), "correct: line 1: found 63 digits, needs 64"),
    (_set("correct", 0, value=BITS[:-1] + "x"), "correct: line 1: 'x' is no hexadecimal digit in lower case"),
    (_set("correct", 1, value=7), "correct.1: found 7"),
    (_set("correct", value=BITS), "correct: found 'fff"),
    (_set("top1", value=100.0), "top1: found 100.0, but 358 of 360"),
    (_set("top1", value="99.4444"), "top1: found '99.4444'"),
    (_set("top5", value=99.0), "top5: found 99.0: not a share of 360 images from top1, 99.4444, to 100"),
    (_set("top5", value=99.8), "top5: found 99.8: not a share"),
    (_set("top5", value=100.1), "top5: found 100.1"),
    (_set("num_classes", value=11), "class_names: found 10 names, num_classes is 11"),
    (_set("num_classes", value=-1), "num_classes: found -1"),
    (_set("class_names", value="dogs"), "class_names: found 'dogs'"),
    (_set("class_names", 0, value=0), "class_names.0: found 0"),
    (_set("model", "sha256", value="abc"), "model.sha256: found 'abc'"),
    (_set("model", value=[]), "model: found []"),
    (_set("data", "fingerprint", value="A" * 64), "data.fingerprint: found 'AAAA"),
    (_set("data", "std", value=[1.0]), "data.std: found [1.0]"),
    (_set("data", "std", value=None), "data.std: found None"),
    (_set("processor", "instruction_sets", value="avx2"), "processor.instruction_sets: found 'avx2'"),
    (_set("versions", "torch", value=2), "versions.torch: found 2"),
    (_set("recipe", value="tiny_int8"), "recipe: found 'tiny_int8'"),
]


@pytest.mark.parametrize(("change", "part"), TAMPERED, ids=[part for _, part in TAMPERED])
def test_an_edited_file_is_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, change: Callable[[Content], object], part: str
) -> None:
    path = stored(tmp_path / "b.json", change)
    with pytest.raises(BaselineError) as caught:
        read_baseline(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {part}")
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 220


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a baseline, or a damaged one"),
        (b"hello", "not a baseline, or a damaged one"),
        (b"\xff\xff{}", "can't decode byte 0xff"),
        (b"\xff\xfe{\x00", "a damaged one: Expecting property name"),
        (b"\xff\xfe{", "a damaged one: 'utf-16-le' codec can't decode"),
        (b"\xef\xbb\xbf{}", "not a baseline: its 'format'"),
        (b"{}\xef\xbb\xbf", "not a baseline, or a damaged one"),
        (b"null", "not a baseline: its 'format'"),
        (b"[" * 100_000, "not a baseline, or a damaged one"),
        (b'{"format": "bnext-qat baseline 1", "top1": NaN}', "NaN is not JSON"),
        (b'{"format": "bnext-qat baseline 1", "top1": 1e999}', "recorded: is missing"),
        (b'{"format": "bnext-qat baseline 1", "top1": 1, "top1": 2}', "top1: is there twice"),
        (b'{"format": "bnext-qat baseline 1", "top1": ' + b"9" * 5000 + b"}", "damaged one"),
    ],
)
def test_a_file_that_is_no_json_object_of_ours_is_refused_in_one_line(
    tmp_path: Path, content: bytes, part: str
) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(BaselineError) as caught:
        read_baseline(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark_is_read_and_may_be_replaced(tmp_path: Path, encoding: str) -> None:
    path, one = tmp_path / "b.json", baseline(class_names=[f"Größe {i}" for i in range(10)])
    write_baseline(path, one)
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding, newline="\r\n")
    assert read_baseline(path) == one
    write_baseline(path, one)
    assert path.read_bytes().startswith(b'{\n  "format"')


def test_an_absent_file_says_how_to_record_one_and_a_folder_is_none(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match=r"no such file; `qat gate record MODEL -o .*nowhere` writes it"):
        read_baseline(tmp_path / "nowhere")
    with pytest.raises(BaselineError, match="not a file"):
        read_baseline(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_baseline(path, baseline())
    good = path.read_bytes()
    for length in range(0, len(good) - 2, 37):
        path.write_bytes(good[:length])
        with pytest.raises(BaselineError):
            read_baseline(path)
