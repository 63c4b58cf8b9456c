"""The schema of a recipe: every setting of a run, its type, its range, and what it means.

Sections are frozen and strict: an unknown key, a text where a number belongs or a value out of range is an
error. Everyone else imports them from :mod:`qat.recipe`.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qat.errors import nearest
from qat.recipefiles import dotted
from qat.recipeproblems import contradictions, found


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        hint = nearest(value, ["auto", "cpu", "cuda"])
        raise PydanticCustomError(
            "refused",
            "{why}",
            {"why": f"found {value!r}, allowed: 'auto', 'cpu', 'cuda', 'cuda:N'{hint}"},
        )
    return value


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


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError(
            "refused", "{why}", {"why": f"found {found(list(pair))}, allowed: the lower bound first"}
        )
    return pair


def _stride(value: object) -> object:
    # `True == 1 == 1.0` in Python, so a Literal of numbers would let both in.
    if value is not None and type(value) is not int:
        raise PydanticCustomError("int_type", "not an integer")
    return value


# YAML and JSON have lists where Python has tuples; strict mode would refuse them.
_listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Bits = Annotated[int, Field(ge=2, le=8)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys, other types and changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Section):
    """The network: which BNext, and the weights it starts from."""

    size: Literal["tiny", "small", "middle", "large"] = Field(
        default="tiny", description="Size of the published networks; `widths` overrides it."
    )
    widths: Annotated[list[Count], Field(min_length=2), AfterValidator(_widths)] | None = Field(
        default=None,
        description="Channels of the stem, then of each block; an entry equals the one before or doubles it. "
        "Null takes those of `size`.",
    )
    num_classes: int = Field(default=10, ge=2, description="Number of classes the classifier tells apart.")
    stem_stride: Annotated[Literal[1, 2] | None, BeforeValidator(_stride)] = Field(
        default=None,
        description="Stride of the first convolution. Null: 2 at 1000 classes (large images), else 1.",
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
    latent: Positive = Field(
        default=1.0, description="Magnitude given to latent weights that are rebuilt from stored sign bits."
    )


class Augment(Section):
    """Random changes to training images; the defaults change nothing."""

    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    translate: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Largest shift per axis, as a share of the image's side."
    )
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="Largest rotation, in degrees."
    )
    scale: Annotated[tuple[Positive, Positive], _listed, AfterValidator(_ascending)] | None = Field(
        default=None, description="Smallest and largest zoom factor; null does not zoom."
    )
    crop: Annotated[tuple[Area, Area], _listed, AfterValidator(_ascending)] | None = Field(
        default=None, description="Smallest and largest area of the random resized crop; null does not crop."
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
    mean: Annotated[tuple[float, float, float], _listed] = Field(
        default=(0.0, 0.0, 0.0), description="Subtracted from each channel of an image in 0 to 1."
    )
    std: Annotated[tuple[Positive, Positive, Positive], _listed] = Field(
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


class Temperature(Section):
    """Geometric anneal of the soft sign towards the hard one (pretraining only)."""

    start: Annotated[float, Field(ge=1e-7)] = Field(default=1.0, description="Temperature of the first step.")
    end: Annotated[float, Field(gt=0, lt=1e-7)] = Field(
        default=1e-8, description="Last temperature; below 1e-7 the weights are exactly binary."
    )
    share: Area = Field(default=0.6, description="Share of the epochs over which the temperature falls.")


class Schedule(Section):
    """How long a run lasts and what stops changing along the way."""

    epochs: int = Field(
        default=3,
        ge=0,
        description="Passes over the training split. 0 (fine-tuning only) calibrates and stops.",
    )
    calibration_batches: int = Field(
        default=8,
        ge=1,
        description="Training batches the observers see before fine-tuning starts (fine-tuning only).",
    )
    freeze_observers: Share = Field(
        default=0.5, description="Share of the steps after which scales stay fixed (fine-tuning only)."
    )
    freeze_batch_norm: Share = Field(
        default=0.0,
        description="Share of the steps after which batch-norm statistics stay fixed; 0: from the start "
        "(fine-tuning only).",
    )
    freeze_binary: bool = Field(
        default=False, description="Leave the binary weights as they are (fine-tuning only)."
    )
    temperature: Temperature = Field(
        default=Temperature(), description="Anneal of the binary weights (pretraining only)."
    )
    save_steps: Count | None = Field(
        default=None,
        description="Steps between two saved states, from which `--resume` goes on. Null: after each epoch "
        "only.",
    )
    keep_states: int = Field(default=2, ge=1, description="Newest saved states that are kept.")


class Optimizer(Section):
    """The optimizer and its learning rate: linear warm-up, then a cosine down to the floor."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="Which optimizer.")
    lr: Positive = Field(default=1e-3, description="Peak learning rate.")
    binary_lr: Positive | None = Field(
        default=None, description="Peak learning rate of the binary weights; null takes `lr`."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Weight decay of matrices; decoupled with 'adamw'."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of 'sgd'.")
    warmup: Share = Field(
        default=0.05, description="Share of the steps over which the learning rate rises from 0."
    )
    min_lr: Share = Field(
        default=0.0, description="Floor of the cosine, as a share of the peak learning rate."
    )
    clip_norm: Positive | None = Field(
        default=None, description="Largest norm of the gradient; null does not clip."
    )


class Distillation(Section):
    """Training against a teacher's outputs beside the labels."""

    teacher: Literal["self", "none"] | None = Field(
        default=None,
        description="'self': the network before quantization teaches. Null: 'self' when fine-tuning, 'none' "
        "when pretraining.",
    )
    weight: Share = Field(default=0.5, description="Share of the distillation term in the loss.")
    temperature: Positive = Field(default=4.0, description="Softens both outputs before they are compared.")


class Output(Section):
    """Where results go and how checkpoints are stored."""

    dir: Text = Field(default="runs", description="Folder that receives one folder per run.")
    float_weights: Literal["float32", "float16"] = Field(
        default="float32", description="Storage type of float matrices in written checkpoints."
    )


class Recipe(Section):
    """All settings of one run."""

    task: Literal["pretrain", "finetune"] = Field(
        description="'pretrain' trains a binary network in float; 'finetune' adds quantization to one."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of every random choice of the run.")
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto",
        description="'auto', 'cpu', 'cuda' or 'cuda:N'; 'auto' is CUDA if present, else the CPU.",
    )
    threads: Count | None = Field(default=None, description="CPU threads; null leaves torch's default.")
    model: Model = Field(description="The network and the weights it starts from.")
    data: Data = Field(description="The images.")
    quantization: Quantization | None = Field(
        default=None, description="What is quantized; required when fine-tuning, absent when pretraining."
    )
    schedule: Schedule = Field(default=Schedule(), description="How long, and what stops changing when.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer and learning rate.")
    distillation: Distillation = Field(default=Distillation(), description="Training against a teacher.")
    output: Output = Field(default=Output(), description="Where results go.")

    @property
    def teacher(self) -> Literal["self", "none"]:
        """The teacher in effect: ``distillation.teacher``, or the task's default when that is null."""
        if self.distillation.teacher is not None:
            return self.distillation.teacher
        return "self" if self.task == "finetune" else "none"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(contradictions(self.model_dump(), compared_defaults())):
            summary = "; ".join(f"{dotted(path)}: {why}" for path, why in problems)
            raise PydanticCustomError(
                "contradiction", "{summary}", {"summary": summary, "problems": problems}
            )
        return self


@cache
def compared_defaults() -> dict[str, Any]:
    """Defaults of the sections whose keys are compared with other keys."""
    return {"data": Data().model_dump(), "schedule": Schedule().model_dump()}
