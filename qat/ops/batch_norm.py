"""Batch normalization whose statistics are those of all processes' images.

What a batch normalization computes from a batch depends on the whole batch, so with several processes the
moments of each are put together by the number of its values, forward and backward. Alone it is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.system.collectives import of_each, summed, world


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
    parts = of_each(own)
    counts = parts[:, -1:].detach()
    total = counts.sum()
    shares = counts / total
    means, variances = parts[:, :-1].chunk(2, dim=1)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


def correction(count: float | Tensor) -> float | Tensor:
    """``n / (n − 1)``, by which a variance is multiplied that is to be unbiased; 1 for a single value."""
    if isinstance(count, Tensor):
        return count / (count - 1).clamp_min(1)
    return count / max(count - 1, 1)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, but for the batch that its statistics are of: that of all processes."""

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
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        wide = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        mean, variance, count = global_moments(mean, variance, x.numel() // x.shape[1])
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        unbiased = variance * correction(count)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        invstd = torch.rsqrt(variance + norm.eps)
    result: Tensor = _SyncedNorm.apply(x, norm.weight, norm.bias, mean, invstd, count)  # type: ignore[no-untyped-call]
    return result


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
