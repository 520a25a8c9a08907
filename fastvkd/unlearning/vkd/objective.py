"""The VKD objective: pull retained images to the frozen original's features, forget images to their targets.

One batch holds both kinds of image and goes through the model once. Each site costs one fused loss launch, whose
per-row weights carry the lambdas. Legend: B images, N visual tokens, H width.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastvkd_kernels import visual_distill_loss
from torch import Tensor, nn

from fastvkd.models.visual_path import SiteFeatures, VisualBatch, VisualPath
from fastvkd.unlearning.vkd.saturation import ProjectorUnits
from fastvkd.unlearning.vkd.scenes import Scenes
from fastvkd.unlearning.vkd.targets import SiteTargets


@dataclass
class DistillBatch:
    """One step's images and what each visual token aims at.

    is_forget: (B,) bool. targets: by site. weight: (B,) float32, an extra factor per image; None for 1. One device.
    keys: of the images. taught: the images whose targets an online teacher has yet to give. scenes: where they stand.
    """

    images: VisualBatch
    is_forget: Tensor
    targets: dict[str, SiteTargets]
    weight: Tensor | None = None
    keys: Sequence[str] = ()
    taught: VisualBatch | None = None
    scenes: Scenes | None = None

    def to(self, device: torch.device) -> "DistillBatch":
        """The same batch on `device`; copies from pinned memory are not waited for."""
        return self._moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "DistillBatch":
        """The same batch in page-locked host memory."""
        return self._moved(lambda part: part.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> "DistillBatch":
        weight, taught = (None if part is None else move(part) for part in (self.weight, self.taught))
        targets = {site: target.moved(move) for site, target in self.targets.items()}
        return DistillBatch(move(self.images), move(self.is_forget), targets, weight, self.keys, taught, self.scenes)


class VisualDistillation(nn.Module):
    """`lambda_forget * L_f + lambda_retain * L_r` over the sites of `path`, for one batch.

    L_f and L_r are means over the images of their kind. An image's value is the mean over its visual tokens of the
    distance, weighted over sites. With `repel` forget rows have no target: they cost `relu(margin - d(z, z0))`. With
    `units` L_f is the first of `ProjectorUnits.losses` instead, and the second is added to L_r.
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
        units: ProjectorUnits | None = None,
        saturation_margin: float = 20.0,
    ):
        super().__init__()
        self.path = path
        self.distance, self.repel, self.margin = distance, repel, margin
        self.units, self.saturation_margin = units, saturation_margin
        self.lambda_forget, self.lambda_retain = lambda_forget, lambda_retain

    def forward(self, batch: DistillBatch) -> dict[str, Tensor]:
        """`loss` (scalar, with graph), and detached `loss_forget` and `loss_retain`.

        With units also `forget_open`, the share of the batch's forget images that are not closed yet.
        """
        return self.terms(self.path(batch.images), batch)

    def terms(self, seen: dict[str, SiteFeatures], batch: DistillBatch) -> dict[str, Tensor]:
        """The same of features that the path has given already."""
        is_forget = batch.is_forget
        count = torch.where(is_forget, is_forget.sum().clamp(min=1), (~is_forget).sum().clamp(min=1))
        # With saturated units a forget image aims at nothing at the sites.
        factor = torch.where(is_forget, 0.0 if self.units else self.lambda_forget, self.lambda_retain)
        if batch.weight is not None:
            factor = factor * batch.weight
        parts = [
            self._site_terms(features, batch.targets[site], is_forget, count, factor) for site, features in seen.items()
        ]
        loss, forget, retain = (functools.reduce(operator.add, terms) for terms in zip(*parts, strict=True))
        further: dict[str, Tensor] = {}
        if self.units is not None:
            closing, opening, further["forget_open"] = self.units.losses(
                is_forget, batch.weight, self.saturation_margin
            )
            loss = loss + self.lambda_forget * closing + self.lambda_retain * opening
            forget, retain = closing.detach(), retain + opening.detach()
        return {"loss": loss, "loss_forget": forget, "loss_retain": retain, **further}

    def _site_terms(
        self, features: SiteFeatures, targets: SiteTargets, is_forget: Tensor, count: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One site's part of the loss, of L_f and of L_r; only the first has a graph.

        count: (B,), how many images of its kind an image shares the batch with. factor: (B,), on top of L_f and L_r.
        """
        image = features.image_of_row
        tokens = torch.zeros_like(is_forget, dtype=torch.float32).index_add_(
            0, image, torch.ones_like(image, dtype=torch.float32)
        )
        # The weight of a row in L_f or L_r; the lambdas come on top.
        row_share = (targets.loss.weight / (tokens * count))[image]
        row_is_forget = is_forget[image]
        loss, distances = visual_distill_loss(
            features.hidden,
            features.rows,
            targets.target,
            target_rows=targets.target_rows,
            weight=row_share * factor[image],
            repel=row_is_forget if self.repel else None,
            margin=self.margin,
            distance=self.distance,
            scale=targets.loss.scale,
            beta=targets.loss.beta,
            return_rows=True,
        )
        with torch.no_grad():
            retain = torch.where(row_is_forget, 0, distances * row_share).sum()
            costs = (self.margin - distances).relu() if self.repel else distances
            forget = torch.where(row_is_forget, costs * row_share, 0).sum()
        return loss, forget, retain
