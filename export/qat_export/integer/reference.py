"""The specification of the numbers: a NumPy interpreter of `IntegerNetwork`.

What an integer network computes is defined by this file and nowhere else; every export is compared with it,
tensor by tensor. It is meant to be read in one sitting, from top to bottom, beside
:mod:`qat_export.integer.network`, which says what each constant is: first the operations, a few lines each,
then :class:`Interpreter`, which applies them in the order of the network.

Rules that hold everywhere:

- ``rint`` rounds half to even; ``saturate`` clamps to the grid's integers, after rounding.
- A multiplier is float32. The product of an integer (converted to float32) and a multiplier is one float32
  multiplication; a sum of two such products is one float32 addition. Nothing is fused or reordered.
- Products with a :class:`~qat.quantize.dyadic.Dyadic`, sums of two of them and products with a PReLU's slope
  are exact in float32, whatever the order; here float64 computes them.
- Convolutions, sums and linear layers are exact int32 sums.

Shapes: activations are (N, C, H, W), vectors (N, C); int16 holds every grid. Each intermediate tensor is kept
under the name that exported graphs give it.
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
    """Round half to even, then clamp to the grid's integers: int16."""
    return np.clip(np.rint(values), grid.low, grid.high).astype(np.int16)


def requantize(accumulator: Array, bias: Array, multiplier: Array, grid: Grid) -> Array:
    """``saturate(float32(accumulator + bias) * multiplier)``, per channel (axis 1)."""
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
    # float64 holds every partial sum exactly, and its matrix product is the fast one.
    out = columns.astype(np.float64) @ weight.reshape(len(weight), -1).T.astype(np.float64)
    return out.astype(np.int32).reshape(n, height, width, len(weight)).transpose(0, 3, 1, 2)


def signs(x: Array, conv: BinaryConv) -> Array:
    """+1 where ``x >= threshold`` of the channel, else -1: (N, C, H, W) int8."""
    return np.where(x >= conv.threshold.reshape(1, -1, 1, 1), 1, -1).astype(np.int8)


def prelu(x: Array, slopes: Slopes, grid: Grid) -> Array:
    """``x`` where it is not negative, else ``saturate(x * slope)``, per channel."""
    products = x.astype(np.int32) * slopes.integers.reshape(1, -1, 1, 1)
    return np.where(x >= 0, x, saturate(np.ldexp(products, -slopes.shift), grid))


def multiply(a: Array, b: Array, multiplier: Dyadic, grid: Grid) -> Array:
    """``saturate(a * b * multiplier)``."""
    products = a.astype(np.int32) * b.astype(np.int32) * multiplier.integer
    return saturate(np.ldexp(products.astype(np.float64), -multiplier.shift), grid)


def pad_to_even(x: Array) -> Array:
    """Replicate the last row and column where a side is odd."""
    return np.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, x.shape[3] % 2)), mode="edge")


def pool2x2(x: Array, grid: Grid) -> Array:
    """Mean of each 2×2 window (edge-replicated to even sides), rounded half to even."""
    x = pad_to_even(x).astype(np.int32)
    total = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
    return saturate(total / 4, grid)


def mean_in_steps(x: Array, multiplier: Array | F32) -> Array:
    """``float32(sum) * (multiplier / pixels)`` over the image, quotient first: (N, C) float32."""
    pixels = F32(x.shape[2] * x.shape[3])
    total: Array = x.sum((2, 3), dtype=np.int32).astype(F32)
    return total * (multiplier / pixels).astype(F32)


class Interpreter:
    """Executes a network and keeps every intermediate tensor of the last run in :attr:`tensors`."""

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

        - ``q``: binary convolution of the input's signs, requantized; ``y = PReLU2(q)``
        - residual: the input, through PReLU1 in the scale kind, 2×2 means of it at stride 2
        - branch: ``gain * y``, times the residual in the scale kind, plus BN2's offset; or ``y`` itself
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
        """The gain vector (N, C) int16: attention, from the means of ``x`` and ``y``, times BN2's gain."""
        keep = self.tensors
        mix = mean_in_steps(x, attention.input_mean) + mean_in_steps(y, attention.y_mean)
        pooled = keep[f"{name}/pooled"] = saturate(mix, attention.pooled)
        hidden = keep[f"{name}/hidden"] = self.linear(pooled, attention.reduce, attention.hidden)
        logits = keep[f"{name}/logits"] = self.linear(hidden, attention.expand, attention.logits)
        share = keep[f"{name}/attention"] = attention.table[logits + 128]
        return saturate(share.astype(F32) * attention.gain, GAIN)

    @staticmethod
    def linear(x: Array, layer: Affine, grid: Grid) -> Array:
        """(N, I) → (N, O) on ``grid``; an unsigned grid's 0 is the ReLU of what it holds."""
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
