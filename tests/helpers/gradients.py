"""Random values in float64, and gradients to compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels).double()
    with torch.no_grad():
        layer.weight.copy_(values(channels, seed=1))
        layer.bias.copy_(values(channels, seed=2))
    return layer


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * values(*out.shape, seed=9)).sum(), inputs)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
