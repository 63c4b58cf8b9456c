"""The ``model`` section of a recipe."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qat.recipe.schema.fields import Count, Positive, Section, Text
from qat.recipe.wording import found


def _widths(widths: list[int]) -> list[int]:
    for index, (before, here) in enumerate(pairwise(widths), start=1):
        if here not in (before, 2 * before):
            raise PydanticCustomError(
                "refused",
                "{why}",
                {
                    "why": f"found {found(here)} at position {index}, allowed after {before}: {before} or "
                    f"{2 * before} (a block keeps its width or doubles it)"
                },
            )
    return widths


def _stride(value: object) -> object:
    # `True == 1 == 1.0` in Python, so a Literal of numbers would let both in.
    if value is not None and type(value) is not int:
        raise PydanticCustomError("int_type", "not an integer")
    return value


class Model(Section):
    """Which BNext the network is, and the weights that it starts from."""

    size: Literal["tiny", "small", "middle", "large"] = Field(
        default="tiny", description="Size of the published networks; `widths` overrides it."
    )
    widths: Annotated[list[Count], Field(min_length=2), AfterValidator(_widths)] | None = Field(
        default=None,
        description="Channels of the stem, then of each block; an entry equals the one before or doubles it. "
        "Null takes those of `size`.",
    )
    num_classes: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Number of classes the classifier tells apart. Null: as many as the images have.",
    )
    stem_stride: Annotated[Literal[1, 2] | None, BeforeValidator(_stride)] = Field(
        default=None,
        description="Stride of the first convolution. Null: that of `checkpoint`, where it is recorded, else "
        "by the checkpoint's classifier: 2 at 1000 classes (large images), 1 at others. Without a checkpoint "
        "by the network's own classes.",
    )
    elm_attention: bool = Field(
        default=True,
        description="3×3 sub-blocks alternate between the scale and the bias kind; false: bias kind only.",
    )
    infor_recoupling: bool = Field(
        default=True, description="Sub-blocks have a mix scale and channel attention (SE)."
    )
    checkpoint: Text | None = Field(
        default=None,
        description="Weights to start from. A relative path is looked up beside the recipe file, then in the "
        "working directory, then among the packaged recipes.",
    )
    state_key: Text | None = Field(
        default=None,
        description="Which weights of `checkpoint` to take where it holds several, such as 'state_dict' "
        "beside 'state_dict_ema'. Null: an average over training steps (EMA, SWA), else those in the usual "
        "place; `qat inspect` says which, and what else there is. Checkpoints of this project hold one.",
    )
    classifier: Literal["auto", "keep", "new"] = Field(
        default="auto",
        description="What becomes of the checkpoint's classifier: 'keep' takes it, 'new' starts one from "
        "random weights, 'auto' keeps it where it tells as many classes apart as the images have.",
    )
    latent: Positive = Field(
        default=1.0, description="Magnitude given to latent weights that are rebuilt from stored sign bits."
    )
