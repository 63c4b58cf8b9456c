"""Parameters, bytes and operations of a network, counted from its architecture alone.

Operations are counted as in the paper (arXiv 2211.12933), in multiply-accumulates (MACs)::

    OPs = binary MACs / 64 + int8 MACs / 8

because a 64-bit word holds 64 signs or 8 bytes. Only convolutions and the classifier are counted. At 224
pixels and 1000 classes that gives 0.0769, 0.1720, 0.3169 and 0.8198 G for tiny, small, middle and large. The
paper has 0.077, 0.172, 0.317 and 0.819 G, so the deviation is at most 0.1 %. Other conventions deviate more:
leaving out the channel attention by -0.1 to -0.3 %, counting each batch normalization as one int8 MAC per
value by +0.7 to +1.5 %, and counting a MAC of the float rest as one operation by +4 to +15 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from qat.errors import QuantizationError
from qat.models.bnext import Architecture
from qat.nn.layers import SE_REDUCTION

#: How many multiply-accumulates of signs, and how many of bytes, count as one operation.
BINARY_PER_OPERATION: Final = 64
INT8_PER_OPERATION: Final = 8

Kind = Literal["stem", "binary", "se", "classifier"]


@dataclass(frozen=True)
class LayerOperations:
    """What one layer computes for one image.

    Attributes:
        name: module name in the network; the two layers of a channel attention are one entry.
        kind: ``stem``, ``binary`` (a binary convolution), ``se`` (channel attention) or ``classifier``.
        shape: output channels, input channels, kernel height and kernel width; for ``se`` those of the first
            of its two layers.
        side: height and width of the output in pixels; 1 for ``se`` and ``classifier``.
        weights: number of weights, without biases.
        macs: number of multiply-accumulates, those with a convolution's padding included.
    """

    name: str
    kind: Kind
    shape: tuple[int, int, int, int]
    side: int
    weights: int
    macs: int

    @property
    def binary(self) -> bool:
        """Whether weights and input have one bit. Otherwise they have 8, or are float before quantization."""
        return self.kind == "binary"


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, grouped by how they are stored in a quantized network.

    Attributes:
        binary: weights of binary convolutions, which have one bit each.
        weights: weights of stem, channel attention and classifier, which have 8 bits each after quantization.
        others: biases, scales and biases of batch normalizations, PReLU slopes and mix scales.
    """

    binary: int
    weights: int
    others: int

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.binary + self.weights + self.others

    @property
    def float32_bytes(self) -> int:
        """Size in bytes with every parameter in float32."""
        return 4 * self.total

    def packed_bytes(self, weight_bits: int, other_bits: int | None = None) -> int:
        """Size in bytes with one bit per binary weight, rounded up to whole bytes.

        Args:
            weight_bits: bits of each weight of stem, channel attention and classifier.
            other_bits: bits of each other parameter; ``None`` means ``weight_bits``.
        """
        other_bits = weight_bits if other_bits is None else other_bits
        bits = self.binary + weight_bits * self.weights + other_bits * self.others
        return -(-bits // 8)


@dataclass(frozen=True)
class Operations:
    """The operations for one image; the module's docstring says what is counted.

    Attributes:
        architecture: the network that was counted.
        image_size: height and width of the image in pixels.
        layers: the layers in forward order.
        parameters: numbers of parameters.
    """

    architecture: Architecture
    image_size: int
    layers: tuple[LayerOperations, ...]
    parameters: Parameters

    @property
    def bops(self) -> int:
        """Number of binary multiply-accumulates."""
        return sum(layer.macs for layer in self.layers if layer.binary)

    @property
    def int8_macs(self) -> int:
        """Number of multiply-accumulates in stem, channel attention and classifier after quantization."""
        return sum(layer.macs for layer in self.layers if not layer.binary)

    @property
    def float_macs(self) -> int:
        """Number of multiply-accumulates in the same layers when they are in float."""
        return self.int8_macs

    @property
    def ops(self) -> float:
        """Operations of the quantized network: ``bops / 64 + int8_macs / 8``."""
        return self.bops / BINARY_PER_OPERATION + self.int8_macs / INT8_PER_OPERATION

    @property
    def float_rest_ops(self) -> float:
        """Operations of the network with a float rest: ``bops / 64 + float_macs``."""
        return self.bops / BINARY_PER_OPERATION + self.float_macs


def operations(architecture: Architecture, image_size: int) -> Operations:
    """Count the layers of ``architecture`` for one square image.

    Args:
        architecture: which BNext is counted.
        image_size: height and width of the image in pixels. A stride of 2 halves sides and rounds up.

    Raises:
        QuantizationError: ``image_size`` is below 1.
    """
    if image_size < 1:
        raise QuantizationError(f"image_size {image_size}: need at least 1 pixel")
    arch = architecture
    side = _halved(image_size, arch.stem_stride)
    layers = [_convolution("feature.0.conv1", "stem", arch.widths[0], 3, 3, side)]
    others = 3 * arch.widths[0]  # batch normalization, and a PReLU that the forward pass doesn't use
    for i, (channels, after) in enumerate(pairwise(arch.widths), start=1):
        side = _halved(side, 2 if i >= 2 and after != channels else 1)
        spatial = "Attention" if arch.elm_attention else "FFN_3x3"
        pointwise = ("FFN",) if after == channels else ("FFN_1", "FFN_2")
        for name in (spatial, *pointwise):
            kernel = 3 if name == spatial else 1
            prefix = f"feature.{i}.{name}"
            layers.append(_convolution(f"{prefix}.binary_conv", "binary", channels, channels, kernel, side))
            others += 7 * channels  # bias before the sign, two batch normalizations, two PReLUs
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
    """Side in pixels after a 3×3 convolution with padding 1: ``⌈side / stride⌉``."""
    return -(-side // stride)


def _convolution(
    name: str, kind: Kind, channels_out: int, channels_in: int, kernel: int, side: int
) -> LayerOperations:
    weights = channels_out * channels_in * kernel**2
    shape = (channels_out, channels_in, kernel, kernel)
    return LayerOperations(name, kind, shape, side, weights, weights * side**2)
