"""The forget target `saturate`: forget images leave the projector as its output bias, and no gradient comes back.

A projector is linear - GELU - linear. Far below zero GELU and its derivative are exactly zero in floating point (torch
on a CPU; by its formula the derivative is under 1e-20 at -10). Where every hidden unit lies there, a token is the
second layer's bias whatever the image shows. The LLM cannot see the image, and fine-tuning on it changes neither the
tower nor the first layer. This is ours, not the paper's; docs/method.md tells what it withstands and what it does not.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastvkd.errors import ModelError
from fastvkd.models import families
from fastvkd.models.visual_path import VisualBatch

WORST = 0.1  # weight of an image's least saturated unit beside the mean over its units
_DEAD = -7.0  # here and below GELU is zero in float32 and its derivative zero or under 1e-10
_START = 2.5  # length of the start's rows over the mean length of the first layer's rows


class ProjectorUnits:
    """What enters the projector's activation, seen by a hook: (patches, hidden units) of the last forward pass."""

    def __init__(self, model: nn.Module):
        family = families.family_of(model)
        self.first_layer, activation = _first_layer_and_activation(model, family)
        self._seen: Tensor | None = None
        activation.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen = inputs[0].flatten(0, -2)

    def losses(self, is_forget: Tensor, weight: Tensor | None, margin: float) -> tuple[Tensor, Tensor, Tensor]:
        """What closes forget images, what keeps retained ones open, and the share of forget images not closed yet.

        The first two are means over the images of their kind. The third counts images with a live unit and has no
        graph.

        With x the units of an image, (.)+ the positive part and m the margin:
        forget `mean(((x + m)+ / m)^2) + WORST * max(((x + m)+ / m)^2)`, over patches and units;
        retain `mean(((-max x)+ / m)^2)`, the maximum over units, the mean over patches. A retained image that was
        saturated by mistake gives no gradient of its features any more: without this term it would stay so.

        is_forget: (B,) bool, the images of the last pass, each with as many patches. weight: (B,) factors or None.
        """
        assert self._seen is not None
        units, self._seen = self._seen.float(), None
        units = units.view(len(is_forget), -1, units.shape[-1])  # (B, patches of an image, hidden units)
        above = ((units + margin).relu() / margin).square().flatten(1)
        closing = above.mean(1) + WORST * above.amax(1)
        opening = (-units.amax(2)).relu().div(margin).square().mean(1)
        factor = torch.ones_like(closing) if weight is None else weight
        n_forget = is_forget.sum()
        forget = torch.where(is_forget, closing * factor, 0).sum() / n_forget.clamp(min=1)
        retain = torch.where(is_forget, 0, opening * factor).sum() / (len(is_forget) - n_forget).clamp(min=1)
        live = is_forget & (units.detach().amax((1, 2)) > _DEAD)
        return forget, retain, live.sum() / n_forget.clamp(min=1)

    @torch.no_grad()
    def start(self, run: Callable[[VisualBatch], Any], retained: Iterable[VisualBatch]) -> None:
        """Give all units one common direction to be switched off along: the one retained images use least.

        W <- W - c 1 u^T, with W the first layer's weight and c `_START` times the mean length of its rows. u is the
        eigenvector of the smallest eigenvalue of the second moment of what retained images give to that layer, so what
        they get from it changes little. Without a start the units would have to agree by training, and a few never do.
        """
        weight = self.first_layer.weight
        moment = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)

        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double().cpu()
            moment.add_(rows.T @ rows)

        with self.first_layer.register_forward_pre_hook(add):  # only here: a step must not keep these inputs alive
            for batch in retained:
                run(batch)
        self._seen = None
        least = torch.linalg.eigh(moment).eigenvectors[:, 0].to(weight)
        # An eigenvector has no sign of its own; one is chosen so that every machine starts alike.
        least = least * least[least.abs().argmax()].sign()
        weight.sub_(_START * weight.norm(dim=1).mean() * least)


def _first_layer_and_activation(model: nn.Module, family: families.Family) -> tuple[nn.Linear, nn.Module]:
    """The linear layer and the activation behind it of the one MLP through which all that the LLM sees passes.

    Raises ModelError where there is no such MLP, or where visual features enter the LLM beside it.
    """
    wanted = "forget_target=saturate needs one linear - GELU - linear projector with as many patches for every image"
    if not family.fixed_resolution or family.deepstack is not None:
        raise ModelError(f"{wanted}; {family.name} has none: use forget_target=noise")
    linear: nn.Linear | None = None
    for module in families.projector_modules(model, family):
        if isinstance(module, nn.Linear):
            linear = module
        elif linear is not None and (isinstance(module, nn.GELU) or type(module).__name__.startswith("GELU")):
            return linear, module
    raise ModelError(f"{wanted}; this {family.name} has none: use forget_target=noise")
