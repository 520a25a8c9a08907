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
# torch and numpy take other widths of numbers; all take these
Seed = Annotated[T, Bound(lambda value: 0 <= value < 2**32, "must lie between 0 and 4294967295")]
NotNegative = Annotated[T, Bound(lambda value: value >= 0, "must not be negative")]


# Of every whole number of a setting or option, beside the bounds at its field: what all libraries take.
WHOLE = Bound(lambda value: type(value) is not int or -(2**32) < value < 2**32, "must be below 4294967296")
