"""What all sections of a recipe are made of: the strict base class and the types of values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qat.recipe.wording import found


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    """Refuse a pair whose second number is the smaller one."""
    if pair[0] > pair[1]:
        raise PydanticCustomError(
            "refused", "{why}", {"why": f"found {found(list(pair))}, allowed: the lower bound first"}
        )
    return pair


# YAML and JSON have lists where Python has tuples; strict mode would refuse them.
listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Bits = Annotated[int, Field(ge=2, le=8)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys, other types and changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
