"""The VKD objective: pull retained images to the frozen original's features, forget images to their targets.

One batch holds both kinds of image. It goes through the model once, and each site costs one fused loss launch whose
per-row weights carry the lambdas. Legend: B images, N visual tokens, H width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fastvkd_kernels import visual_distill_loss
from torch import Tensor, nn

from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.unlearning.saturation import ProjectorUnits
from fastvkd.unlearning.targets import SiteTargets


@dataclass
class DistillBatch:
    """One step's images and what each visual token aims at.

    is_forget: (B,) bool. targets: by site. weight: (B,) float32, an extra factor per image; None for 1. One device.
    keys: the images' content hashes. taught: those of the images whose targets an online teacher has yet to give.
    """

    images: VisualBatch
    is_forget: Tensor
    targets: dict[str, SiteTargets]
    weight: Tensor | None = None
    keys: Sequence[str] = ()
    taught: VisualBatch | None = None

    def to(self, device: torch.device) -> "DistillBatch":
        """The same batch on `device`; copies from pinned memory are not waited for."""
        targets = {site: target.to(device) for site, target in self.targets.items()}
        return DistillBatch(
            self.images.to(device, non_blocking=True),
            self.is_forget.to(device, non_blocking=True),
            targets,
            None if self.weight is None else self.weight.to(device, non_blocking=True),
            self.keys,
            None if self.taught is None else self.taught.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "DistillBatch":
        """The same batch in page-locked host memory."""
        targets = {site: target.pin_memory() for site, target in self.targets.items()}
        weight = None if self.weight is None else self.weight.pin_memory()
        taught = None if self.taught is None else self.taught.pin_memory()
        return DistillBatch(self.images.pin_memory(), self.is_forget.pin_memory(), targets, weight, self.keys, taught)


@dataclass(frozen=True)
class SiteLoss:
    """How one site counts: `weight` (the sites' weights sum to 1), and the kernel's `scale` and `beta`."""

    weight: float
    scale: float = 1.0
    beta: float = 1.0


def site_losses(
    weights: Mapping[str, float], variances: Mapping[str, float], distance: str, beta: float
) -> dict[str, SiteLoss]:
    """Per-site constants: mse is divided by the teacher's variance, smooth_l1 is in units of its standard deviation."""
    total = sum(weights.values())
    result = {}
    for site, weight in weights.items():
        variance = max(variances[site], 1e-12)
        share = weight / total
        if distance == "mse":
            result[site] = SiteLoss(share, scale=1 / variance)
        elif distance == "smooth_l1":
            result[site] = SiteLoss(share, scale=variance**-0.5, beta=beta * variance**0.5)
        else:
            result[site] = SiteLoss(share)
    return result


class VisualDistillation(nn.Module):
    """`lambda_forget * L_f + lambda_retain * L_r` over the sites of `path`, for one batch.

    L_f and L_r are means over the images of their kind of the mean over visual tokens of the distance, weighted over
    sites. With `repel` forget rows have no target: they cost `relu(margin - d(z, z0))`. With `units` L_f is the first
    of `ProjectorUnits.losses` instead, and the second is added to L_r.
    """

    def __init__(
        self,
        path: VisualPath,
        *,
        distance: str,
        lambda_forget: float,
        lambda_retain: float,
        repel: bool = False,
        margin: float = 1.0,
        saturation_margin: float = 20.0,
    ):
        super().__init__()
        self.path = path
        self.units: ProjectorUnits | None = None  # set where forget images are to saturate them
        self.saturation_margin = saturation_margin
        self.losses: dict[str, SiteLoss] = {}  # set once the teacher's variance at the sites is known
        self.distance, self.repel, self.margin = distance, repel, margin
        self.lambda_forget, self.lambda_retain = lambda_forget, lambda_retain

    def forward(self, batch: DistillBatch) -> dict[str, Tensor]:
        """`loss` (scalar, with graph), and detached `loss_forget`, `loss_retain`; with units also `forget_open`, the
        share of the batch's forget images that are not closed yet."""
        is_forget = batch.is_forget
        n_forget = is_forget.sum().clamp(min=1)
        n_retain = (~is_forget).sum().clamp(min=1)
        loss: Tensor | float = 0.0
        forget: Tensor | float = 0.0
        retain: Tensor | float = 0.0
        for site, features in self.path(batch.images).items():
            constants = self.losses[site]
            targets = batch.targets[site]
            image = features.image_of_row
            tokens = torch.zeros_like(is_forget, dtype=torch.float32).index_add_(
                0, image, torch.ones_like(image, dtype=torch.float32)
            )
            # The weight of a row in L_f or L_r; the lambdas come on top.
            share = constants.weight / (tokens * torch.where(is_forget, n_forget, n_retain))
            # With saturated units a forget image aims at nothing at the sites.
            factor = torch.where(is_forget, 0.0 if self.units else self.lambda_forget, self.lambda_retain)
            if batch.weight is not None:
                factor = factor * batch.weight
            row_is_forget = is_forget[image]
            row_share = share[image]
            site_loss, distances = visual_distill_loss(
                features.hidden,
                features.rows,
                targets.target,
                target_rows=targets.target_rows,
                weight=row_share * factor[image],
                repel=row_is_forget if self.repel else None,
                margin=self.margin,
                distance=self.distance,
                scale=constants.scale,
                beta=constants.beta,
                return_rows=True,
            )
            loss = loss + site_loss
            with torch.no_grad():
                terms = distances * row_share
                kept = torch.where(row_is_forget, 0, terms).sum()
                if self.repel:
                    terms = (self.margin - distances).relu() * row_share
                forget = forget + torch.where(row_is_forget, terms, 0).sum()
                retain = retain + kept
        further: dict[str, Tensor] = {}
        if self.units is not None:
            closing, opening, further["forget_open"] = self.units.losses(
                is_forget, batch.weight, self.saturation_margin
            )
            loss = loss + self.lambda_forget * closing + self.lambda_retain * opening
            forget, retain = closing.detach(), retain + opening.detach()
        assert isinstance(loss, Tensor) and isinstance(forget, Tensor) and isinstance(retain, Tensor)
        return {"loss": loss, "loss_forget": forget, "loss_retain": retain, **further}
