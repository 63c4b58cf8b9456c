"""The specification of an integer network's numbers: an interpreter in NumPy.

This file alone defines what an integer network computes, and every export is compared with it, tensor by
tensor. It is meant to be read from top to bottom together with :mod:`qat_export.integer.network`, which says
what each constant is. The operations come first, a few lines each, then :class:`Interpreter`, which applies
them in the order of the network.

Rules that hold everywhere:

- ``rint`` rounds half to even; ``saturate`` clamps to the grid's integers, after rounding.
- A multiplier is float32. An integer is converted to float32 and multiplied by it in one float32
  multiplication; two such products are added in one float32 addition. Nothing is fused or reordered.
- Products with a :class:`~qat.quantize.dyadic.Dyadic`, sums of two of them, and products with a slope of a
  PReLU are exact in float32, in any order of operations. Here they are computed in float64.
- Convolutions, sums and linear layers are exact int32 sums.

Activations are (N, C, H, W) and vectors (N, C), int16. The interpreter keeps each intermediate tensor under
the name that it has in exported graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat.quantize.dyadic import ACCUMULATOR_UNIT, Dyadic
from qat_export.integer.network import GAIN, Affine, Attention, BinaryConv, IntegerNetwork, Slopes, SubBlock

Array = NDArray[Any]
F32 = np.float32


def saturate(values: Array, grid: Grid) -> Array:
    """Round half to even, then clamp to the grid's integers: any shape → int16."""
    return np.clip(np.rint(values), grid.low, grid.high).astype(np.int16)


def requantize(accumulator: Array, bias: Array, multiplier: Array, grid: Grid) -> Array:
    """``saturate(float32(accumulator + bias) * multiplier)``: accumulator (N, C, ...), constants (C,)."""
    shape = (1, -1) + (1,) * (accumulator.ndim - 2)
    total = accumulator.astype(np.int32) + bias.reshape(shape)
    return saturate(total.astype(F32) * multiplier.reshape(shape), grid)


def convolve(x: Array, weight: Array, stride: int) -> Array:
    """Exact integer convolution: x (N, I, H, W), weight (O, I, k, k), zero padding k // 2 → int32."""
    size, (n, channels) = weight.shape[-1], x.shape[:2]
    pad = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))[:, :, ::stride, ::stride]
    height, width = windows.shape[2:4]
    columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * height * width, channels * size * size)
    # float64 holds every partial sum exactly, and NumPy's matrix product is much faster on it than on int32.
    out = columns.astype(np.float64) @ weight.reshape(len(weight), -1).T.astype(np.float64)
    return out.astype(np.int32).reshape(n, height, width, len(weight)).transpose(0, 3, 1, 2)


def signs(x: Array, conv: BinaryConv) -> Array:
    """+1 if ``x`` is at least the threshold of its channel, else -1: (N, C, H, W) → int8."""
    return np.where(x >= conv.threshold.reshape(1, -1, 1, 1), 1, -1).astype(np.int8)


def prelu(x: Array, slopes: Slopes, grid: Grid) -> Array:
    """``x`` if it is not negative, else ``saturate(x * slope)``, with a slope per channel: (N, C, H, W)."""
    products = x.astype(np.int32) * slopes.integers.reshape(1, -1, 1, 1)
    return np.where(x >= 0, x, saturate(np.ldexp(products, -slopes.shift), grid))


def multiply(a: Array, b: Array, multiplier: Dyadic, grid: Grid) -> Array:
    """``saturate(a * b * multiplier)``."""
    products = a.astype(np.int32) * b.astype(np.int32) * multiplier.integer
    return saturate(np.ldexp(products.astype(np.float64), -multiplier.shift), grid)


def pad_to_even(x: Array) -> Array:
    """Repeat the last row if H is odd, and the last column if W is odd: (N, C, H, W)."""
    return np.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, x.shape[3] % 2)), mode="edge")


def pool2x2(x: Array, grid: Grid) -> Array:
    """Mean of each 2×2 window, rounded half to even, after :func:`pad_to_even`."""
    x = pad_to_even(x).astype(np.int32)
    total = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
    return saturate(total / 4, grid)


def mean_in_steps(x: Array, multiplier: Array | F32) -> Array:
    """``float32(sum over the image) * (multiplier / pixels)``: (N, C, H, W) → (N, C) float32.

    The quotient in brackets is computed first and rounded to float32.
    """
    pixels = F32(x.shape[2] * x.shape[3])
    total: Array = x.sum((2, 3), dtype=np.int32).astype(F32)
    return total * (multiplier / pixels).astype(F32)


