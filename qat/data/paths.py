"""Finds the files of a data set by ``data.root`` and the environment variable ``QAT_DATA``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from qat.data.split import SplitName
from qat.errors import DataError, nearest
from qat.recipe.schema import Data

__all__ = ["VARIABLE", "cifar10_folder", "found_root", "parquet_files", "parquet_splits", "split_of"]

#: Environment variable that names a folder with one folder for each data set.
VARIABLE: Final = "QAT_DATA"

_ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_SHARD: Final = re.compile(r"(?P<split>.+)-\d+-of-(?P<count>\d+)")


def found_root(data: Data) -> Path:
    """The folder ``data.root``, looked for in the working directory, then in the folder of ``QAT_DATA``.

    Raises:
        DataError: ``data.root`` is unset, or is not a folder in either place, or ``QAT_DATA`` does not name a
            folder.
    """
    if data.root is None:
        raise DataError("data.root is unset: name the folder of images with --set data.root=DIR")
    given = Path(data.root).expanduser()
    root, shared = given.absolute(), _shared_folder()
    if not root.exists() and shared is not None and (shared / given).exists():
        root = shared / given
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        if root.is_file() and root.name.lower().endswith(_ARCHIVES):
            found = "is an archive; unpack it, which makes a folder"
        also = (
            "" if shared is None or given.is_absolute() else f", nor is it in {VARIABLE}, which is {shared}"
        )
        raise DataError(f"data.root: {root} {found}{also}; name another with --set data.root=DIR")
    return root


def cifar10_folder(data: Data) -> Path | None:
    """The folder of CIFAR-10's Parquet files: ``data.root``, or ``cifar10`` in the folder of ``QAT_DATA``.

    It is ``None`` if ``data.root`` is unset and there is no such folder.

    Raises:
        DataError: see :func:`found_root`.
    """
    if data.root is not None:
        folder = found_root(data)
    else:
        shared = _shared_folder()
        if shared is None or not (shared / "cifar10").is_dir():
            return None
        folder = shared / "cifar10"
    # A copy of the Hub's repository has the files in a folder that is named after its configuration.
    inner = folder / "plain_text"
    return inner if inner.is_dir() and not any(folder.glob("*.parquet")) else folder


def _shared_folder() -> Path | None:
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser().absolute()
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{VARIABLE}: {folder} {found}; it names the folder that has one for each data set")
    return folder


def split_of(data: Data, name: SplitName) -> tuple[str, str]:
    """The key of ``data`` that names a split, and the name of that split; ``final_split`` must be set."""
    if name == "final":
        return "final_split", str(data.final_split)
    return ("train_split", data.train_split) if name == "train" else ("test_split", data.evaluated_split)


def parquet_files(folder: Path, split: str, key: str) -> list[Path]:
    """The files ``SPLIT.parquet`` or ``SPLIT-*.parquet`` in ``folder``, sorted by name.

    Args:
        folder: where they lie.
        split: name of the split.
        key: key of ``data`` that names the split, for messages.

    Raises:
        DataError: there are no such files, there are files of both kinds, or one of ``SPLIT-I-of-N.parquet``
            is missing.
    """
    every = _every_parquet_file(folder)
    files = [file for file in every if file.stem == split or file.stem.startswith(f"{split}-")]
    if not files:
        present = parquet_splits(folder)
        listed = ", ".join(present) or "no *.parquet file"
        raise DataError(
            f"data.{key}: {folder} has no {split}.parquet and no {split}-*.parquet"
            f"{nearest(split, present)}; it has {listed}"
        )
    if len(files) > 1 and any(file.stem == split for file in files):
        other = next(file.name for file in files if file.stem != split)
        raise DataError(f"{folder}: has both {split}.parquet and {other}; keep one kind")
    counts = [int(match["count"]) for file in files if (match := _SHARD.fullmatch(file.stem))]
    if counts and (len(counts) != len(files) or set(counts) != {len(files)}):
        raise DataError(
            f"{folder}: found {len(files)} files {split}-*.parquet, but {files[0].name} says that there are "
            f"{max(counts)}"
        )
    return files


def parquet_splits(folder: Path) -> list[str]:
    """Names of the splits that ``folder`` has Parquet files of, sorted.

    Raises:
        DataError: it cannot be read.
    """
    return sorted({_split_in(file.stem) for file in _every_parquet_file(folder)})


def _every_parquet_file(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix == ".parquet" and file.is_file())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _split_in(stem: str) -> str:
    match = _SHARD.fullmatch(stem)
    return match["split"] if match else stem
