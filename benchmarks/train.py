"""Training speed against the plain implementation of :mod:`benchmarks.plain`: `make bench-train`.

Both start from the same weights and see the same batches, step by step in turn, in one process; medians.
The last line printed is JSON with ``ratio_float32`` and ``ratio_bfloat16``: how many times as many images per
second, this project's float32 and bfloat16 steps against the plain float32 step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain import PlainBNext, optimizer
from qat.bnext import BNext, set_temperature
from qat.data import image_grid
from qat.loop import make_optimizer
from qat.prepare import calibrate, prepare
from qat.recipe import Optimizer, Quantization

LEARNING_RATE = 1e-4


@dataclass
class Side:
    """One way to train, its losses and the seconds of its steps."""

    step: Callable[[Tensor, Tensor], float]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, images: Tensor, labels: Tensor) -> None:
        """One timed step."""
        started = time.perf_counter()
        self.losses.append(self.step(images, labels))
        self.seconds.append(time.perf_counter() - started)

    def images_per_second(self, batch: int, warm_up: int) -> float:
        """Median over the steps after the warm-up."""
        return batch / statistics.median(self.seconds[warm_up:])


def side(model: nn.Module, adam: torch.optim.Optimizer, bfloat16: bool = False) -> Side:
    """A step of ``model`` as the training loop does it."""

    def step(images: Tensor, labels: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(images), labels)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        adam.step()
        return float(loss.detach())

    return Side(step)


def sides(temperature: float, fake_quantized: bool, images: Tensor) -> dict[str, Side]:
    """All ways, from the same weights."""
    torch.manual_seed(0)
    start = BNext(10).train()
    set_temperature(start, temperature)
    weights = start.state_dict()

    def ours() -> BNext:
        model = BNext(10).train()
        model.load_state_dict(weights)
        return model

    plain = PlainBNext(10).train()
    plain.load_state_dict(weights)
    settings = Optimizer(lr=LEARNING_RATE)
    float32, bfloat16 = ours(), ours()
    found = {
        "plain": side(plain, optimizer(plain, LEARNING_RATE)),
        "float32": side(float32, make_optimizer(float32, settings)),
        "bfloat16": side(bfloat16, make_optimizer(bfloat16, settings), bfloat16=True),
    }
    if fake_quantized:
        quantized = ours()
        prepare(quantized, Quantization(), image_grid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
        calibrate(quantized, lambda: quantized(images))
        quantized.train()
        found["fake-quantized"] = side(quantized, make_optimizer(quantized, settings))
    return found


def check_same(temperature: float) -> None:
    """End the program unless both implementations have the same loss and gradients in float64.

    In float32 their losses drift apart from the first step on: signs of values next to zero turn rounding
    errors into other networks.
    """
    torch.manual_seed(0)
    ours, plain = BNext(10).double().train(), PlainBNext(10).double().train()
    set_temperature(ours, temperature)
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
    torch.set_num_threads(options.threads)

    check_same(options.temperature)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, options.side, options.side, generator=generator)
    labels = torch.randint(0, 10, (options.batch,), generator=generator)
    every = sides(options.temperature, options.fake_quantized, images)
    for done in range(options.warm_up + options.steps):
        for one in every.values():
            one.run(images, labels)
        print(f"\rstep {done + 1} of {options.warm_up + options.steps}", end="", flush=True)
    print()
    speeds = {name: one.images_per_second(options.batch, options.warm_up) for name, one in every.items()}
    for name, speed in speeds.items():
        losses = ", ".join(f"{loss:.4f}" for loss in every[name].losses[:4])
        print(f"{name:15} {speed:7.1f} images/s   {speed / speeds['plain']:.2f}×   first losses {losses}")
    result = {f"ratio_{name}": round(speed / speeds["plain"], 3) for name, speed in speeds.items()}
    if "fake-quantized" in speeds:
        result["fake_quantization_overhead"] = round(speeds["float32"] / speeds["fake-quantized"] - 1, 3)
    print(json.dumps({key: value for key, value in result.items() if key != "ratio_plain"}))


if __name__ == "__main__":
    main()
