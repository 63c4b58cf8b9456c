"""Images are opened, or decoded, and what fails is told by kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qat.data.probing import probe, probe_headers
from tests.helpers.image_folders import write_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


class Files:
    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def image(self, index: int) -> Path:
        return self.files[index]

    def name(self, index: int) -> str:
        return self.files[index].name


def kinds(files: Sequence[Path], decode: bool) -> dict[str, str]:
    images = Files(files)
    found = (probe if decode else probe_headers)(images, range(len(files)))
    assert all(problem.name == images.name(row) for row, problem in found.items())
    return {problem.name: problem.kind for problem in found.values()}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    write_image(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in (("half.png", whole[:600]), ("text.png", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "eps.jpg").write_bytes(EPS)
    return [*sorted(tmp_path.iterdir()), tmp_path / "gone.png"]


def test_headers_tell_foreign_and_unreadable_files(files: list[Path]) -> None:
    foreign = dict.fromkeys(("empty.png", "eps.jpg", "text.png"), "foreign")
    assert kinds(files, decode=False) == {**foreign, "gone.png": "unreadable"}
    assert kinds(files, decode=True) == {**foreign, "gone.png": "unreadable", "half.png": "broken"}


def test_an_empty_file_is_called_empty(files: list[Path]) -> None:
    found = probe_headers(Files(files), [files.index(files[0].parent / "empty.png")])
    assert [problem.reason for problem in found.values()] == ["is empty"]


def test_every_image_is_counted(files: list[Path]) -> None:
    ticks: list[None] = []
    probe(Files(files), range(len(files)), tick=lambda: ticks.append(None))
    assert len(ticks) == len(files)