class Interpreter:
    """Executes an integer network; :attr:`tensors` has every intermediate tensor of the last run by name."""

    def __init__(self, network: IntegerNetwork) -> None:
        """Take the network to execute."""
        self.network = network
        self.tensors: dict[str, Array] = {}

    def __call__(self, images: Array) -> NDArray[np.float32]:
        """Normalized float32 images (N, 3, H, W) → logits (N, classes) float32."""
        grid = self.network.stem.image
        quantized = np.rint(images.astype(F32) / F32(grid.scale)) + grid.zero_point
        return self.run(np.clip(quantized, grid.low, grid.high).astype(np.int16))

    def run(self, image: Array) -> NDArray[np.float32]:
        """Images on the uint8 grid of the network (N, 3, H, W) → logits (N, classes) float32."""
        network, keep = self.network, self.tensors
        keep.clear()
        keep["image"] = image
        stem = network.stem
        accumulator = convolve(image - stem.image.zero_point, stem.conv.weight, stem.stride)
        x = requantize(accumulator, stem.conv.bias, stem.conv.multiplier, network.stem_grid)
        keep["feature.0/trunk"] = x
        for block in network.blocks:
            x = self.sub_block(block.spatial, x, block.input_grid, block.middle_grid)
            keep[f"{block.name}/trunk_mid"] = x
            parts = [self.sub_block(sub, x, block.middle_grid, block.output_grid) for sub in block.pointwise]
            x = np.concatenate(parts, axis=1)
            keep[f"{block.name}/trunk_out"] = x
        return self.head(x)

    def sub_block(self, sub: SubBlock, x: Array, source: Grid, output: Grid) -> Array:
        """One sub-block: input on the grid ``source``, result on the grid ``output``.

        - ``y``: PReLU2 of the requantized binary convolution of the input's signs
        - residual: the input; in the scale kind PReLU1 of it; at stride 2 its 2×2 means
        - branch: ``gain * y``, in the scale kind times the residual, plus BN2's offset; or ``y`` itself
        - result: ``branch * branch_multiplier + residual * residual_multiplier``
        """
        keep, conv, name = self.tensors, sub.conv, sub.name
        accumulator = convolve(signs(x, conv), conv.weight(), conv.stride) * ACCUMULATOR_UNIT
        q = requantize(accumulator, conv.bias, conv.multiplier, sub.y_grid)
        y = prelu(q, sub.slopes, sub.y_grid)
        keep[f"{name}/conv"], keep[f"{name}/y"] = q, y

        residual = x
        if sub.residual_slopes is not None:
            residual = keep[f"{name}/prelu1"] = prelu(x, sub.residual_slopes, source)
        if conv.stride == 2:
            residual = keep[f"{name}/residual"] = pool2x2(residual, source)

        branch = y
        if sub.branch is not None:
            if sub.attention is not None:
                gain = self.attention(sub.attention, pad_to_even(x) if conv.stride == 2 else x, y, name)
            else:
                assert sub.branch.gain is not None
                gain = sub.branch.gain[None, :]
            gain = gain[:, :, None, None]
            if sub.branch.product is not None and sub.branch.second is not None:
                branch = keep[f"{name}/product"] = multiply(y, gain, sub.branch.first, sub.branch.product)
                branch = multiply(branch, residual, sub.branch.second, sub.branch.grid)
            else:
                branch = multiply(y, gain, sub.branch.first, sub.branch.grid)
            keep[f"{name}/branch"] = branch
            branch = saturate(
                branch + sub.branch.offset.reshape(1, -1, 1, 1).astype(np.int32), sub.branch.grid
            )
            keep[f"{name}/normalized"] = branch
        total = branch * sub.branch_multiplier.value + residual * sub.residual_multiplier.value
        return saturate(total, output)

    def attention(self, attention: Attention, x: Array, y: Array, name: str) -> Array:
        """The gain vector (N, C) int16: the attention, computed from ``x`` and ``y``, times BN2's gain."""
        keep = self.tensors
        mix = mean_in_steps(x, attention.input_mean) + mean_in_steps(y, attention.y_mean)
        pooled = keep[f"{name}/pooled"] = saturate(mix, attention.pooled)
        hidden = keep[f"{name}/hidden"] = self.linear(pooled, attention.reduce, attention.hidden)
        logits = keep[f"{name}/logits"] = self.linear(hidden, attention.expand, attention.logits)
        share = keep[f"{name}/attention"] = attention.table[logits + 128]
        return saturate(share.astype(F32) * attention.gain, GAIN)

    @staticmethod
    def linear(x: Array, layer: Affine, grid: Grid) -> Array:
        """(N, I) → (N, O) on ``grid``. If the grid is unsigned, saturation acts as a ReLU."""
        accumulator = x.astype(np.int32) @ layer.weight.reshape(len(layer.weight), -1).T.astype(np.int32)
        return requantize(accumulator, layer.bias, layer.multiplier, grid)

    def head(self, x: Array) -> NDArray[np.float32]:
        """(N, C, H, W) → logits (N, classes) float32."""
        head = self.network.head
        x = self.tensors["head/prelu"] = prelu(x, head.slopes, self.network.blocks[-1].output_grid)
        pooled = self.tensors["head/input"] = saturate(mean_in_steps(x, head.mean), head.input)
        accumulator = (
            pooled.astype(np.int32) @ head.classifier.weight.T.astype(np.int32) + head.classifier.bias
        )
        logits: NDArray[np.float32] = accumulator.astype(F32) * head.classifier.multiplier
        return logits
