"""Processes that start in milliseconds: forked from a server that has torch in memory and no threads."""

from __future__ import annotations

import multiprocessing
from typing import Final

# All tests of a process use the same server.
PROCESSES: Final = multiprocessing.get_context("forkserver")
# torch's optimizers and parallel networks load the last two, which takes seconds.
PROCESSES.set_forkserver_preload(
    [
        "qat.train.finetuning",
        "qat.train.pretraining",
        "qat.cli",
        "sklearn.datasets",
        "sklearn.model_selection",
        "kornia.augmentation",
        "accelerate",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "tests.helpers.fork_server_preload",
    ]
)
