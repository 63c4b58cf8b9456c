"""The network as several processes train it: accelerate wraps it, so that gradients are those of the batch.

A process that trains alone never imports accelerate, whose start takes seconds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.distributed import world
from qat.errors import RecipeError


class Parallel:
    """A network whose parameters get the mean of all processes' gradients; alone it is the network itself.

    Distributed data parallel: each process has all weights and its share of each batch. Buffers are not sent
    around, because what they are made of is (:mod:`qat.syncednorm`, :mod:`qat.observers`).
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Wrap ``model``, which lies on ``device``; its frozen parameters must be frozen already.

        Raises:
            RecipeError: accelerate is configured for what this can't do.
        """
        self._forward: Any = model
        self._wrapped = world().size > 1
        if not self._wrapped:
            return
        _check_configuration()
        from accelerate import DistributedDataParallelKwargs

        # A stem's PReLU is in no forward pass, and scales leave it when they freeze.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        prepared = accelerator(device, kwargs_handlers=[options])
        self._forward = prepared.prepare_model(model, device_placement=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W), this process's, → logits (N, num_classes)."""
        logits: Tensor = self._forward(images)
        return logits

    @contextmanager
    def gathering(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a batch: gradients are averaged with the ``last`` one of a step."""
        if self._wrapped and not last:
            with self._forward.no_sync():
                yield
        else:
            yield


def accelerator(device: torch.device, **options: Any) -> Any:
    """accelerate's engine for ``device``, which leaves threads and precision as the recipe has them."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads
        from accelerate import Accelerator

        # The loop applies the precision, as in a process alone.
        made = Accelerator(cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no", **options)
    torch.set_num_threads(threads)
    return made


def _check_configuration() -> None:
    for name, what in (
        ("ACCELERATE_USE_FSDP", "fully sharded data parallel (FSDP)"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise RecipeError(
                f"accelerate is configured for {what}, allowed: distributed data parallel; launch with "
                "`accelerate launch --multi_gpu` or torchrun"
            )
