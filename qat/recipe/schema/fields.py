"""The strict base class of all sections of a recipe, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qat.recipe.wording import found


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    """The ``pair`` itself, if its first number is not above its second.

    Raises:
        PydanticCustomError: the first number is above the second.
    """
    if pair[0] > pair[1]:
        raise PydanticCustomError(
            "refused", "{why}", {"why": f"found {found(list(pair))}, allowed: the lower bound first"}
        )
    return pair


# Lists of YAML and JSON become tuples here, because strict mode would refuse them.
listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Bits = Annotated[int, Field(ge=2, le=8)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of all sections. It refuses unknown keys, values of other types, and later changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
