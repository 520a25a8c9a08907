"""The learning rate as a pure function of the update number: nothing to save, so nothing to lose on resume."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastvkd.errors import SettingsError


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float], float]] = {"constant": _constant, "cosine": _cosine, "linear": _linear}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps` optimiser updates, then the decay over the rest of `max_steps`.

    With `decay_from` the whole rate lasts until that update, and the decay takes what is left then. The first update
    has 1 / warmup_steps of the rate and the last one more than 0, so no update is wasted. Raises SettingsError for an
    unknown decay or an impossible warm-up.
    """

    lr_scheduler_type: str
    warmup_steps: int
    max_steps: int
    decay_from: int | None = None

    def __post_init__(self) -> None:
        if self.lr_scheduler_type not in DECAYS:
            raise SettingsError(f"lr_scheduler_type={self.lr_scheduler_type!r}: choose one of {', '.join(DECAYS)}")
        if self.max_steps < 1:
            raise SettingsError(f"max_steps={self.max_steps}: must be at least 1")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise SettingsError(
                f"warmup_steps={self.warmup_steps}: must be at least 0 and below max_steps={self.max_steps}"
            )

    def factor(self, update: int) -> float:
        """The factor on the learning rate at update `update` (0-based)."""
        if update < self.warmup_steps:
            return (update + 1) / self.warmup_steps
        start = self.warmup_steps if self.decay_from is None else self.decay_from
        progress = min(1.0, max(0, update - start) / (self.max_steps - start))
        return DECAYS[self.lr_scheduler_type](progress)
