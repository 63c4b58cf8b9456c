"""Compare the speed of training with that of the plain implementation in :mod:`benchmarks.plain`.

`make bench-train` runs it. All ways to train start from the same weights and take steps on the same batch, by
turns. Each runs in a process of its own, so that memory which another one freed doesn't help it. Times are
medians. The last line printed is JSON:

- ``ratio_float32``, ``ratio_bfloat16``: images per second of this project's steps, divided by those of the
  plain float32 step.
- ``peak_memory_ratio_…``: peak memory of the process, divided by that of the plain one. Both include Python
  and torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from qat_export.bench.peak_memory import own_peak_rss_bytes
from torch import Tensor, nn

from benchmarks.plain import PlainBNext, optimizer
from qat.models.bnext import BNext, binary_convolutions, set_temperature
from qat.quantize.calibration import calibrate
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Optimizer, Quantization
from qat.system.memory import keep_pages
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from qat.train.optimizer import make_optimizer
from qat.train.precision import autocast

LEARNING_RATE = 1e-4
PLAIN, FAKE_QUANTIZED = "plain", "fake-quantized"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Settings:
    """Settings that all ways to train share; see the command's options."""

    batch: int
    side: int
    threads: int
    temperature: float

    def data(self) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in 0 to 1, and labels (N,)."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.batch, 3, self.side, self.side, generator=generator)
        return images, torch.randint(0, 10, (self.batch,), generator=generator)


class Trainer:
    """One way to train, with a step like that of the training loop.

    Args:
        name: ``plain``, ``float32``, ``bfloat16`` or ``fake-quantized``.
        settings: settings of the data, the threads, and the temperature of the weights.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        """Make network and optimizer."""
        self.images, self.labels = settings.data()
        self.bfloat16 = name == "bfloat16"
        torch.manual_seed(0)
        ours = BNext(10).train()
        set_temperature(ours, settings.temperature)
        self.model: nn.Module = ours
        if name == PLAIN:
            self.model = PlainBNext(10).train()
            self.model.load_state_dict(ours.state_dict())
            self.optimizer = optimizer(self.model, LEARNING_RATE)
            return
        if name == FAKE_QUANTIZED:
            # Calibration runs in evaluation mode, with running statistics, which a new network lacks.
            reestimate_batch_norm(ours, lambda: ours(self.images))
            prepare(ours, Quantization(), image_grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
            calibrate(ours, lambda: ours(self.images))
            ours.train()
        self.optimizer = make_optimizer(ours, Optimizer(lr=LEARNING_RATE))

    def step(self) -> float:
        """Train on the batch once; returns its loss."""
        with autocast("bfloat16" if self.bfloat16 else "float32", torch.device("cpu")):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.optimizer.step()
        return float(loss.detach())


def serve(name: str, settings: Settings, calls: Connection) -> None:
    """Entry point of the child process, which answers messages from ``calls``.

    The answer to ``True`` is seconds and loss of a step; to ``False`` it is the peak memory in bytes.
    """
    torch.set_num_threads(settings.threads)
    if name != PLAIN:
        keep_pages()  # as `qat` does before it trains
    trainer = Trainer(name, settings)
    while calls.recv():
        started = time.perf_counter()
        loss = trainer.step()
        calls.send((time.perf_counter() - started, loss))
    calls.send(own_peak_rss_bytes())


@dataclass
class Side:
    """A child process that trains in one way, with the losses of its steps and their seconds."""

    process: multiprocessing.process.BaseProcess
    calls: Connection
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, settings: Settings) -> Side:
        """Start the child process for the way to train called ``name``."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, settings, theirs), daemon=True)
        process.start()
        theirs.close()  # so that receiving raises EOFError if the child dies
        return cls(process, ours)

    def step(self) -> None:
        """Let the child take one step, and record its time and loss."""
        self.calls.send(True)
        seconds, loss = self.calls.recv()
        self.seconds.append(seconds)
        self.losses.append(loss)

    def images_per_second(self, batch: int, warm_up: int) -> float:
        """Images per second, from the median time of the steps after the warm-up."""
        return batch / statistics.median(self.seconds[warm_up:])

    def finish(self) -> int | None:
        """End the child; returns its peak memory in bytes, or None if the operating system doesn't tell."""
        self.calls.send(False)
        peak: int | None = self.calls.recv()
        self.process.join()
        return peak


def check_same(temperature: float) -> None:
    """End the program unless both implementations have the same loss and gradients in float64.

    In float32 their losses differ from the first step on, since rounding errors change the signs of values
    near zero.
    """
    torch.manual_seed(0)
    ours, plain = BNext(10).double().train(), PlainBNext(10).double().train()
    set_temperature(ours, temperature)
    with torch.no_grad():
        for layer in binary_convolutions(ours).values():
            # A few of millions of random weights are 0. Their sign is +1 in this project and 0 in the plain
            # network.
            layer.weight[layer.weight == 0] = 1e-9
        for norm in ours.modules():
            # Without an offset, a sum of signs that equals its channel's mean would be normalized to 0, the
            # kink of PReLU, where rounding errors decide which gradient is used.
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.uniform_(-0.1, 0.1)
    plain.load_state_dict(ours.state_dict())
    images, labels = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    found = []
    for model in (ours, plain):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        norms = [p.grad.norm() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        found.append(torch.stack([loss.detach(), *norms]))
    error = float(((found[0] - found[1]).abs() / found[1].abs().clamp_min(1e-12)).max())
    print(f"float64: loss and {len(found[0]) - 1} gradient norms differ by at most {error:.1e}")
    if error > 1e-6:
        raise SystemExit("not the same network")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="images/s of training, against a plain implementation")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the binary weights; 1e-8: ±1")
    parser.add_argument("--fake-quantized", action="store_true", help="also a step with fake quantization")
    options = parser.parse_args()
    settings = Settings(options.batch, options.side, options.threads, options.temperature)
    torch.set_num_threads(options.threads)

    check_same(options.temperature)
    names = [PLAIN, "float32", "bfloat16"] + [FAKE_QUANTIZED] * options.fake_quantized
    every = {name: Side.start(name, settings) for name in names}
    for done in range(options.warm_up + options.steps):
        for one in every.values():
            one.step()
        print(f"\rstep {done + 1} of {options.warm_up + options.steps}", end="", flush=True)
    print()
    speeds = {name: one.images_per_second(options.batch, options.warm_up) for name, one in every.items()}
    peaks = {name: one.finish() for name, one in every.items()}
    result: dict[str, float] = {}
    for name, speed in speeds.items():
        losses = ", ".join(f"{loss:.4f}" for loss in every[name].losses[:4])
        ratio, peak, most = speed / speeds[PLAIN], peaks[name], peaks[PLAIN]
        memory = "" if peak is None else f"   peak {peak / MEGABYTE:.0f} MB"
        print(f"{name:15} {speed:7.1f} images/s   {ratio:.2f}×{memory}   first losses {losses}")
        if name != PLAIN:
            result[f"ratio_{name}"] = round(ratio, 3)
            if peak is not None and most is not None:
                result[f"peak_memory_ratio_{name}"] = round(peak / most, 3)
    if FAKE_QUANTIZED in speeds:
        result["fake_quantization_overhead"] = round(speeds["float32"] / speeds[FAKE_QUANTIZED] - 1, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
