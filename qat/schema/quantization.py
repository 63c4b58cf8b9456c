"""The ``quantization`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qat.schema.fields import Area, Bits, Section, Text


class StemGroup(Section):
    """A group of which only the weights are quantized here.

    The stem reads fixed 8-bit pixels, and its output belongs to the trunk.
    """

    enabled: bool = Field(default=True, description="False leaves this group in float.")
    weight_bits: Bits = Field(
        default=8, description="Bits of the weights: symmetric, one scale per output channel."
    )


class TrunkGroup(Section):
    """A group of which only the activations are quantized: the trunk's own weights are 1 bit already."""

    enabled: bool = Field(default=True, description="False leaves this group in float.")
    activation_bits: Bits = Field(default=8, description="Bits of the activations: one scale per tensor.")
    observer: Literal["moving_average", "minmax", "histogram"] = Field(
        default="moving_average", description="How the range of an activation is estimated."
    )
    averaging_constant: Area = Field(
        default=0.05, description="Weight of the newest batch in the 'moving_average' observer."
    )


class Group(TrunkGroup, StemGroup):
    """A group of which weights and activations are quantized."""


class Quantization(Section):
    """What is quantized beyond the binary convolutions, and to how many bits."""

    backend: Literal["torch_ao"] = Field(
        default="torch_ao", description="Library that supplies the fake quantizers."
    )
    stem: StemGroup = Field(default=StemGroup(), description="The first convolution.")
    se: Group = Field(default=Group(), description="Channel attention (SE) of the binary convolutions.")
    classifier: Group = Field(default=Group(), description="The last linear layer.")
    trunk: TrunkGroup = Field(
        default=TrunkGroup(), description="Stem output, binary convolution outputs and sub-block outputs."
    )
    include: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["*"], description="Globs over module names, such as `feature.3.*`: only these are quantized."
    )
    exclude: list[Text] = Field(
        default=[],
        description="Globs over module names, such as `fc`: these stay in float; wins over `include`.",
    )
