"""Partial fine-tuning: move only the visual weights that matter to the forget set more than to the retain set.

The mask acts on every gradient as it is computed, before an engine accumulates, flattens or clips it. Without weight
decay a masked-out weight has zero moments for ever, and ends bit-identical to where it began.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from fastvkd_kernels import SaliencyMask, apply_mask_, fisher_accumulate_, saliency_mask
from torch import Tensor, nn

from fastvkd.errors import TrainingError
from fastvkd.methods import SIDES, Side
from fastvkd.settings import Saliency

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def fisher_information(parameters: NamedParameters, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information in float32: mean squared gradient over `losses`, per parameter.

    Each element of `losses` computes a scalar with graph.
    """
    return _mean_over(parameters, losses, fisher_accumulate_)


def mean_gradient(parameters: NamedParameters, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean gradient over `losses` in float32, per parameter."""
    return _mean_over(parameters, losses, Tensor.add_)


def _mean_over(
    parameters: NamedParameters, losses: Iterable[Callable[[], Tensor]], add: Callable[[Tensor, Tensor], Any]
) -> dict[str, Tensor]:
    """Mean over `losses` of what `add(total, gradient)` adds of each parameter's gradient."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters}
    values = [p for _, p in parameters]
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), values, allow_unused=True)
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                add(total[name], gradient)
        count += 1
    return {name: value / max(count, 1) for name, value in total.items()}


def wagle_scores(
    parameters: NamedParameters,
    gradient_forget: dict[str, Tensor],
    gradient_retain: dict[str, Tensor],
    fisher_retain: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Weight attribution |S|, S = theta g_f - g_r g_f / gamma, element by element; g_f, g_r are mean gradients.

    gamma stands for the curvature of l_r, taken as one number: the mean of its Fisher diagonal over all weights.

    A weight is attributed what forgetting gains by it, less what re-optimising for the retain set takes back.

    Source: WAGLE (Jia et al., NeurIPS 2024, arXiv 2410.17509), by implicit differentiation of a bi-level problem.
    """
    total = sum(float(f.sum()) for f in fisher_retain.values())
    gamma = max(total / sum(f.numel() for f in fisher_retain.values()), torch.finfo(torch.float32).tiny)
    return {
        name: (p.detach().float() * gradient_forget[name] - gradient_retain[name] * gradient_forget[name] / gamma).abs()
        for name, p in parameters
    }


def random_scores(parameters: NamedParameters, seed: int) -> dict[str, Tensor]:
    """Uniform in [0, 1), float32: what a mask by importance is to be compared with. The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator).to(p.device) for name, p in parameters}


def build_masks(scores: dict[str, Tensor], against: dict[str, Tensor], rule: Saliency) -> dict[str, SaliencyMask]:
    """A bit-packed mask for every parameter, by the ratio of the two (the second may be 1 everywhere).

    Raises TrainingError when there is no parameter, and when not a single weight would be trained.
    """
    if not scores:
        raise TrainingError("the saliency mask matches no parameter: check `trainable`")
    how: dict[str, Any] = {"threshold": rule.threshold, "fraction": rule.fraction, "granularity": rule.granularity}
    masks = {name: saliency_mask(score, against[name], **how) for name, score in scores.items()}
    if not any(mask.count() for mask in masks.values()):
        key = "threshold" if rule.threshold is not None else "fraction"
        raise TrainingError(
            f"saliency.{key}={how[key]} leaves no weight to train in {len(masks)} parameters: choose a milder value"
        )
    return masks


def masks_of(
    rule: Saliency,
    parameters: NamedParameters,
    losses: Callable[[Side], Iterable[Callable[[], Tensor]]],
    seed: int,
    start: Sequence[Tensor],
) -> dict[str, SaliencyMask]:
    """The masks of a run by the `losses` of each side; afterwards the parameters have their values in `start`."""
    fisher_forget, fisher_retain = (fisher_information(parameters, losses(side)) for side in SIDES)
    check_reached(fisher_forget, fisher_retain)
    scores, against = fisher_forget, fisher_retain
    if rule.score == "wagle":
        forget, retain = (mean_gradient(parameters, losses(side)) for side in SIDES)
        scores = wagle_scores(parameters, forget, retain, fisher_retain)
    elif rule.score == "random":
        scores = random_scores(parameters, seed)
    if rule.score != "fisher":  # they are no ratios
        against = {name: torch.ones_like(score) for name, score in scores.items()}
    put_back(parameters, start)
    return build_masks(scores, against, rule)


def nudge(parameters: NamedParameters, loss: Tensor, size: float) -> None:
    """One step of `size` against the sign of the gradient of `loss`, as Adam's first."""
    gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    with torch.no_grad():
        for (_, parameter), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(size * gradient.sign())


@torch.no_grad()
def put_back(
    parameters: NamedParameters, values: Sequence[Tensor], masks: Mapping[str, SaliencyMask] | None = None
) -> None:
    """Give the parameters these values; with masks only where a mask holds them."""
    for (name, parameter), value in zip(parameters, values, strict=True):
        kept = value if masks is None else torch.where(masks[name].to(value.device).to_bool(), parameter, value)
        parameter.copy_(kept)


def check_reached(fisher_forget: dict[str, Tensor], fisher_retain: dict[str, Tensor]) -> None:
    """Refuse a mask over a matrix that no gradient reaches: it would match the parameter and mean nothing.

    (A bias may have a gradient of exactly zero, such as that of attention's keys.)
    """
    silent = [n for n, f in fisher_forget.items() if f.dim() >= 2 and not f.any() and not fisher_retain[n].any()]
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(fisher_forget)} parameters under the saliency mask get no gradient, first "
            f"{silent[0]}: choose `trainable` so that the loss reaches all of it"
        )


def mask_gradients(parameters: NamedParameters, masks: dict[str, SaliencyMask]) -> None:
    """From now on every gradient of a masked parameter is zero outside its mask."""
    for name, parameter in parameters:
        mask = masks[name].to(parameter.device)

        def hook(gradient: Tensor, mask: SaliencyMask = mask) -> Tensor:
            return apply_mask_(gradient.clone(), mask)

        parameter.register_hook(hook)


def trained_share(masks: dict[str, SaliencyMask]) -> float:
    """Share of weights that may move, 0 to 1."""
    return sum(m.count() for m in masks.values()) / sum(m.shape.numel() for m in masks.values())
