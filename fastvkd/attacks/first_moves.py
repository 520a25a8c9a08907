"""What an attacker does to a model before relearning. Each move undoes what some way of forgetting rests on, and costs
the attacker nothing: dead units, a projector through which little passes, weights that lie in a narrow place.

Relearning after a move is the same attack as the plain one, so the strongest of all is what counts (cf. arXiv
2505.22310, 2506.01339, where a few steps on other data bring forgotten answers back).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastvkd.models.answers import AnswerBatch
from fastvkd.models.families import base_model, family_of, projector_modules, visual_parameters

SHIFT = 10.0  # added to hidden biases: beyond the dead part of GELU and SiLU for any unit of usual size
NOISE = 0.1  # standard deviation, as a share of the root mean square of a tensor

Move = Callable[[nn.Module, AnswerBatch, torch.Generator], None]


@torch.no_grad()
def redraw_projector(model: nn.Module, batch: AnswerBatch, generator: torch.Generator) -> None:
    """Draw the projector's matrices anew, as large as they were, and set its biases to 0: what it hides is gone, and
    the tower in front of it is as it was."""
    for name, parameter in visual_parameters(model, family_of(model), "projector"):
        if parameter.ndim == 2:
            parameter.copy_(_normal(parameter, generator) * parameter.float().std())
        elif name.endswith("bias"):
            parameter.zero_()


@torch.no_grad()
def shift_biases(model: nn.Module, batch: AnswerBatch, generator: torch.Generator) -> None:
    """Add 10 to the biases of the projector's hidden units: dead ones live again."""
    for layer in _hidden(model):
        layer.bias.add_(SHIFT)


@torch.no_grad()
def recentre_biases(model: nn.Module, batch: AnswerBatch, generator: torch.Generator) -> None:
    """Take the mean over the attacker's photos off the projector's hidden units: dead ones live again."""
    for layer in _hidden(model):  # in their order, since the first moves what the next one gets
        with _outputs(layer) as seen:
            base_model(model)(**batch.inputs, use_cache=False)
        layer.bias.sub_(torch.cat([output.flatten(0, -2) for output in seen]).mean(0))


@torch.no_grad()
def add_noise(model: nn.Module, batch: AnswerBatch, generator: torch.Generator) -> None:
    """Add noise of a tenth of its size to every visual weight."""
    for _, parameter in visual_parameters(model, family_of(model), "vision+projector"):
        strength = NOISE * float(parameter.float().square().mean().sqrt())
        parameter.add_(_normal(parameter, generator) * strength)


MOVES: dict[str, Move] = {
    "redrawn_projector": redraw_projector,
    "shifted_biases": shift_biases,
    "recentred_biases": recentre_biases,
    "noise": add_noise,
}


def applies(move: str, model: nn.Module) -> bool:
    """Whether a move does anything to `model`: some projectors have no hidden units, or no biases."""
    return MOVES[move] not in (shift_biases, recentre_biases) or bool(_hidden(model))


@torch.no_grad()
def put_back(model: nn.Module, public: nn.Module, part: Literal["vision", "projector"]) -> None:
    """Take the tower or the projector of a model that everybody can download. Raises RuntimeError where its shapes are
    others."""
    theirs = dict(visual_parameters(public, family_of(public), part))
    for name, parameter in visual_parameters(model, family_of(model), part):
        parameter.copy_(theirs[name])


@torch.no_grad()
def moved(model: nn.Module, before: Mapping[str, Tensor]) -> float:
    """How far the visual weights of `model` lie from those `before` (by name, on any device): the norm of the
    difference over the norm."""
    squares = []
    # One tensor after the other: a card has no room for a second copy of a large tower.
    for name, weight in visual_parameters(model, family_of(model), "vision+projector"):
        old = before[name].to(weight.device).float()
        squares.append(torch.stack([(weight.float() - old).square().sum(), old.square().sum()]))
    away, whole = torch.stack(squares).sum(0).tolist()
    return math.sqrt(away / whole)


def condition_number(model: nn.Module) -> float:
    """The largest condition number of the projector's matrices, which is large where few directions pass through."""
    matrices = [p.detach() for _, p in visual_parameters(model, family_of(model), "projector") if p.ndim == 2]
    return max(float(torch.linalg.cond(matrix.float().cpu())) for matrix in matrices)


def _hidden(model: nn.Module) -> list[nn.Linear]:
    """The projector's layers in front of its last one that have biases."""
    layers = [layer for layer in projector_modules(model, family_of(model)) if isinstance(layer, nn.Linear)]
    return [layer for layer in layers[:-1] if layer.bias is not None]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that it is the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


@contextmanager
def _outputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        handle.remove()
