"""Wraps a network so that several processes train it with the gradients of the whole batch.

A process that trains alone doesn't import accelerate, which would take seconds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import RecipeError
from qat.recipe.schema import Recipe
from qat.system.collectives import world
from qat.system.launch import is_set
from qat.train.sharding import ACCELERATE_FSDP, asked_of_accelerate, clamp_parts, is_sharded, shards


class Parallel:
    """A network whose parameters get the mean of all processes' gradients.

    In a process alone it is the network itself. Otherwise it is wrapped as distributed data parallel: each
    process has all weights and its share of each batch. Buffers needn't be sent, because all processes
    compute them from statistics of the whole batch (:mod:`qat.ops.batch_norm`,
    :mod:`qat.quantize.observers`). A network that :func:`qat.train.sharding.shard` has sharded isn't wrapped,
    because it gathers weights and scatters gradients by itself.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Wrap ``model``, which lies on ``device``; its frozen parameters must be frozen already."""
        self._forward: Any = model
        self._parts = model if is_sharded(model) else None
        self._wrapped = world().size > 1 and self._parts is None
        if not self._wrapped:
            return
        from accelerate import DistributedDataParallelKwargs

        # Some parameters get no gradient: the stem's PReLU, which no forward pass uses, and scales once they
        # are frozen.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        prepared = accelerator(device, kwargs_handlers=[options])
        self._forward = prepared.prepare_model(model, device_placement=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Map this process's normalized images (N, 3, H, W) to logits (N, num_classes)."""
        if self._parts is not None:
            clamp_parts(self._parts)
        logits: Tensor = self._forward(images)
        return logits

    @contextmanager
    def gathering(self, last: bool) -> Iterator[None]:
        """Context for the forward and backward pass of a batch.

        Gradients are averaged over the processes in the backward pass of the ``last`` batch of an optimizer
        step. Those of a sharded network are averaged in each backward pass, because otherwise each process
        would hold the gradients of the whole network until then.
        """
        if self._wrapped and not last:
            with self._forward.no_sync():
                yield
        else:
            yield


def accelerator(device: torch.device, **options: Any) -> Any:
    """accelerate's ``Accelerator`` for ``device``. Threads and precision stay as the recipe has them.

    Args:
        device: device of the network.
        **options: further arguments of ``Accelerator``.
    """
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate warns that it changes the number of threads
        from accelerate import Accelerator

        # Networks are sharded by qat.train.sharding. accelerate's own FSDP refuses to start without a GPU.
        asked = os.environ.pop(ACCELERATE_FSDP, None)
        try:
            # "no" because the training loop applies the precision, as it does in a process alone.
            made = Accelerator(cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no", **options)
        finally:
            if asked is not None:
                os.environ[ACCELERATE_FSDP] = asked
    torch.set_num_threads(threads)
    return made


def check_parallel(recipe: Recipe) -> None:
    """Check that several processes can train together as the recipe and the launcher ask.

    Raises:
        RecipeError: accelerate is configured for something that isn't supported here, or FSDP is asked for
            with fine-tuning, float16, or unsupported options.
    """
    if world().size == 1:
        return
    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if is_set(name):
            raise RecipeError(
                f"accelerate is configured for {what}, allowed: distributed data parallel, or FSDP for `qat "
                "pretrain`; launch with `accelerate launch --multi_gpu`, `accelerate launch --use_fsdp` or "
                "torchrun"
            )
    if not shards(recipe):
        return
    if recipe.task == "finetune":  # the launcher asks for FSDP; the schema refuses a recipe that does
        raise RecipeError(
            "accelerate is configured for FSDP, allowed for `qat finetune`: distributed data parallel; "
            "launch with `accelerate launch --multi_gpu` or torchrun"
        )
    if recipe.precision == "float16":
        raise RecipeError("precision: found 'float16', allowed with FSDP: 'float32', 'bfloat16'")
    for name, what in (
        ("FSDP_OFFLOAD_PARAMS", "parameters that lie on the CPU"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "activation checkpointing"),
    ):
        if asked_of_accelerate() and is_set(name):
            raise RecipeError(
                f"accelerate is configured for FSDP with {what} ({name}), allowed: without; its other "
                "options of FSDP are of no effect"
            )
