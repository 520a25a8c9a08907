"""Bounds of numbers, as `Annotated` types that stand at the fields of settings and options; and what a number is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard, TypeVar

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


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value that was read is a number, and no truth value, that a float can hold: JSON has larger ones."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
