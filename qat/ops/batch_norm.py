"""Batch normalization: statistics of all processes' images, running statistics, folding to a gain and offset.

What a batch normalization computes from a batch depends on the whole batch, so with several processes the
moments of each are put together by the number of its values, forward and backward. Alone it is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.ops.planes import apply
from qat.ops.pooling import moments
from qat.system.collectives import gathered, summed, world


def global_moments(mean: Tensor, variance: Tensor, count: float) -> tuple[Tensor, Tensor, float | Tensor]:
    """Moments of the values of all processes from those of this one; differentiable.

    ``mean = Σ nᵣ mᵣ / n``, ``variance = Σ nᵣ (vᵣ + (mᵣ − mean)²) / n``: no difference of large numbers.

    Args:
        mean: (C,).
        variance: (C,), without correction.
        count: values per channel they were taken of; 0 where this process has none.

    Returns:
        The same of all processes together; their count is a scalar tensor, so that nobody waits for it.
    """
    if world().size == 1:
        return mean, variance, count
    if not count:
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
    own = torch.cat([mean, variance, mean.new_full((1,), count)])
    parts = gathered(own)
    counts = parts[:, -1:].detach()
    total = counts.sum()
    shares = counts / total
    means, variances = parts[:, :-1].chunk(2, dim=1)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


def takes_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` is in training, and its running statistics are moving averages."""
    return norm.training and norm.momentum is not None and norm.track_running_stats and norm.affine


def update_running_statistics(
    norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: float | Tensor
) -> None:
    """Count a batch, and let the running statistics follow its moments.

    Args:
        norm: with running statistics; changed in place.
        mean: (C,).
        variance: (C,), without correction; the running one is unbiased, ``n / (n − 1)`` times as large.
        count: n, values per channel.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    # No momentum means the plain average of all batches, as in torch.
    momentum: float | Tensor | None = norm.momentum
    if momentum is None:
        momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * _correction(count)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)


def _correction(count: float | Tensor) -> float | Tensor:
    """``n / (n − 1)``; 1 for a single value."""
    if isinstance(count, Tensor):
        return count / (count - 1).clamp_min(1)
    return count / max(count - 1, 1)


def folded_batch_norm(norm: nn.BatchNorm2d, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Gain and offset with running statistics: ``BN(x) = gain ⊙ x + offset``, differentiable, (C,) each.

    Args:
        norm: with running statistics.
        dtype: to compute in; the type of the parameters by default. What is exported is folded in float64
            (:mod:`qat.quantize.folding`).
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias, mean, variance = (tensor if dtype is None else tensor.to(dtype) for tensor in tensors)
    gain = weight * torch.rsqrt(variance + norm.eps)
    return gain, bias - mean * gain


def batch_gain_and_offset(
    norm: nn.BatchNorm2d, factor: Tensor, mean: Tensor, variance: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    """Gain and offset of ``BN(factor ⊙ x) = gain ⊙ factor ⊙ x + offset`` with batch statistics.

    They follow from the moments of each image of ``x``: the variance of a channel is the mean of the images'
    variances and the variance of their means, so that no difference of large numbers occurs. The batch is
    that of all processes, and counts for the running statistics.

    Args:
        norm: in training, with running statistics.
        factor, mean, variance: (N, C), the last two of ``x``.
        pixels: of an image of ``x``.

    Returns:
        (C,) each.
    """
    means = factor * mean
    center = means.mean(0)
    spread = (factor.square() * variance).mean(0) + (means - center).square().mean(0)
    center, spread, count = global_moments(center, spread, len(mean) * pixels)
    with torch.no_grad():
        update_running_statistics(norm, center, spread, count)
    gain = norm.weight * torch.rsqrt(spread + norm.eps)
    return gain, norm.bias - center * gain


def gain_and_offset(
    norm: nn.BatchNorm2d, factor: Tensor, x: Tensor, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gain and offset of ``BN(factor ⊙ x)``, or of ``BN(factor ⊙ x ⊙ times)``: (C,) each.

    With the batch's statistics in training, else with the running ones.

    Args:
        norm: with running statistics.
        factor: (N, C).
        x, times: (N, C, H, W).
    """
    if not norm.training:
        return folded_batch_norm(norm)
    product = x if times is None else x * times
    return batch_gain_and_offset(norm, factor, *moments(product), x.shape[2:].numel())


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, but for the batch that its statistics are of: that of all processes.

    Attributes:
        frozen: while true, :meth:`train` leaves it in evaluation mode, with the running statistics it has.
    """

    frozen = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        """Enter training mode, unless it is frozen."""
        return super().train(mode and not self.frozen)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → same shape."""
        if world().size == 1 or not self.training:
            return super().forward(input)
        return synced_batch_norm(input, self)


def synced_batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``BN(x)`` in training mode with the statistics of all processes; updates the running ones.

    Args:
        x: (N, C, H, W), this process's images.
        norm: affine, with running statistics.
    """
    with torch.no_grad():
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        mean, variance, count = global_moments(mean, variance, x.numel() // x.shape[1])
        update_running_statistics(norm, mean, variance, count)
        invstd = torch.rsqrt(variance + norm.eps)
    return apply(_SyncedNorm, x, norm.weight, norm.bias, mean, invstd, count)


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1)


class _SyncedNorm(torch.autograd.Function):
    """``(x − mean) · invstd · weight + bias``; the gradient knows that mean and invstd come from all x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.count = count
        gain = weight * invstd
        return torch.addcmul(_channels(bias - mean * gain, x), x, _channels(gain, x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        (grad,) = grads
        by_bias = grad.sum((0, 2, 3), dtype=mean.dtype)
        centred = (x - _channels(mean, x)) * _channels(invstd, x)
        by_weight = (grad * centred).sum((0, 2, 3), dtype=mean.dtype)
        # Of the loss of all processes, whose statistics depend on each value; parameters are averaged later.
        sums = summed(torch.cat([by_bias, by_weight])) / ctx.count
        mean_grad, mean_product = sums.chunk(2)
        gain = _channels(weight * invstd, grad)
        grad_x = (grad - _channels(mean_grad, grad) - centred * _channels(mean_product, grad)) * gain
        return grad_x, by_weight.to(weight.dtype), by_bias.to(weight.dtype), None, None, None
