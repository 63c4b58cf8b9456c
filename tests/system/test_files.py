"""Writing files: atomically, and with a reason in the error for each path that can't be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qat.errors import OutputError
from qat.system.files import require_writable, write_atomically


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "c.txt"
    path.parent.mkdir()
    write_atomically(path, "één\r\n")
    assert path.read_bytes() == "één\r\n".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_misspelt_folder_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "mising" / "c.txt"
    with pytest.raises(OutputError, match=r"c\.txt: cannot be written: there is no folder .*mising"):
        write_atomically(path, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_atomically(tmp_path / "c", b"")
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "it is a folder"),
        ("fifo", "not a regular file"),
        ("file/below", "cannot be written: .+"),
        ("loop", "cannot be written: .+"),
        ("n" * 300, "name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=f"(?i){reason}") as caught:
        write_atomically(tmp_path / name, b"new")
    assert str(caught.value).startswith(str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_write_that_fails_midway_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_what_cannot_be_written_is_said_beforehand_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (".", "file/below", "file/far/below", "loop", "\0", "folder/new"):
        with pytest.raises(OutputError, match="cannot be written"):
            require_writable(tmp_path / name)
    for name in ("file", "new"):
        require_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_folder_without_write_permission_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the user root may write everywhere
    with pytest.raises(OutputError, match="no permission to write in"):
        require_writable(tmp_path / "new")
