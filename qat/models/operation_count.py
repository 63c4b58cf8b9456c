"""Parameters, bytes and operations of a network, counted from its architecture alone.

Operations are counted as the paper does (arXiv 2211.12933), in multiply-accumulates::

    OPs = binary MACs / 64 + int8 MACs / 8

since a 64-bit word holds 64 signs or 8 bytes. What is counted: every convolution and the classifier, nothing
else. At 224 pixels and 1000 classes that gives 0.0769, 0.1720, 0.3169 and 0.8198 G for tiny, small, middle
and large; published are 0.077, 0.172, 0.317 and 0.819 G, so the deviation is at most 0.1%. Other conventions
lie farther away. Leaving out the channel attention: -0.1 to -0.3%. Also counting each batch normalization as
one int8 MAC per value: +0.7 to +1.5%. The rest in float, where a MAC counts as one operation: +4 to +15%.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from qat.errors import QuantizationError
from qat.models.bnext import Architecture
from qat.nn.layers import SE_REDUCTION

#: Multiply-accumulates of signs, and of bytes, that count as one operation.
BINARY_PER_OPERATION: Final = 64
INT8_PER_OPERATION: Final = 8

Kind = Literal["stem", "binary", "se", "classifier"]


@dataclass(frozen=True)
class LayerOperations:
    """One layer, for one image.

    Attributes:
        name: module name in the network; the two layers of a channel attention are one entry.
        kind: ``stem``, ``binary`` (a convolution of signs), ``se`` or ``classifier``.
        shape: channels out, channels in, and the two sides of the kernel; of the first layer for ``se``.
        side: height and width of the output in pixels; 1 for ``se`` and ``classifier``.
        weights: number of weights, without biases.
        macs: multiply-accumulates; a convolution's padding is counted like the image.
    """

    name: str
    kind: Kind
    shape: tuple[int, int, int, int]
    side: int
    weights: int
    macs: int

    @property
    def binary(self) -> bool:
        """Whether its weights and its input have one bit; 8 bits (or float before quantization) otherwise."""
        return self.kind == "binary"


@dataclass(frozen=True)
class Parameters:
    """Learned numbers of a network by what they become; all that its state dict has but buffers.

    Attributes:
        binary: weights of binary convolutions, one bit each.
        weights: of stem, channel attention and classifier: 8 bits each once quantized.
        others: biases, batch normalizations, PReLU slopes and mix scales.
    """

    binary: int
    weights: int
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.binary + self.weights + self.others

    @property
    def float32_bytes(self) -> int:
        """Bytes with every parameter in float32."""
        return 4 * self.total

    def packed_bytes(self, weight_bits: int, other_bits: int | None = None) -> int:
        """Bytes with one bit per binary weight, rounded up to whole bytes.

        Args:
            weight_bits: of each weight of stem, channel attention and classifier.
            other_bits: of each other parameter; ``None`` means ``weight_bits``.
        """
        other_bits = weight_bits if other_bits is None else other_bits
        bits = self.binary + weight_bits * self.weights + other_bits * self.others
        return -(-bits // 8)


@dataclass(frozen=True)
class Operations:
    """What one image costs; see the module for what is counted.

    Attributes:
        architecture, image_size: what was counted; the size in pixels.
        layers: in forward order.
        parameters: how many there are.
    """

    architecture: Architecture
    image_size: int
    layers: tuple[LayerOperations, ...]
    parameters: Parameters

    @property
    def bops(self) -> int:
        """Binary multiply-accumulates."""
        return sum(layer.macs for layer in self.layers if layer.binary)

    @property
    def int8_macs(self) -> int:
        """Multiply-accumulates of stem, channel attention and classifier once they are quantized."""
        return sum(layer.macs for layer in self.layers if not layer.binary)

    @property
    def float_macs(self) -> int:
        """The same layers before quantization: what the float-rest network computes in float."""
        return self.int8_macs

    @property
    def ops(self) -> float:
        """``bops / 64 + int8_macs / 8``: after quantization."""
        return self.bops / BINARY_PER_OPERATION + self.int8_macs / INT8_PER_OPERATION

    @property
    def float_rest_ops(self) -> float:
        """``bops / 64 + float_macs``: before quantization."""
        return self.bops / BINARY_PER_OPERATION + self.float_macs


def operations(architecture: Architecture, image_size: int) -> Operations:
    """Count the layers of ``architecture`` for one square image.

    Args:
        architecture: which BNext.
        image_size: height and width in pixels; odd sides are rounded up by a stride of 2.

    Raises:
        QuantizationError: an image without pixels.
    """
    if image_size < 1:
        raise QuantizationError(f"image_size {image_size}: need at least 1 pixel")
    arch = architecture
    side = _halved(image_size, arch.stem_stride)
    layers = [_convolution("feature.0.conv1", "stem", arch.widths[0], 3, 3, side)]
    others = 3 * arch.widths[0]  # BN and a PReLU that nothing uses
    for i, (channels, after) in enumerate(pairwise(arch.widths), start=1):
        side = _halved(side, 2 if i >= 2 and after != channels else 1)
        spatial = "Attention" if arch.elm_attention else "FFN_3x3"
        pointwise = ("FFN",) if after == channels else ("FFN_1", "FFN_2")
        for name in (spatial, *pointwise):
            kernel = 3 if name == spatial else 1
            prefix = f"feature.{i}.{name}"
            layers.append(_convolution(f"{prefix}.binary_conv", "binary", channels, channels, kernel, side))
            others += 7 * channels  # move, two BN, two PReLU
            if arch.infor_recoupling:
                hidden = max(channels // SE_REDUCTION, 1)
                weights = 2 * channels * hidden
                shape = (hidden, channels, 1, 1)
                layers.append(LayerOperations(f"{prefix}.se", "se", shape, 1, weights, weights))
                others += channels + channels + hidden  # mix scale, two biases
    layers.append(_convolution("fc", "classifier", arch.num_classes, arch.widths[-1], 1, 1))
    others += arch.widths[-1] + arch.num_classes  # the head's PReLU, the classifier's bias
    binary = sum(layer.weights for layer in layers if layer.binary)
    weights = sum(layer.weights for layer in layers if not layer.binary)
    return Operations(arch, image_size, tuple(layers), Parameters(binary, weights, others))


def _halved(side: int, stride: int) -> int:
    """Side after a 3×3 convolution with padding 1: ``⌈side / stride⌉``."""
    return -(-side // stride)


def _convolution(
    name: str, kind: Kind, channels_out: int, channels_in: int, kernel: int, side: int
) -> LayerOperations:
    weights = channels_out * channels_in * kernel**2
    shape = (channels_out, channels_in, kernel, kernel)
    return LayerOperations(name, kind, shape, side, weights, weights * side**2)
