"""What a run is made of, and that all of its processes are made of the same."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from qat import __version__
from qat.checkpoints.format import file_hash
from qat.data.split import Split
from qat.errors import CheckpointError, DataError
from qat.system.collectives import from_main, world
from qat.train.resume import Resumed
from qat.train.teachers import Teachers


def run_facts(train: Split, test: Split, start: Path | None, teachers: Teachers | None) -> dict[str, str]:
    """Facts for checkpoints and summary; ``start`` is the checkpoint that training starts from."""
    pretrained = {} if start is None else {"pretrained_sha256": file_hash(start)}
    if teachers is not None and teachers.sha256 is not None:
        pretrained["teachers_sha256"] = teachers.sha256
    return {
        **pretrained,
        "class_names": json.dumps(test.class_names),
        "train_fingerprint": train.fingerprint(),
        "test_fingerprint": test.fingerprint(),
        "versions": json.dumps(dict(_versions())),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "bnext-qat", __version__
    yield "python", platform.python_version()
    for name in ("torch", "numpy"):
        yield name, version(name)


def check_alike(facts: dict[str, str], resumed: Resumed | None) -> None:
    """Refuse processes that don't see the same: on several machines, files may be other ones.

    Raises:
        DataError: images, checkpoint or versions differ from those of the first process.
        CheckpointError: so does the state that a run goes on from.
    """
    state = str(resumed.state.source) if resumed is not None and resumed.state is not None else "no state"
    # One message, since a process that refuses takes part in no other.
    first, first_state = json.loads(from_main(json.dumps([facts, state])))
    for key, value in facts.items():
        if value != (other := first.get(key, "nothing")):
            raise DataError(
                f"process {world().rank} of {world().size}: {key}: found {value[:200]}, allowed: what "
                f"the first one has, {other[:200]}"
            )
    if state != first_state:
        raise CheckpointError(
            f"process {world().rank} of {world().size} goes on from {state}, the first from {first_state}; "
            "the run's folder must be one that all machines share"
        )
