"""What each fast path of a training step gains: `python -m benchmarks.fast_paths`.

One network is trained in one process. In each round it takes a step with all fast paths, and one with each
path switched off, in an order that changes from round to round; the table shows the median over rounds of the
step without the path, over the step with all of them. 1.03 says that a step takes 3 % longer without it.
The spread is that of two equal steps in the same rounds: what lies within it is noise.

Paths that serve only where the native library can't be used are measured with torch's operators alone
(``--torch``); ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` lets torch compute as a processor without
AVX-512 does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.train import FAKE_QUANTIZED, Settings, Trainer
from qat.native.bindings import torch_alone
from qat.ops import binary, convolution, planes, pooling
from qat.system.memory import keep_pages


class _PlainMean:
    """torch's mean in place of the autograd function of :func:`qat.ops.pooling.spatial_mean`."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _no(*arguments: object, **named: object) -> bool:
    return False


#: The module and the name in it that a path depends on, and the value that switches the path off.
PATHS: dict[str, tuple[Any, str, Any]] = {
    "2×2 pooling as a matrix product": (pooling, "NARROW", 0),
    "mean's gradient divided before it is spread": (pooling, "_Mean", _PlainMean),
    "fewer products for tiny images": (convolution, "_has_transforms", _no),
    "tap by tap (bfloat16)": (convolution, "SMALL_SIDE", 0),
    "weights' gradient as a convolution (bfloat16)": (convolution, "HALF_SIDE", 0),
    "XNOR and popcount": (convolution, "can_sum", _no),
    "no copy of weights within the clip": (binary, "lies_within", _no),
    "one value per pixel of tiny planes": (planes, "REGISTER", 0),
    "dot products in portions of the cache": (planes, "PORTION", 2**62),
}


@contextmanager
def without(path: str | None) -> Iterator[None]:
    """A block in which the named path is switched off; none for ``None``."""
    if path is None:
        yield
        return
    module, name, off = PATHS[path]
    before = getattr(module, name)
    setattr(module, name, off)
    try:
        yield
    finally:
        setattr(module, name, before)


def seconds(step: Callable[[], object]) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def measure(trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Ratios of a step without each path to a step with all, one a round; of ``""`` both steps are equal."""
    order = random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in ("", *PATHS)}
    trainer.step()
    for name in PATHS:  # each variant's first step makes what later ones find
        with without(name):
            trainer.step()
    for _ in range(rounds):
        names = list(ratios)
        order.shuffle(names)
        for name in names:
            base = seconds(trainer.step)
            with without(name or None):
                ratios[name].append(seconds(trainer.step) / base)
    return ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what each fast path of a training step gains")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="with torch's operators alone")
    parser.add_argument("--kinds", default=f"float32,bfloat16,{FAKE_QUANTIZED}")
    parser.add_argument("--temperatures", default="1.0,1e-8", help="of the binary weights; 1e-8: ±1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_pages()  # as `qat` does before it trains
    result: dict[str, dict[str, float]] = {}
    with torch_alone() if options.torch else nullcontext():
        for temperature in map(float, options.temperatures.split(",")):
            for kind in options.kinds.split(","):
                settings = Settings(options.batch, options.side, options.threads, temperature)
                ratios = measure(Trainer(kind, settings), options.rounds)
                spread = statistics.quantiles(ratios[""], n=4)
                case = f"{kind}, T = {temperature:g}"
                print(f"{case}: two equal steps {spread[0]:.3f} to {spread[2]:.3f} (quartiles)")
                result[case] = {name: round(statistics.median(r), 3) for name, r in ratios.items() if name}
                for name, ratio in result[case].items():
                    print(f"  {ratio:6.3f}  {name}")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
