"""A run that watches itself on held-out views: how far it has come, what it damages, and when it ends.

Needs no gold model, and no LLM above the deepest site. `Watch` looks; `Course` draws the conclusions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvkd.engines.protocol import Engine
from fastvkd.engines.schedule import Schedule
from fastvkd.models.visual_path import SiteFeatures, VisualBatch
from fastvkd.settings import Settings
from fastvkd.unlearning.sampling import draw
from fastvkd.unlearning.vkd.images import ImageSet, Views
from fastvkd.unlearning.vkd.objective import DistillBatch, VisualDistillation
from fastvkd.unlearning.vkd.targets import TargetTable
from fastvkd.unlearning.vkd.teacher import split_by_image

VIEWS = 24  # of each kind of image
GAIN, SLOW = 0.08, 4  # a run has slowed when so many looks in a row bring its loss no such share lower
PATIENCE = 3  # looks in a row beyond max_drift
NEAR = 2.0  # times max_drift: below that, a look with less drift than any before it is on the way back
LOWERED, LOWERINGS = 1 / 3, 2  # what is left of a rate that trials found and that does damage, and how often
# Where a run counts as done. The demo's good runs ended at 0.05-0.07 and 0.005-0.01; 0.038 of drift had cost answers.
DONE_LEFT, DONE_DRIFT = 0.1, 0.02


@dataclass(frozen=True)
class HeldOut:
    """Views of one kind of image and what they aim at, on the host; `share` of all views of their kind."""

    kind: str
    batch: DistillBatch
    share: float


class Watch:
    """Views of forget images and of each kind of kept ones that no step trains on, and what they aim at.

    Every rank looks at all of them. `look` gives:

    - `left`: squared distance that remains to the forget targets, as a share of the original's.
    - `drift_<kind>`: squared distance of kept images' features to the original's, over the variance of these.
    - `watched_loss`: what training minimises, on these views; without any loss on answers.

    Args:
        kinds: by name, `forget` and `retain` among them: positions in `images` to choose from, and the kind's share of
            its side's term in the loss.
        see: maps a batch on `device` to features by site, with the weights of the original.
    """

    def __init__(
        self,
        settings: Settings,
        images: ImageSet,
        kinds: Mapping[str, tuple[Sequence[int], float]],
        tables: Mapping[str, TargetTable],
        objective: VisualDistillation,
        see: Callable[[VisualBatch], dict[str, SiteFeatures]],
        device: torch.device,
    ):
        self._objective, self._device = objective, device
        self._sides = {kind: share for kind, (_, share) in kinds.items()}
        self._parts: list[HeldOut] = []
        retained: dict[str, list[Tensor]] = {site: [] for site in tables}
        start = torch.zeros(len(tables))
        size = settings.per_device_train_batch_size
        # Targets are made where training makes them: beside an online teacher, or on the host with the cache.
        where = device if settings.online_teacher else torch.device("cpu")
        for k, (kind, (pool, _)) in enumerate(kinds.items()):
            chosen = [pool[i] for i in draw(len(pool), 0, VIEWS, (settings.seed, 61, k))]
            # A reference model has seen forget images as they are; a stranger's target is a map of the view itself.
            plain = kind == "forget" and settings.forget_target == "reference"
            own = kind != "forget" or settings.forget_target == "stranger"
            for first in range(0, VIEWS, size):
                part = chosen[first : first + size]
                views = None if plain else Views((settings.seed, 62, k), range(first, first + len(part)), VIEWS)
                inputs, keys = images.batch(part, views), [images.keys[i] for i in part]
                with torch.no_grad():
                    features = see(inputs.to(device))
                    seen = {
                        site: [rows.to(where) for rows in split_by_image(features[site], len(part))] for site in tables
                    }
                    targets = {site: table.gather(keys, seen[site] if own else None) for site, table in tables.items()}
                is_forget = torch.full((len(part),), kind == "forget")
                batch = DistillBatch(inputs, is_forget, targets, keys=keys).to(torch.device("cpu"))
                self._parts.append(HeldOut(kind, batch, len(part) / VIEWS))
                if kind == "forget":
                    start += len(part) / VIEWS * _squares(features, batch.to(device)).cpu()
                elif kind == "retain":
                    for site, rows in seen.items():
                        retained[site] += rows
        weight = torch.tensor([table.loss.weight for table in tables.values()])
        variance = torch.stack([torch.cat(rows).float().var(0).mean().cpu() for rows in retained.values()])
        self._factors = weight / variance.clamp(min=1e-12)
        self._way = max(float(start @ self._factors), 1e-12)

    @torch.no_grad()
    def look(self, engine: Engine) -> dict[str, float]:
        """The figures of the weights that `engine` trains, the same on every rank; collective."""
        loss = torch.zeros(())
        squares = {kind: torch.zeros(len(self._factors)) for kind in self._sides}
        for part in self._parts:
            found = engine.forward_module(self._measure, part.batch.to(self._device)).cpu()
            loss += self._sides[part.kind] * part.share * found[0]
            squares[part.kind] += part.share * found[1:]
        distances = torch.stack([square @ self._factors for square in squares.values()])
        values = engine.mean_over_ranks(torch.cat([loss[None], distances]).to(self._device)).tolist()
        figures = dict(zip(squares, values[1:], strict=True))
        left = figures.pop("forget") / self._way
        return {"left": left, **{f"drift_{kind}": d for kind, d in figures.items()}, "watched_loss": values[0]}

    def _measure(self, batch: DistillBatch) -> Tensor:
        """(1 + sites,): the loss of a batch of one kind, and its `_squares`."""
        features = self._objective.path(batch.images)
        loss = self._objective.terms(features, batch)["loss"]
        return torch.cat([loss.float()[None], _squares(features, batch)])


def _squares(features: Mapping[str, SiteFeatures], batch: DistillBatch) -> Tensor:
    """(sites,) float32: squared distance to the targets, a mean over width, over tokens, then over images."""
    found = []
    for site, target in batch.targets.items():
        seen = features[site].gathered().float()
        rows = (seen - target.target.float()[target.target_rows]).square().mean(1)
        counts = torch.bincount(features[site].image_of_row, minlength=batch.images.n_images).tolist()
        found.append(torch.stack([image.mean() for image in rows.split(counts)]).mean())
    return torch.stack(found)


@dataclass
class Course:
    """What a run has concluded from its looks; JSON values, kept in checkpoints.

    learning_rate: that trials found. best, best_step: the lowest `watched_loss` of a look within max_drift, and when.
    mark: the loss of the last look that was by `GAIN` below the mark before. slow, damaged: looks since, looks in a row
    beyond max_drift and not on the way back from it. lowest: drift of the looks since the last one within. lowered: how
    often the rate was lowered for damage. falls_from, end: updates where the rate begins to fall and where the run
    ends, once known. seen: the last look.
    """

    learning_rate: float | None = None
    best: float | None = None
    best_step: int = 0
    mark: float | None = None
    slow: int = 0
    damaged: int = 0
    lowest: float | None = None
    lowered: int = 0
    falls_from: int | None = None
    end: int | None = None
    seen: dict[str, float] = field(default_factory=dict)

    def note(self, step: int, seen: dict[str, float], settings: Settings) -> bool:
        """Take in what was seen after `step` updates; True where that is the best so far."""
        self.seen, loss, drifted = seen, seen["watched_loss"], drift(seen)
        warm = step > settings.warmup_steps
        limit = settings.max_drift
        within = limit is None or drifted <= limit
        if limit is None or within or not warm:
            self.damaged, self.lowest = 0, None
        elif self.lowest is not None and drifted < self.lowest and drifted <= NEAR * limit:
            self.damaged, self.lowest = 0, drifted
        else:
            self.damaged += 1
            self.lowest = drifted if self.lowest is None else min(drifted, self.lowest)
        if self.mark is None or not warm or loss <= (1 - GAIN) * self.mark:
            self.mark, self.slow = loss, 0
        else:
            self.slow += 1
        is_best = within and (self.best is None or loss < self.best)
        if is_best:
            self.best, self.best_step = loss, step
        if settings.ends == "auto" and self.falls_from is None:
            last_chance = step + settings.watch_steps > settings.max_steps * 2 // 3
            if self.slow >= SLOW or last_chance:
                fall = max(settings.watch_steps, step // 2)
                self.falls_from, self.end = step, min(step + fall, settings.max_steps)
        return is_best

    def steps(self, settings: Settings) -> int:
        """Updates of the whole run, as far as is known."""
        return self.end or settings.max_steps

    def schedule(self, settings: Settings) -> Schedule:
        kind = "constant" if settings.ends == "auto" and self.end is None else settings.lr_scheduler_type
        return Schedule(kind, settings.warmup_steps, self.steps(settings), self.falls_from)

    def harm(self, step: int, settings: Settings, rate: float) -> str | None:
        """What was seen and what to change, where the run damages what must stay."""
        if self.damaged < PATIENCE:
            return None
        return (
            f"step {step}: kept images have drifted by {drift(self.seen):.3g} of the original's variance, more than "
            f"max_drift={settings.max_drift} at {self.damaged} looks in a row: set learning_rate below {rate:.2g}, or "
            f"lambda_retain above {settings.lambda_retain:g}"
        )

    def lower(self, settings: Settings) -> bool:
        """Lower the rate of a run that does damage at a rate it found itself: kept images come back as it goes on.
        False where the rate was set, or was lowered often enough."""
        if settings.learning_rate != "auto" or self.learning_rate is None or self.lowered == LOWERINGS:
            return False
        self.learning_rate = float(f"{LOWERED * self.learning_rate:.1e}")
        self.lowered += 1
        self.damaged, self.lowest = 0, None
        return True

    def verdict(self) -> str:
        """What the run reached, and whether that is done, in words."""
        left, drifted = self.seen["left"], drift(self.seen)
        reached = (
            f"on held-out views {left:.1%} of the way to the forget targets is left, and kept images have drifted by "
            f"{drifted:.3g} of the original's variance"
        )
        if not drifted <= DONE_DRIFT:
            return (
                f"not done: {reached}, where at most {DONE_DRIFT} is good; lower learning_rate or raise lambda_retain"
            )
        if not left <= DONE_LEFT:
            return f"not done: {reached}, where at most {DONE_LEFT:.0%} is good; raise max_steps or lambda_forget"
        return f"done: {reached}"


def drift(seen: Mapping[str, float]) -> float:
    """The furthest drift of any kind; not a number where one is."""
    return float(torch.tensor([value for key, value in seen.items() if key.startswith("drift_")]).max())
