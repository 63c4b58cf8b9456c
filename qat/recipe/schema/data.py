"""The ``data`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from qat.recipe.schema.fields import Area, Count, Positive, Section, Share, Text, ascending, listed


class RandAugment(Section):
    """Random changes of colour and shape, some of fifteen at a time (Cubuk et al. 2019, arXiv 1909.13719)."""

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

    dataset: Literal["digits", "imagefolder", "cifar10", "parquet", "hub"] = Field(
        default="digits",
        description="'digits' comes with scikit-learn; 'imagefolder' has one folder per class in one per "
        "split, or in none; 'cifar10' is read from Parquet files or the Hugging Face Hub; 'parquet' is a "
        "folder with SPLIT.parquet or SPLIT-*.parquet; 'hub' is any image data set of the Hub, see "
        "data.name.",
    )
    root: Text | None = Field(
        default=None,
        description="Folder of an 'imagefolder', 'parquet' or 'cifar10' data set, looked for in the working "
        "directory, then in the folder that the environment variable QAT_DATA names. Null: 'cifar10' is in "
        "QAT_DATA's folder 'cifar10' if there is one, else on the Hub; the others need it.",
    )
    name: Text | None = Field(
        default=None, description="Repository of a 'hub' data set, such as 'uoft-cs/cifar10'."
    )
    config: Text | None = Field(
        default=None, description="Configuration of a 'hub' data set that has several."
    )
    revision: Text | None = Field(
        default=None, description="Commit, branch or tag of a 'hub' data set; null is its newest."
    )
    image_column: Text | None = Field(
        default=None,
        description="Column of the images ('parquet' and 'hub'); null is the only one that holds images.",
    )
    label_column: Text | None = Field(
        default=None,
        description="Column of the labels ('parquet' and 'hub'); null is the only one with named classes, "
        "else the only one of integers, of booleans, or of texts.",
    )
    image_size: int = Field(
        default=16, ge=8, description="Side of the square images the network sees, in pixels."
    )
    resize: Count | None = Field(
        default=None,
        description="Shorter side before the centre crop, in pixels (all but 'digits'); an image that has it "
        "already is not resampled. Null: image_size for 'cifar10', else image_size * 8 / 7, rounded.",
    )
    in_memory: bool | None = Field(
        default=None,
        description="Whether decoded images are kept in memory ('cifar10', 'parquet' and 'hub'). Null: where "
        "those of a split take at most 1 GiB.",
    )
    streaming: bool = Field(
        default=False,
        description="Whether training images are read in passing, in order from files that are shuffled, "
        "through a buffer that is shuffled too ('parquet' and 'hub'): nothing is stored.",
    )
    shuffle_buffer: Count = Field(
        default=2048, description="Encoded images in that buffer; the larger, the better shuffled."
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
        default=0,
        ge=0,
        description="Processes that load images; 0 loads them in a thread of the main process. Of a streamed "
        "data set: threads.",
    )
    exif_orientation: bool = Field(
        default=False,
        description="Whether images are turned upright as their EXIF orientation says. False, as the "
        "published weights were trained and measured without; what feeds an exported model has to do the "
        "same.",
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do about files that are no images or cannot be decoded: 'stop' names them; "
        "'skip' decodes every image beforehand, and leaves them out.",
    )
    train_split: Text = Field(
        default="train",
        description="Split the network is trained on. The default also finds 'training' and, where an "
        "'imagefolder' has no splits, takes the one folder of classes; '.' is the root itself.",
    )
    test_split: Text | None = Field(
        default=None,
        description="Split accuracy is measured on and epochs are chosen on. Null: 'test' for 'cifar10', "
        "else 'validation'; 'imagefolder' and 'parquet' then also find 'val' or 'valid', else 'test', and "
        "else hold out data.validation_share.",
    )
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of each class's training images that is held out, by a hash of their names, and "
        "takes the place of data.test_split ('imagefolder' and 'parquet'). Null: 0.2 where there is neither "
        "a validation nor a test split, else nothing.",
    )
    final_split: Text | None = Field(
        default=None,
        description="Split the finished network is measured on once more, which no choice depends on. Null: "
        "'test' of an 'imagefolder' or 'parquet' data set that has it beside data.test_split.",
    )
    augment: Augment = Field(default=Augment(), description="Random changes to training images.")

    @property
    def evaluated_split(self) -> str:
        """Name of the split that accuracy is measured on: ``test_split``, or the data set's default."""
        if self.test_split is not None:
            return self.test_split
        return "test" if self.dataset == "cifar10" else "validation"

    @property
    def shorter_side(self) -> int:
        """Pixels of an image's shorter side before the centre crop: ``resize``, or its default."""
        if self.resize is not None:
            return self.resize
        return self.image_size if self.dataset == "cifar10" else round(self.image_size * 8 / 7)

    def loaded_side(self, split: Literal["train", "test"]) -> int:
        """Side of the square images of ``split`` as they are loaded, in pixels.

        It is ``shorter_side`` for training images with a random crop, which needs a larger image to cut from,
        else ``image_size``.
        """
        return self.shorter_side if split == "train" and self.augment.crop is not None else self.image_size
