"""The ``quantization`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qat.recipe.schema.fields import Area, Bits, Positive, Section, Text


class StemGroup(Section):
    """Settings of the stem, of which only the weights are quantized.

    Its input is fixed 8-bit pixels, and its output belongs to the trunk.
    """

    enabled: bool = Field(default=True, description="False leaves this group in float.")
    weight_bits: Bits = Field(
        default=8, description="Bits of the weights: symmetric, one scale per output channel."
    )


#: Grids of more than 8 bits are simulated in float. They can be trained and evaluated, but not exported.
_SimulatedBits = Annotated[int, Field(ge=2, le=16)]
_Observer = Literal["moving_average", "minmax", "histogram", "percentile"]
_OBSERVER = (
    "How the range of an activation is estimated. 'histogram' (least squared error) and 'percentile' clip, "
    "and observe during calibration only."
)
_Percent = Annotated[float, Field(gt=0, le=100)]


class TrunkGroup(Section):
    """Settings of the trunk, of which only the activations are quantized: its weights have 1 bit already."""

    enabled: bool = Field(default=True, description="False leaves this group in float.")
    activation_bits: _SimulatedBits = Field(
        default=8,
        description="Bits of the activations: one scale per tensor. Export needs 8 or fewer; more are "
        "simulated.",
    )
    # On CIFAR-10, ranges up to the extremes cost 1.5 points of accuracy here, clipped ones 0.6 (docs/LOG.md,
    # 2026-11-29).
    observer: _Observer = Field(default="percentile", description=_OBSERVER)
    averaging_constant: Area = Field(
        default=0.05, description="Weight of the newest batch in the 'moving_average' observer."
    )
    percentile: _Percent = Field(
        default=99.99, description="Percent of the magnitudes that the 'percentile' observer keeps in range."
    )
    clip: Positive | None = Field(
        default=None, description="No range spans more than this magnitude; null leaves it to the observer."
    )


class Group(TrunkGroup, StemGroup):
    """Settings of a group of which both weights and activations are quantized."""

    activation_bits: Bits = Field(default=8, description="Bits of the activations: one scale per tensor.")
    observer: _Observer = Field(default="moving_average", description=_OBSERVER)


class LayerOverride(Section):
    """Settings for the modules that ``match`` names. A null keeps the setting of the module's group."""

    match: Text = Field(description="Glob over module names, as in `include`, such as `feature.*.se`.")
    weight_bits: Bits | None = Field(default=None, description="Bits of the weights.")
    activation_bits: _SimulatedBits | None = Field(
        default=None, description="Bits of the activations; beyond 8 in the trunk only."
    )
    observer: _Observer | None = Field(default=None, description="How the range is estimated.")
    averaging_constant: Area | None = Field(default=None, description="Of the 'moving_average' observer.")
    percentile: _Percent | None = Field(default=None, description="Of the 'percentile' observer.")
    clip: Positive | None = Field(default=None, description="No range spans more than this magnitude.")


class Quantization(Section):
    """What is quantized beyond the binary convolutions, and to how many bits."""

    backend: Literal["torch_ao", "brevitas"] = Field(
        default="torch_ao",
        description="Library that supplies the fake quantizers: 'torch_ao' observes ranges, 'brevitas' "
        "learns scales (LSQ) from where observers start them.",
    )
    power_of_two: bool = Field(
        default=False, description="Round every scale of activations and weights up to a power of two."
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
    overrides: list[LayerOverride] = Field(
        default=[],
        description="Other settings for modules by glob; where two set the same, the later wins.",
    )
