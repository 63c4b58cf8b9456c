"""Provenance of a run: the images, checkpoints and versions of packages that its results depend on."""

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
    """The provenance of a run, for the metadata of checkpoints and for the summary.

    Args:
        splits: the images.
        start: the checkpoint that training starts from; ``None`` if it starts from random weights.
        teachers: the teachers of the distillation.

    Returns:
        ``pretrained_sha256`` and ``teachers_sha256`` (hashes of the files, if there are any),
        ``class_names``, ``train_fingerprint``, ``test_fingerprint``, and ``versions``, each as a text.
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
    """Check that processes which train together, maybe on several machines, read the same files.

    Args:
        provenance: the run's provenance as this process sees it.
        state: file of the state from which this process resumes.

    Raises:
        DataError: images, checkpoint or versions differ from those of the first process.
        CheckpointError: the state differs from that of the first process.
    """
    # Everything is compared in one message, because a process that raises an error takes part in no further
    # one.
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
