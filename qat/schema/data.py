"""The ``data`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from qat.schema.fields import Area, Count, Positive, Section, Share, Text, ascending, listed


class RandAugment(Section):
    """Some of fifteen changes of colour and shape at a time (Cubuk et al. 2019, arXiv 1909.13719)."""

    count: Annotated[int, Field(ge=1, le=15)] = Field(
        default=2, description="Changes in a row, drawn without repetition."
    )
    magnitude: Annotated[int, Field(ge=1, le=9)] = Field(default=7, description="Strength of each, of 10.")


class Augment(Section):
    """Random changes to training images; the defaults change nothing."""

    pad: int = Field(
        default=0,
        ge=0,
        description="Largest shift per axis, in whole pixels; what comes in from outside is black.",
    )

    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    translate: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Largest shift per axis, as a share of the image's side."
    )
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="Largest rotation, in degrees."
    )
    scale: Annotated[tuple[Positive, Positive], listed, AfterValidator(ascending)] | None = Field(
        default=None, description="Smallest and largest zoom factor; null does not zoom."
    )
    crop: Annotated[tuple[Area, Area], listed, AfterValidator(ascending)] | None = Field(
        default=None, description="Smallest and largest area of the random resized crop; null does not crop."
    )
    randaugment: RandAugment | None = Field(
        default=None, description="Random changes of colour and shape; null makes none."
    )
    jitter: Share = Field(
        default=0.0, description="Largest change of brightness, contrast and saturation, as a share of each."
    )
    erasing: Share = Field(default=0.0, description="Probability that a rectangle of an image is made black.")
    mixup: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Alpha of mixup, which overlays two images and their labels; 0 switches it off. With "
        "`cutmix` a coin decides per batch.",
    )
    cutmix: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Alpha of cutmix, which puts a rectangle of one image into another; 0 switches it off.",
    )


class Data(Section):
    """The images: where they come from, their size and normalization, and how they are batched."""

    dataset: Literal["digits", "imagefolder"] = Field(
        default="digits",
        description="'digits' comes with scikit-learn; 'imagefolder' has one folder per class.",
    )
    root: Text | None = Field(default=None, description="Folder of an 'imagefolder' data set.")
    image_size: int = Field(
        default=16, ge=8, description="Side of the square images the network sees, in pixels."
    )
    resize: Count | None = Field(
        default=None,
        description="Shorter side before the centre crop, in pixels ('imagefolder' only). "
        "Null: image_size * 8 / 7, rounded.",
    )
    mean: Annotated[tuple[float, float, float], listed] = Field(
        default=(0.0, 0.0, 0.0), description="Subtracted from each channel of an image in 0 to 1."
    )
    std: Annotated[tuple[Positive, Positive, Positive], listed] = Field(
        default=(1.0, 1.0, 1.0), description="Divides each channel after the mean is subtracted."
    )
    batch_size: int = Field(default=64, ge=1, description="Training images per step.")
    eval_batch_size: int = Field(default=256, ge=1, description="Images per step of an evaluation.")
    workers: int = Field(
        default=0, ge=0, description="Processes that load images; 0 loads them in the main process."
    )
    train_split: Text = Field(default="train", description="Split the network is trained on.")
    test_split: Text = Field(default="validation", description="Split accuracy is measured on.")
    augment: Augment = Field(default=Augment(), description="Random changes to training images.")
