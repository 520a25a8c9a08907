"""Where forget images are sent: which rows of the teacher's features stand as the target of each image at each site."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvkd.unlearning.teacher import FeatureCache


@dataclass
class SiteTargets:
    """Targets of one batch at one site: row n of the batch's visual tokens aims at `target[target_rows[n]]`."""

    target: Tensor  # (M, H)
    target_rows: Tensor  # (N,) int64

    def to(self, device: torch.device | str) -> "SiteTargets":
        return SiteTargets(self.target.to(device, non_blocking=True), self.target_rows.to(device, non_blocking=True))

    def pin_memory(self) -> "SiteTargets":
        return SiteTargets(self.target.pin_memory(), self.target_rows.pin_memory())


class TargetTable:
    """Looks up the target features of images at one site.

    `source` maps an image key to the key whose features it aims at (a noise image, another image, or `"mean"`); an
    image that is not in it aims at its own. Forget images with a `reference` aim at what that model sees of them.
    """

    def __init__(
        self,
        cache: FeatureCache,
        source: dict[str, str],
        mean: Tensor | None = None,
        reference: FeatureCache | None = None,
    ):
        self.cache, self.source, self.mean, self.reference = cache, source, mean, reference

    def counts(self, keys: Sequence[str]) -> list[int]:
        """Number of visual tokens of each image. One that the teacher has not seen has as many as what it aims at: a
        noise image of its size, or itself as the reference sees it."""
        return [len(self._rows(key if key in self.cache.spans else self.source.get(key, key))) for key in keys]

    def gather(self, keys: Sequence[str], seen_now: Sequence[Tensor | None] | None = None) -> SiteTargets:
        """Targets of images `keys`. A target that several images share is read once.

        `seen_now[i]`, where given and not None, is image i's target (N_i, H) itself.
        """
        blocks: dict[str, tuple[int, Tensor]] = {}
        start = 0
        indices = []
        for i, (key, count) in enumerate(zip(keys, self.counts(keys), strict=True)):
            now = seen_now[i] if seen_now is not None else None
            name = f"view {i}" if now is not None else self.source.get(key, key)
            if name not in blocks:
                rows = now if now is not None else self._rows(name)
                blocks[name] = (start, rows)
                start += len(rows)
            first, rows = blocks[name]
            # An image of another size has another number of tokens: take the nearest in reading order.
            indices.append(first + torch.arange(count) * len(rows) // count)
        return SiteTargets(_concatenate([rows for _, rows in blocks.values()]), torch.cat(indices))

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
    if len(counts) == 1:
        total = torch.zeros(counts.pop(), cache.width, dtype=torch.float64)
        for key in keys:
            total += cache.features(key).double()
        return (total / len(keys)).float()
    total, seen = torch.zeros(1, cache.width, dtype=torch.float64), 0
    for key in keys:
        rows = cache.features(key).double()
        total += rows.sum(0, keepdim=True)
        seen += len(rows)
    return (total / seen).float()


def variance(cache: FeatureCache, keys: Sequence[str]) -> float:
    """Mean over width of the variance of the teacher's features over the tokens of images `keys`."""
    count, first, second = (
        0,
        torch.zeros(cache.width, dtype=torch.float64),
        torch.zeros(cache.width, dtype=torch.float64),
    )
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
