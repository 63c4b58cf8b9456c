"""The arithmetic of binarization: sign functions and their straight-through estimators.

Each estimator is one custom autograd function: one pass over memory forward, one backward.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.native import passes
from qat.native.bindings import usable
from qat.ops.planes import apply, channel_sums, spread

#: At and above this temperature a weight is ``clamp(w / T, -1, 1)``; below it, exactly ``sign(w)``.
BINARY_TEMPERATURE: Final = 1e-7
#: The straight-through gradient of a binary activation is 1 inside this interval around 0.
ACTIVATION_CLIP: Final = 1.5
#: Latent weights are kept in [-LATENT_CLIP, LATENT_CLIP] while training.
LATENT_CLIP: Final = 1.5


def sign(x: Tensor) -> Tensor:
    """``+1`` where ``x >= 0``, else ``-1``: the sign that one bit can hold. Float, same shape and dtype.

    Without a gradient. NaN gives +1 or -1, by its sign bit.
    """
    # Two passes, which torch vectorizes; the sum gives -0 the sign of 0.
    shifted = x.detach() + 0.0
    return torch.copysign(x.new_ones(()), shifted, out=shifted)


def lies_within(x: Tensor, limit: float) -> bool:
    """Whether no magnitude exceeds ``limit``; False on accelerators, which the answer would make wait."""
    if x.device.type != "cpu" or not x.numel():
        return False
    lowest, highest = torch.aminmax(x)
    return float(lowest) >= -limit and float(highest) <= limit


class _BinarizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zero_is_positive: bool) -> Tensor:
        ctx.save_for_backward(x.abs() < ACTIVATION_CLIP)
        return sign(x) if zero_is_positive else torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _BinarizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, temperature: float) -> Tensor:
        if temperature < BINARY_TEMPERATURE:
            return sign(weight)
        if temperature == 1.0:  # where pretraining starts: a pass over all weights less, mostly even no copy
            return weight.view_as(weight) if lies_within(weight, 1.0) else weight.clamp(-1.0, 1.0)
        return (weight / temperature).clamp_(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def binarize_activation(x: Tensor, zero_is_positive: bool = False) -> Tensor:
    """Binarize a (biased) activation.

    Forward: ``sign(x)``. Backward: ``dL/dx = dL/ds`` where ``|x| < 1.5``, else 0, the straight-through
    estimator of Hubara et al. 2016 (arXiv 1602.02830) with the clip of BNext (arXiv 2211.12933).

    Args:
        x: any shape.
        zero_is_positive: the sign of 0 is +1 if True (fake-quantized and exported networks, where one
            bit must hold the result), 0 if False (the float network, as its authors trained it).
    """
    return apply(_BinarizeActivation, x, zero_is_positive)


def binarize_weight(weight: Tensor, temperature: float) -> Tensor:
    """Weights that a binary convolution uses.

    Forward: ``clamp(w / T, -1, 1)`` while ``T >= 1e-7``, else ``sign(w)`` with ``sign(0) = +1``.
    Backward: identity, ``dL/dw = dL/db`` (progressive weight binarization of BNext, arXiv 2211.12933).

    Args:
        weight: latent weights, any shape.
        temperature: ``T > 0``.
    """
    return apply(_BinarizeWeight, weight, temperature)


def shifted_sign(x: Tensor, bias: Tensor, zero_is_positive: bool = False) -> Tensor:
    """``sign(x + bias)`` with the gradient of :func:`binarize_activation`.

    Args:
        x: (N, C, H, W).
        bias: (1, C, 1, 1).
        zero_is_positive: see :func:`binarize_activation`.

    Returns:
        (N, C, H, W).
    """
    function = _NativeShiftedSign if usable(x) else _ShiftedSign
    return apply(function, x, bias, zero_is_positive)


class _ShiftedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        shifted = x + spread(bias.flatten(), x)
        ctx.save_for_backward(shifted)
        ctx.bias_type = bias.dtype
        return sign(shifted) if zero_is_positive else torch.sign(shifted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (shifted,) = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0], shifted, -ACTIVATION_CLIP, ACTIVATION_CLIP)
        bias = channel_sums(grad, ctx.bias_type)[None, :, None, None] if ctx.needs_input_grad[1] else None
        return grad, bias, None


class _NativeShiftedSign(torch.autograd.Function):
    """``sign(x + bias)``; bias (1, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, zero_is_positive: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        return passes.sign(x, bias.flatten(), zero_is_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, bias = ctx.saved_tensors
        grad, sums = passes.sign_gradient(grads[0], x, bias.flatten(), ACTIVATION_CLIP)
        return grad, sums.sum(0).to(bias.dtype).view_as(bias), None
