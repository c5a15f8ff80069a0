"""Types of settings: base class, times and seeds as text, words in any case. This module must not import torch."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationInfo,
    field_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]


def _split(seeds: Any) -> Any:
    """Split words such as `1,2,3`."""
    seeds = (seeds,) if isinstance(seeds, str) else seeds
    if not isinstance(seeds, list | tuple):
        return seeds
    parts = [each.split(",") if isinstance(each, str) else [each] for each in seeds]
    return tuple(part for each in parts for part in each if part != "")


def _seconds(time: Any) -> Any:
    """Turn a time such as `19:50` or `1:02:03.5` into seconds."""
    if not isinstance(time, str) or not re.fullmatch(r"(\d+:){1,2}\d+(\.\d*)?", time):
        return time
    total = 0.0
    for part in time.split(":"):
        total = 60 * total + float(part)
    return total


# Repeated seeds are dropped: they would make the same edit.
Seeds = Annotated[
    tuple[NonNegativeInt, ...], BeforeValidator(_split), AfterValidator(lambda seeds: tuple(dict.fromkeys(seeds)))
]
Seconds = Annotated[NonNegativeFloat | None, BeforeValidator(_seconds)]


class Settings(BaseModel):
    """Base of the settings: frozen, with unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _ignore_case(cls, value: Any, info: ValidationInfo) -> Any:
        return as_chosen(cls.model_fields[str(info.field_name)].annotation, value)


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a setting accepts, alone or in a list; empty for a setting of another type."""
    if get_origin(annotation) is Literal:
        return tuple(word for word in get_args(annotation) if isinstance(word, str))
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        found = [choices(each) for each in get_args(annotation) if each not in (type(None), ...)]
        return tuple(word for words in found for word in words) if all(found) else ()
    return ()


def as_chosen(annotation: Any, value: Any) -> Any:
    """Replace choices in any case by their spelling in the settings."""
    if isinstance(value, list | tuple):
        return tuple(as_chosen(annotation, each) for each in value)
    if not isinstance(value, str):
        return value
    return next((word for word in choices(annotation) if word.lower() == value.lower()), value)
