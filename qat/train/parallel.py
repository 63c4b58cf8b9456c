"""The network as several processes train it: wrapped, so that gradients are those of the whole batch.

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

from qat.errors import RecipeError
from qat.recipe.schema import Recipe
from qat.system.collectives import world
from qat.system.launch import is_set
from qat.train.sharding import ACCELERATE_FSDP, asked_of_accelerate, bound_parts, is_sharded, shards


class Parallel:
    """A network whose parameters get the mean of all processes' gradients; alone it is the network itself.

    Distributed data parallel: each process has all weights and its share of each batch. Buffers are not sent
    around, because what they are made of is (:mod:`qat.ops.batch_norm`, :mod:`qat.quantize.observers`). A
    network that :func:`qat.train.sharding.shard` has cut up gathers weights and scatters gradients by itself.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Wrap ``model``, which lies on ``device``; its frozen parameters must be frozen already."""
        self._forward: Any = model
        self._parts = model if is_sharded(model) else None
        self._wrapped = world().size > 1 and self._parts is None
        if not self._wrapped:
            return
        from accelerate import DistributedDataParallelKwargs

        # A stem's PReLU is in no forward pass, and scales leave it when they freeze.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        prepared = accelerator(device, kwargs_handlers=[options])
        self._forward = prepared.prepare_model(model, device_placement=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, H, W), this process's, → logits (N, num_classes)."""
        if self._parts is not None:
            bound_parts(self._parts)
        logits: Tensor = self._forward(images)
        return logits

    @contextmanager
    def gathering(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a batch: gradients are averaged with the ``last`` one of a step.

        Those of a network in parts with every one, or each process would hold all gradients until then.
        """
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

        # Parts are made by qat.train.sharding; accelerate's own FSDP refuses to start where there is no GPU.
        asked = os.environ.pop(ACCELERATE_FSDP, None)
        try:
            # The loop applies the precision, as in a process alone.
            made = Accelerator(cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no", **options)
        finally:
            if asked is not None:
                os.environ[ACCELERATE_FSDP] = asked
    torch.set_num_threads(threads)
    return made


def check_parallel(recipe: Recipe) -> None:
    """Refuse what several processes can't do together; alone, nothing is asked.

    Raises:
        RecipeError: accelerate is configured for what this has not, or FSDP is asked to do what it can't.
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
    if recipe.task == "finetune":  # of a recipe that says so itself it is said earlier
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
