"""Measure the memory of processes that train together, each with the whole network (DDP) or a part (FSDP).

``torchrun --standalone --nproc-per-node 2 -m benchmarks.sharding --size large --parallel fsdp`` prints, for
each process, the peak resident memory of several phases: making the network, training steps, gathering the
whole network for an evaluation, and gathering the state that is saved. It includes Python and torch. Linux
only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from qat_export.bench.peak_memory import own_peak_rss_bytes

from qat.evaluation import predictor
from qat.models.bnext import WIDTHS, BNext
from qat.recipe.schema import Optimizer
from qat.system.collectives import joined, rows_of_all
from qat.train.capture import Parts, capture
from qat.train.optimizer import make_optimizer
from qat.train.parallel import Parallel
from qat.train.sharding import local_part, shard, whole_network

GIGABYTE = 1e9


class Peaks:
    """Peak memory of this process in each of several phases."""

    def __init__(self) -> None:
        """Begin the first phase."""
        self.seen: dict[str, float] = {}
        self._begin()

    def end(self, phase: str) -> None:
        """Record the peak memory of the phase that ends here, in GB, and begin the next one."""
        self.seen[phase] = (own_peak_rss_bytes() or 0) / GIGABYTE
        self._begin()

    def _begin(self) -> None:
        # Writing 5 resets the peak to the present memory.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(options: argparse.Namespace) -> tuple[dict[str, float], float, float]:
    """Peaks in GB by phase; GB of weights, gradients and optimizer's moments; seconds of the fastest step."""
    peaks, cpu = Peaks(), torch.device("cpu")
    torch.manual_seed(0)
    model = BNext(1000, options.size).train()
    if options.parallel == "fsdp":
        shard(model, cpu)
    optimizer = make_optimizer(model, Optimizer())
    network = Parallel(model, cpu)
    peaks.end("made")
    images = torch.rand(options.batch, 3, options.side, options.side)
    labels = torch.randint(0, 1000, (options.batch,))
    fastest = float("inf")
    for _ in range(options.steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        fastest = min(fastest, time.perf_counter() - started)
    peaks.end("steps")
    held: list[torch.Tensor] = list(model.parameters())
    held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held += [moment for state in optimizer.state.values() for moment in state.values()]
    size = sum(local_part(tensor).nbytes for tensor in held) / GIGABYTE
    predictor(whole_network(model))(images)
    peaks.end("evaluation")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    capture(Parts(model, optimizer, scheduler, cpu))
    peaks.end("state")
    return peaks.seen, size, fastest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="memory of processes that train together")
    parser.add_argument("--size", choices=list(WIDTHS), default="large")
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="fsdp")
    parser.add_argument("--batch", type=int, default=2, help="images of each process")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("only Linux tells how much memory a process held")
    torch.set_num_threads(1)
    with joined() as world:
        if world.size == 1:
            parser.error("start several processes: torchrun --nproc-per-node 2 -m benchmarks.sharding")
        peaks, size, fastest = measure(options)
        rows = rows_of_all(torch.tensor([[*peaks.values(), size, fastest]]))
        if world.rank == 0:
            for rank, row in enumerate(rows.tolist()):
                texts = [f"{name} {value:.2f}" for name, value in zip((*peaks, "tensors"), row, strict=False)]
                print(f"{options.parallel}, process {rank}: {', '.join(texts)} GB; {row[-1]:.1f} s a step")
    sys.stdout.flush()
    os._exit(0)  # see `_leave_together` of qat.cli.group


if __name__ == "__main__":
    main()
