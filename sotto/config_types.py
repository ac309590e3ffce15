"""The kinds of values that a configuration holds, and the strict, frozen model that every section is."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def whole_number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Real = Annotated[float, BeforeValidator(not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(not_bool), Field(ge=0)]
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB)")
_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20}


def _size_with_unit(value: Any) -> Any:
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None or float(found[1]) == 0:
        raise ValueError("expected a size with its unit, such as 8GiB, 8GB or 512MiB")
    return value


def bytes_of(size: str) -> int:
    """What `Memory` stands for."""
    found = _SIZE.fullmatch(size)
    assert found is not None
    return round(float(found[1]) * _UNITS[found[2]])


Memory = Annotated[str, BeforeValidator(_size_with_unit)]
Fraction = Annotated[Real, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
