"""What counts as an image in a class's folder, and what is named because it cannot be one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qat.data.listing import class_folders, list_images, same_name
from qat.errors import DataError


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """A class folder with two images, which nobody decodes here."""
    folder = tmp_path / "cat"
    folder.mkdir()
    for name in ("1.png", "0.JPG"):
        (folder / name).write_bytes(b"x")
    return folder


def problems(folder: Path) -> dict[str, str]:
    return {Path(one.name).name: one.kind for one in list_images(folder.parent, [folder.name]).problems}


def test_images_anywhere_beneath_a_class_are_its_own_sorted_part_by_part(cats: Path) -> None:
    (cats / "siamese" / "old").mkdir(parents=True)
    (cats / "siamese" / "old" / "2.webp").touch()
    (cats / "siamese.png").touch()
    found = list_images(cats.parent, ["cat"])
    assert found.files == ["cat/0.JPG", "cat/1.png", "cat/siamese/old/2.webp", "cat/siamese.png"]
    assert found.problems == []


@pytest.mark.parametrize("name", ["a.zip", "notes.txt", "labels.csv", "Thumbs.db", "noend", "depth.pfm"])
def test_what_is_no_picture_is_passed_over_and_counted(cats: Path, name: str) -> None:
    (cats / name).write_bytes(b"x")
    found = list_images(cats.parent, ["cat"])
    assert (len(found.files), found.passed_over, found.example) == (2, 1, str(cats / name))
    assert found.problems == []


@pytest.mark.parametrize("name", [".hidden.png", "._1.png", "__MACOSX", "@eaDir", ".git"])
def test_what_systems_leave_behind_is_not_seen(cats: Path, name: str) -> None:
    if "." in name[1:]:
        (cats / name).touch()
    else:
        (cats / name).mkdir()
        (cats / name / "2.png").touch()
    found = list_images(cats.parent, ["cat"])
    assert (len(found.files), found.passed_over, found.problems) == (2, 0, [])


def test_pictures_of_formats_that_are_not_read_are_named(cats: Path) -> None:
    for name in ("a.heic", "b.svg", "c.EPS"):
        (cats / name).touch()
    assert problems(cats) == {"a.heic": "foreign", "b.svg": "foreign", "c.EPS": "foreign"}


def test_a_pipe_is_named_and_never_opened(cats: Path) -> None:
    os.mkfifo(cats / "pipe.png")
    assert problems(cats) == {"pipe.png": "foreign"}


def test_links_to_images_and_folders_are_followed_and_dead_ones_named(cats: Path) -> None:
    (cats.parent / "more").mkdir()
    (cats.parent / "more" / "3.png").touch()
    (cats / "folder").symlink_to(cats.parent / "more")
    (cats / "file.png").symlink_to(cats / "1.png")
    (cats / "dead.png").symlink_to("/nowhere/x.png")
    (cats / "self.png").symlink_to("self.png")
    (cats / "gone").symlink_to("/nowhere")
    (cats / "gone.txt").symlink_to("/nowhere")
    assert len(list_images(cats.parent, ["cat"]).files) == 4
    assert problems(cats) == dict.fromkeys(("dead.png", "self.png", "gone"), "dangling link")


def test_a_folder_that_leads_back_to_one_it_lies_in_ends_there(cats: Path) -> None:
    (cats / "again").symlink_to(cats)
    (cats / "up").symlink_to(cats.parent)
    assert len(list_images(cats.parent, ["cat"]).files) == 2
    assert problems(cats) == {"again": "dangling link", "up": "dangling link"}


def test_a_folder_that_cannot_be_listed_is_named(cats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cats / "private").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list_images(cats.parent, ["cat"])
    assert [(one.kind, one.reason) for one in found.problems] == [
        ("unreadable", "cannot be listed: Permission denied")
    ]


def test_names_that_are_not_utf8_are_images_and_classes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / os.fsdecode(b"\xff.png")).touch()
    assert class_folders(tmp_path).names == [name]
    assert list_images(tmp_path, [name]).files == [os.path.join(name, os.fsdecode(b"\xff.png"))]  # noqa: PTH118


def test_both_forms_of_an_accent_are_one_name_and_side_by_side_are_refused(tmp_path: Path) -> None:
    assert same_name("caf\u00e9") == same_name("cafe\u0301") != same_name("cafe")
    (tmp_path / "caf\u00e9").mkdir()
    (tmp_path / "cafe\u0301").mkdir()
    with pytest.raises(DataError, match=r"'cafe\\u0301' and 'caf\\xe9' have names that look the same"):
        class_folders(tmp_path)


def test_a_dead_link_beside_the_classes_is_named(cats: Path) -> None:
    (cats.parent / "dog").symlink_to("/nowhere")
    found = class_folders(cats.parent)
    assert found.names == ["cat"]
    assert [one.name for one in found.problems] == [str(cats.parent / "dog")]
