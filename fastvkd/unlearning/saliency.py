"""Partial fine-tuning: move only the visual weights that matter to the forget set more than to the retain set.

The mask acts on every gradient as it is computed, before an engine accumulates, flattens or clips it. With no weight
decay a masked-out weight then has zero moments for ever and ends bit-identical to where it began.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from fastvkd_kernels import SaliencyMask, apply_mask_, fisher_accumulate_, saliency_mask
from torch import Tensor, nn

from fastvkd.errors import TrainingError

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def fisher_information(parameters: NamedParameters, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information in float32: mean squared gradient over `losses`, per parameter.

    Each element of `losses` computes a scalar with graph; gradients of `parameters` are cleared afterwards.
    """
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters}
    values = [p for _, p in parameters]
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), values, allow_unused=True)
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                fisher_accumulate_(fisher[name], gradient)
        count += 1
    for value in fisher.values():
        value /= max(count, 1)
    return fisher


def mean_gradient(parameters: NamedParameters, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean gradient over `losses` in float32, per parameter."""
    values = [p for _, p in parameters]
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), values, allow_unused=True)
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
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

    Source: WAGLE (Jia et al., NeurIPS 2024, arXiv 2410.17509): implicit differentiation of a bi-level problem, where a
    weight is attributed what forgetting gains by it, less what re-optimising for the retain set takes back.
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


def build_masks(
    fisher_forget: dict[str, Tensor],
    fisher_retain: dict[str, Tensor],
    *,
    granularity: str,
    threshold: float | None,
    fraction: float | None,
) -> dict[str, SaliencyMask]:
    """A bit-packed mask for every parameter, by the ratio of the two scores (the second may be 1 everywhere).

    Raises TrainingError when there is no parameter, and when not a single weight would be trained.
    """
    if not fisher_forget:
        raise TrainingError("the saliency mask matches no parameter: check `trainable`")
    masks = {
        name: saliency_mask(
            fisher_forget[name],
            fisher_retain[name],
            threshold=threshold,
            fraction=fraction,
            granularity=granularity,
        )
        for name in fisher_forget
    }
    if not any(mask.count() for mask in masks.values()):
        rule = f"saliency.threshold={threshold}" if threshold is not None else f"saliency.fraction={fraction}"
        raise TrainingError(f"{rule} leaves no weight to train in {len(masks)} parameters: choose a milder value")
    return masks


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
