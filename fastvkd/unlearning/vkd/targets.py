"""Where forget images are sent: which rows of the teacher's features stand as the target of each image at each site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvkd.unlearning.vkd.scenes import Scenes
from fastvkd.unlearning.vkd.teacher import FeatureCache


@dataclass(frozen=True)
class SiteLoss:
    """How one site counts: `weight` (the sites' weights sum to 1), and the kernel's `scale` and `beta`."""

    weight: float
    scale: float = 1.0
    beta: float = 1.0

    @classmethod
    def of(cls, weight: float, variance: float, distance: str, beta: float) -> "SiteLoss":
        """mse is divided by the teacher's `variance` at the site; smooth_l1 is in units of its standard deviation."""
        variance = max(variance, 1e-12)
        if distance == "mse":
            return cls(weight, scale=1 / variance)
        if distance == "smooth_l1":
            return cls(weight, scale=variance**-0.5, beta=beta * variance**0.5)
        return cls(weight)


@dataclass(frozen=True)
class SiteTargets:
    """Targets of one batch at one site: row n of the batch's visual tokens aims at `target[target_rows[n]]`."""

    target: Tensor  # (M, H)
    target_rows: Tensor  # (N,) int64
    loss: SiteLoss

    def moved(self, move: Callable[[Tensor], Tensor]) -> "SiteTargets":
        """The same targets, both tensors moved by `move`."""
        return SiteTargets(move(self.target), move(self.target_rows), self.loss)


class TargetTable:
    """Looks up the target features of images at one site.

    `source` maps an image's key to the key whose features it aims at: a noise image, another image, or `"mean"`. Other
    images aim at their own features. Forget images with a `reference` aim at what that model sees of them, those in
    `maps`, by key, at what the map there makes of their own.
    """

    def __init__(
        self,
        cache: FeatureCache,
        source: dict[str, str],
        loss: SiteLoss,
        mean: Tensor | None = None,
        reference: FeatureCache | None = None,
        maps: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ):
        self.cache, self.source, self.loss, self.mean, self.reference = cache, source, loss, mean, reference
        self.maps = maps or {}

    def counts(self, keys: Sequence[str]) -> list[int]:
        """Number of visual tokens of each image.

        An image that the teacher has not seen has as many as what it aims at: a noise image of its size, or itself as
        the reference sees it.
        """
        return [len(self._rows(key if key in self.cache.spans else self.source.get(key, key))) for key in keys]

    def gather(
        self, keys: Sequence[str], seen_now: Sequence[Tensor | None] | None = None, scenes: Scenes | None = None
    ) -> SiteTargets:
        """Targets of images `keys`. A target that several images share is read once.

        `seen_now[i]`, where given and not None, is image i's target (N_i, H) itself, but for a map. A map moves the
        tokens of the image's subject alone, where `scenes` says which these are.
        """
        blocks: dict[str, tuple[int, Tensor]] = {}
        start = 0
        indices = []
        for i, (key, count) in enumerate(zip(keys, self.counts(keys), strict=True)):
            now = seen_now[i] if seen_now is not None else None
            name = f"view {i}" if now is not None else self.source.get(key, key)
            if name not in blocks:
                rows = now if now is not None else self._rows(name)
                if key in self.maps:
                    mapped = self.maps[key](rows.float())
                    subject = None if scenes is None else scenes.subject(i, len(rows))
                    rows = mapped if subject is None else torch.where(subject[:, None].to(rows.device), mapped, rows)
                blocks[name] = (start, rows)
                start += len(rows)
            first, rows = blocks[name]
            # An image of another size has another number of tokens: take the nearest in reading order.
            indices.append(first + torch.arange(count) * len(rows) // count)
        return SiteTargets(_concatenate([rows for _, rows in blocks.values()]), torch.cat(indices), self.loss)

    def _rows(self, name: str) -> Tensor:
        if name == "mean":
            assert self.mean is not None
            return self.mean
        if self.reference is not None and name in self.reference.spans:
            return self.reference.features(name)
        return self.cache.features(name)


def _concatenate(blocks: Sequence[Tensor]) -> Tensor:
    """One (M, H) tensor; float32 where the blocks' dtypes differ (a mean beside float8 rows)."""
    dtypes = {b.dtype for b in blocks}
    device = max((b.device for b in blocks), key=lambda d: d.type != "cpu")
    if len(dtypes) == 1 and blocks[0].dtype.itemsize == 1:  # torch.cat lacks float8
        return torch.cat([b.to(device, non_blocking=True).view(torch.uint8) for b in blocks]).view(blocks[0].dtype)
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.cat([b.to(device, dtype, non_blocking=True) for b in blocks])


def mean_features(cache: FeatureCache, keys: Sequence[str]) -> Tensor:
    """The teacher's mean over images `keys`: (N, H) by token position if all have N tokens, else (1, H)."""
    counts = {cache.spans[key][1] for key in keys}
    by_position = len(counts) == 1
    total, seen = torch.zeros(counts.pop() if by_position else 1, cache.width, dtype=torch.float64), 0
    for key in keys:
        rows = cache.features(key).double()
        total += rows if by_position else rows.sum(0, keepdim=True)
        seen += 1 if by_position else len(rows)
    return (total / seen).float()


def variance(cache: FeatureCache, keys: Sequence[str]) -> float:
    """Mean over width of the variance of the teacher's features over the tokens of images `keys`."""
    count, first, second = 0, *torch.zeros(2, cache.width, dtype=torch.float64)
    for key in keys:
        rows = cache.features(key).double()
        count += len(rows)
        first += rows.sum(0)
        second += (rows * rows).sum(0)
    return float((second / count - (first / count) ** 2).mean())


def redirect(forget: Sequence[str], retain: Sequence[str], seed: int) -> dict[str, str]:
    """Another, retained image for every forget image, drawn without repetition while there are enough."""
    rng = np.random.default_rng([seed, 13])
    order = np.concatenate([rng.permutation(len(retain)) for _ in range(-(-len(forget) // len(retain)))])
    return {key: retain[int(i)] for key, i in zip(forget, order, strict=False)}
