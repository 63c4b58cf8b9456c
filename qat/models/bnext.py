"""BNext (arXiv 2211.12933): sizes, options, and ``quant=True``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from torch import Tensor, nn

from qat.errors import QuantizationError, nearest
from qat.models.facts import Facts
from qat.nn.block import Block
from qat.nn.layers import BinaryActivation, BinaryConv2d, GlobalAveragePool, Stem
from qat.nn.sub_block import Kind
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization

#: Channel widths of each published size: stem first, then one per block.
WIDTHS: Final[dict[str, tuple[int, ...]]] = {
    "tiny": (32, 64, *[128] * 2, *[256] * 2, *[512] * 6, *[1024] * 2),
    "small": (48, 96, *[192] * 2, *[384] * 2, *[768] * 6, *[1536] * 2),
    "middle": (48, 96, *[192] * 4, *[384] * 4, *[768] * 8, *[1536] * 4),
    "large": (64, 128, *[256] * 4, *[512] * 4, *[1024] * 16, *[2048] * 4),
}


@dataclass(frozen=True)
class Architecture:
    """The size and the options of a BNext network (arXiv 2211.12933).

    Attributes:
        widths: output channels of the stem, then of each block. Each width equals the one before or doubles
            it.
        num_classes: number of classes, which is the number of logits.
        stem_stride: stride of the first convolution, 1 or 2.
        elm_attention: whether 3×3 sub-blocks alternate between the scale and the bias kind. Otherwise all are
            of the bias kind.
        infor_recoupling: whether sub-blocks have a mix scale and channel attention.
    """

    widths: tuple[int, ...]
    num_classes: int
    stem_stride: int
    elm_attention: bool = True
    infor_recoupling: bool = True

    @classmethod
    def of(
        cls,
        size: str = "tiny",
        num_classes: int = 1000,
        *,
        widths: Sequence[int] | None = None,
        stem_stride: int | None = None,
        elm_attention: bool = True,
        infor_recoupling: bool = True,
    ) -> Architecture:
        """The architecture of a published ``size``, or with the given ``widths``.

        Args:
            size: ``tiny``, ``small``, ``middle`` or ``large``; ignored if there are ``widths``.
            num_classes: see :class:`Architecture`, also for ``elm_attention`` and ``infor_recoupling``.
            widths: output channels of the stem and of each block, in place of a published size's.
            stem_stride: 1 or 2; ``None`` means 2 if there are 1000 classes, else 1.
            elm_attention: see :class:`Architecture`.
            infor_recoupling: see :class:`Architecture`.

        Raises:
            QuantizationError: the size is unknown, a width neither equals the one before nor doubles it,
                there is less than one class, the stem stride is neither 1 nor 2, or a number is not an
                integer.
        """
        if widths is None:
            if size not in WIDTHS:
                raise QuantizationError(
                    f"size {size!r} is unknown, allowed: {', '.join(WIDTHS)}{nearest(size, WIDTHS)}"
                )
            widths = WIDTHS[size]
        if not all(isinstance(number, int) for number in (*widths, num_classes)):
            raise QuantizationError(f"widths {tuple(widths)}, {num_classes} classes: need whole numbers")
        if len(widths) < 2 or min(widths) < 1:
            raise QuantizationError(f"widths {tuple(widths)}: need at least two positive entries")
        for before, after in pairwise(widths):
            if after not in (before, 2 * before):
                raise QuantizationError(f"widths: {after} after {before}: a width stays or doubles")
        if num_classes < 1:
            raise QuantizationError(f"num_classes {num_classes}: need at least 1")
        if stem_stride is None:
            stem_stride = 2 if num_classes == 1000 else 1
        if stem_stride not in (1, 2):
            raise QuantizationError(f"stem_stride {stem_stride}: allowed are 1 and 2")
        return cls(tuple(widths), num_classes, stem_stride, elm_attention, infor_recoupling)

    @property
    def size(self) -> str:
        """Name of the published size with these widths, else ``custom``."""
        return next((name for name, widths in WIDTHS.items() if widths == self.widths), "custom")

    def __str__(self) -> str:
        """Size, number of classes and options in one line, for messages."""
        name = self.size if self.size != "custom" else f"custom {list(self.widths)}"
        options = [f"stem stride {self.stem_stride}"]
        if not self.elm_attention:
            options.append("no ELM attention")
        if not self.infor_recoupling:
            options.append("no information recoupling")
        return f"BNext {name}, {self.num_classes} classes, {', '.join(options)}"


class BNext(nn.Module):
    """A binary BNext network (arXiv 2211.12933) with random weights.

    Args:
        num_classes: number of classes, which is the number of logits.
        size: ``tiny``, ``small``, ``middle`` or ``large``; ignored if there are ``widths``.
        quant: ``True``, or a :class:`qat.recipe.schema.Quantization`, inserts fake quantization by
            :func:`qat.quantize.preparation.prepare`. Quantization points whose observer clips (by default
            those of the trunk) stay in float until :func:`qat.quantize.calibration.calibrate` finds their
            ranges. Training before calibration warns.
        widths: output channels of the stem and of each block, in place of a published size's.
        stem_stride: stride of the first convolution; ``None`` means 2 if there are 1000 classes, else 1.
        elm_attention: see :class:`Architecture`.
        infor_recoupling: see :class:`Architecture`.
        image: scale and zero point of the grid of the quantized network's uint8 images, from
            :func:`qat.quantize.image_grid.image_grid`; ``None`` means that of ImageNet's normalization.

    Raises:
        QuantizationError: see :meth:`Architecture.of` and :func:`qat.quantize.preparation.prepare`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        size: str = "tiny",
        quant: bool | Quantization = False,
        *,
        widths: Sequence[int] | None = None,
        stem_stride: int | None = None,
        elm_attention: bool = True,
        infor_recoupling: bool = True,
        image: tuple[float, int] | None = None,
    ) -> None:
        """Make the layers, with random weights."""
        super().__init__()
        #: What is known about its images and classes.
        self.facts = Facts()
        self.architecture = arch = Architecture.of(
            size,
            num_classes,
            widths=widths,
            stem_stride=stem_stride,
            elm_attention=elm_attention,
            infor_recoupling=infor_recoupling,
        )
        features: list[nn.Module] = [Stem(arch.widths[0], arch.stem_stride)]
        for i, (before, after) in enumerate(pairwise(arch.widths), start=1):
            stride = 2 if i >= 2 and after != before else 1
            kind: Kind = "scale" if i % 2 == 0 else "bias"
            features.append(Block(before, after, stride, kind, elm_attention, infor_recoupling))
        self.feature = nn.Sequential(*features)
        self.prelu = nn.PReLU(arch.widths[-1])
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(arch.widths[-1], num_classes)
        if not isinstance(quant, bool | Quantization):
            raise QuantizationError(
                f"quant: found {quant!r}, allowed: True, False or a qat.Quantization (which has the bits)"
            )
        if quant:
            prepare(self, quant if isinstance(quant, Quantization) else Quantization(), image)

    @classmethod
    def from_architecture(cls, architecture: Architecture, quant: bool | Quantization = False) -> BNext:
        """A network of ``architecture`` with random weights. ``quant`` is that of the constructor."""
        return cls(
            architecture.num_classes,
            quant=quant,
            widths=architecture.widths,
            stem_stride=architecture.stem_stride,
            elm_attention=architecture.elm_attention,
            infor_recoupling=architecture.infor_recoupling,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, H, W), H and W at least 1, to logits (N, num_classes)."""
        logits: Tensor = self.fc(self.pool(self.prelu(self.feature(x))))
        return logits


def binary_convolutions(model: nn.Module) -> dict[str, BinaryConv2d]:
    """The binary convolutions of ``model`` by module name, in forward order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryConv2d)}


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the weight-binarization temperature of every binary convolution, in place."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d | BinaryActivation):
            module.temperature.fill_(temperature)


def is_binary(model: nn.Module) -> bool:
    """Whether every binary convolution uses weights of exactly ±1."""
    return all(conv.is_binary() for conv in binary_convolutions(model).values())
