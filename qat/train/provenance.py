"""Provenance of a run: images, checkpoints and versions that its results are made of."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from qat import __version__
from qat.checkpoints.format import file_hash
from qat.errors import CheckpointError, DataError
from qat.system.collectives import from_main, world
from qat.train.job import Splits
from qat.train.teachers import Teachers


def provenance_of(splits: Splits, start: Path | None, teachers: Teachers) -> dict[str, str]:
    """What a run is made of, for the metadata of checkpoints and for the summary.

    Args:
        splits: the images.
        start: the checkpoint that training starts from, if it does.
        teachers: those whose weights don't come with the run are told by their SHA-256.
    """
    pretrained = {} if start is None else {"pretrained_sha256": file_hash(start)}
    if teachers.sha256:
        pretrained["teachers_sha256"] = teachers.sha256
    return {
        **pretrained,
        "class_names": json.dumps(splits.train.class_names),
        "train_fingerprint": splits.train.fingerprint(),
        "test_fingerprint": splits.test.fingerprint(),
        "versions": json.dumps(dict(_versions())),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "bnext-qat", __version__
    yield "python", platform.python_version()
    for name in ("torch", "numpy"):
        yield name, version(name)


def check_alike(provenance: Mapping[str, str], state: Path) -> None:
    """Refuse processes that train together on different files, as several machines may have them.

    Args:
        provenance: of the run as this process sees it.
        state: file of the state that this process goes on from.

    Raises:
        DataError: images, checkpoint or versions differ from those of the first process.
        CheckpointError: the state does.
    """
    # All in one message: a process that refuses takes part in no further one.
    first, first_state = json.loads(from_main(json.dumps([dict(provenance), str(state)])))
    for key, value in provenance.items():
        if value != (other := first.get(key, "nothing")):
            raise DataError(
                f"process {world().rank} of {world().size}: {key}: found {value[:200]}, allowed: what "
                f"the first one has, {other[:200]}"
            )
    if str(state) != first_state:
        raise CheckpointError(
            f"process {world().rank} of {world().size} goes on from {state}, the first from {first_state}; "
            "the run's folder must be one that all machines share"
        )
