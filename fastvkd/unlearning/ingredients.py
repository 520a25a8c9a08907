"""What a task is made of: data and processor, then the model and which of its weights are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastvkd.models.folder import BaseModel
from fastvkd.records import Profile

Forward = Callable[[Callable[[Any], Any], Any], Any]  # (function, batch) -> function(batch), the weights in place


@dataclass(frozen=True)
class Sources:
    """What a run knows before its model is loaded."""

    forget: list[Profile]
    retain: list[Profile]
    processor: Any
    config: Any  # of the model
    base: BaseModel
    llm_layers: int | None  # to be loaded; None for all


class Runner(nn.Module):
    """A model as an engine takes it: `runner(function, batch)` is `function(batch)` inside the engine's forward pass.

    So an engine can be built before there is a task, which ZeRO-3 needs.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[Any], Any], batch: Any) -> Any:
        return function(batch)


@dataclass(frozen=True)
class Trained:
    """A model, its `parameters` that an engine may change, and the copy of the original that runs beside, if one does.

    `runner` is what an engine wraps.
    """

    model: nn.Module
    parameters: list[tuple[str, nn.Parameter]]
    teacher: nn.Module | None
    runner: Runner

    @property
    def models(self) -> list[nn.Module]:
        return [self.model] if self.teacher is None else [self.model, self.teacher]

    @property
    def trainable_parameters(self) -> int:
        return sum(map(_size, (p for _, p in self.parameters)))

    @property
    def frozen_parameters(self) -> int:
        return sum(map(_size, self.model.parameters())) - self.trainable_parameters


def _size(parameter: nn.Parameter) -> int:
    """How many weights there are: ZeRO-3 leaves an empty tensor in place of those it has split."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
