"""Bounds of numbers, as `Annotated` types that stand at the fields of settings and options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Bound:
    """What a value must satisfy, and how that is said."""

    holds: Callable[[Any], bool]
    message: str


Positive = Annotated[T, Bound(lambda value: value > 0, "must be above 0")]
NotNegative = Annotated[T, Bound(lambda value: value >= 0, "must not be negative")]
