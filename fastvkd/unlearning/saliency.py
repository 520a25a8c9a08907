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


def build_masks(
    fisher_forget: dict[str, Tensor],
    fisher_retain: dict[str, Tensor],
    *,
    granularity: str,
    threshold: float | None,
    fraction: float | None,
) -> dict[str, SaliencyMask]:
    """A bit-packed mask for every parameter. Raises TrainingError when not a single weight would be trained."""
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
