"""The schema of a recipe: every setting of a run, its type, its range, and what it means.

Sections are frozen and strict: an unknown key, a text in place of a number, or a value out of range is an
error.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from qat.errors import nearest
from qat.recipe.contradictions import contradictions
from qat.recipe.schema.data import Augment, Data, RandAugment
from qat.recipe.schema.fields import Count, Section
from qat.recipe.schema.model import Model
from qat.recipe.schema.quantization import Group, LayerOverride, Quantization, StemGroup, TrunkGroup
from qat.recipe.schema.training import (
    FLOAT_EPOCHS,
    TIMM,
    Distillation,
    Loss,
    Optimizer,
    Output,
    Schedule,
    Temperature,
    Tracking,
)
from qat.recipe.wording import dotted

__all__ = [
    "FLOAT_EPOCHS",
    "TIMM",
    "Augment",
    "Data",
    "Distillation",
    "Group",
    "LayerOverride",
    "Loss",
    "Model",
    "Optimizer",
    "Output",
    "Quantization",
    "RandAugment",
    "Recipe",
    "Schedule",
    "Section",
    "StemGroup",
    "Temperature",
    "Tracking",
    "TrunkGroup",
    "compared_defaults",
]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        hint = nearest(value, ["auto", "cpu", "cuda"])
        raise PydanticCustomError(
            "refused",
            "{why}",
            {"why": f"found {value!r}, allowed: 'auto', 'cpu', 'cuda', 'cuda:N'{hint}"},
        )
    return value


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
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Type that matrix products are computed in while training; 'float16' needs CUDA. "
        "Evaluation is always in float32.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="How several processes share a network: 'ddp', each has all of it; 'fsdp' (pretraining "
        "only), each keeps its part of every weight, gradient and moment. One process has all of it anyway.",
    )
    model: Model = Field(description="The network and the weights it starts from.")
    data: Data = Field(description="The images.")
    quantization: Quantization | None = Field(
        default=None, description="What is quantized; required when fine-tuning, absent when pretraining."
    )
    schedule: Schedule = Field(default=Schedule(), description="How long, and what stops changing when.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer and learning rate.")
    loss: Loss = Field(default=Loss(), description="The loss against the labels.")
    distillation: Distillation = Field(default=Distillation(), description="Training against a teacher.")
    output: Output = Field(default=Output(), description="Where results go.")
    tracking: Tracking = Field(default=Tracking(), description="Who else is sent the metrics.")

    @property
    def teacher(self) -> Literal["self", "none", "named"]:
        """The teacher in effect: ``distillation.teacher``, or the task's default when that is null.

        ``named`` where there are ``distillation.teachers``.
        """
        if self.distillation.teachers:
            return "named"
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
    """The default values of the sections that :func:`qat.recipe.contradictions.contradictions` compares."""
    sections = {"data": Data(), "schedule": Schedule(), "distillation": Distillation()}
    return {name: section.model_dump() for name, section in sections.items()}
