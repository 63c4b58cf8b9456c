"""The sections of a recipe about training: schedule, optimizer, loss, distillation, output, tracking."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from qat.recipe.schema.fields import Area, Count, Positive, Section, Share, Text
from qat.recipe.wording import found

#: Default of `schedule.float_epochs` where the classifier starts anew.
FLOAT_EPOCHS: Final = 10
#: Prefix of the names of teachers that are models of timm.
TIMM: Final = "timm:"


class Temperature(Section):
    """The fall of the binary weights' temperature, geometric, until they are exactly ±1 (pretraining only).

    At temperature T a latent weight w is used as ``clamp(w / T, −1, 1)``.
    """

    start: Annotated[float, Field(ge=1e-7)] = Field(default=1.0, description="Temperature of the first step.")
    end: Annotated[float, Field(gt=0, lt=1e-7)] = Field(
        default=1e-8, description="Last temperature; below 1e-7 the weights are exactly binary."
    )
    share: Area = Field(default=0.6, description="Share of the epochs over which the temperature falls.")
    decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Factor after each epoch, down to `end`, in place of the anneal over `share`. Null: no "
        "steps.",
    )


class Schedule(Section):
    """How long a run lasts and what stops changing along the way."""

    epochs: int = Field(
        default=3,
        ge=0,
        description="Passes over the training split. 0 (fine-tuning only) calibrates and stops.",
    )
    float_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Passes over the training split before anything is quantized. A new classifier is "
        "trained alone at first, then the whole network in float: quantization is compared with the result. "
        f"Null: {FLOAT_EPOCHS} with a new classifier, else 0 (fine-tuning only).",
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
    reestimate_batch_norm: int = Field(
        default=0,
        ge=0,
        description="Training batches over which batch-norm statistics are averaged anew after the last "
        "step. 0: none.",
    )
    freeze_binary: bool = Field(
        default=False, description="Leave the binary weights as they are (fine-tuning only)."
    )
    temperature: Temperature = Field(
        default=Temperature(), description="Anneal of the binary weights (pretraining only)."
    )
    accumulate: Count = Field(
        default=1,
        description="Batches per optimizer step: its gradient is their mean, and all schedules count "
        "optimizer steps.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay per step of a moving average of the weights, which is then what is evaluated and "
        "kept. Null keeps the weights themselves.",
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
    head_lr: Positive | None = Field(
        default=None, description="Peak learning rate of the classifier; null takes `lr`."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Weight decay of matrices; decoupled with 'adamw'."
    )
    kernel_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Weight decay of every parameter with four dimensions, binary weights included; "
        "`weight_decay` is then that of all others, vectors included. Null decays matrices alone, and never "
        "binary weights.",
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


class Loss(Section):
    """The loss between the network's answers and the labels."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of each label that is spread evenly over all classes."
    )


def _teacher(name: str) -> str:
    if name in ("", TIMM):
        raise PydanticCustomError(
            "refused",
            "{why}",
            {"why": f"found {found(name)}, allowed: the path of a checkpoint, or '{TIMM}NAME'"},
        )
    return name


class Distillation(Section):
    """Training against the outputs of teachers in addition to the labels."""

    teacher: Literal["self", "none"] | None = Field(
        default=None,
        description="'self': the network before quantization teaches. Null: 'self' when fine-tuning, 'none' "
        "when pretraining.",
    )
    teachers: list[Annotated[str, AfterValidator(_teacher)]] = Field(
        default=[],
        description="Trained networks that teach, their probabilities averaged: paths of checkpoints, looked "
        "up as `model.checkpoint` is, or 'timm:NAME' for a pretrained model of timm.",
    )
    teacher_weights: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        default=None, description="Weight of each of `teachers` in their mean; null takes all alike."
    )
    weight: Share = Field(default=0.5, description="Share of the distillation term in the loss.")
    temperature: Positive = Field(default=4.0, description="Softens both outputs before they are compared.")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[^\s/\\.][^/\\\0]*", name):
        raise PydanticCustomError(
            "refused",
            "{why}",
            {"why": f"found {found(name)}, allowed: a folder's name, without '/' and not beginning with '.'"},
        )
    return name


class Output(Section):
    """Where results go and how checkpoints are stored."""

    dir: Text = Field(default="runs", description="Folder that receives one folder per run.")
    name: Annotated[Text, AfterValidator(_folder_name)] | None = Field(
        default=None,
        description="What the run's folder begins with, before date and time. Null: the recipe's name.",
    )
    float_weights: Literal["float32", "float16"] = Field(
        default="float32", description="Storage type of float matrices in written checkpoints."
    )


def _project(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise PydanticCustomError(
            "refused",
            "{why}",
            {"why": f"found {found(name)}, allowed: letters, digits, '_', behind these '-' and '.'"},
        )
    return name


class Tracking(Section):
    """Experiment trackers that are sent the metrics of a run, in addition to its `metrics.jsonl`."""

    trackers: list[Text] = Field(
        default=[],
        description="Trackers of accelerate, such as 'tensorboard', 'wandb' or 'mlflow'; each needs its "
        "package, and is set up by its own environment variables.",
    )
    project: Annotated[str, AfterValidator(_project)] = Field(
        default="bnext-qat", description="Project, or experiment, that the run belongs to there."
    )
    every: Count = Field(
        default=50, description="Optimizer steps between two points; each epoch is one besides."
    )
