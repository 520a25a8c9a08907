"""The relearning attack: fine-tune the unlearned model on some forget photos and watch whether the rest comes back.

Knowledge that was hidden returns for unseen photos within a few steps; knowledge that is gone must be learnt anew, as
slowly as by a model that never had it (the "gold" model). So the figure is not how far accuracy rises, but by how much
its curve lies above gold's under the same budget: `relearning_gap`. An attacker may first undo what a way of
forgetting rests on (`first_moves.py`) or train on photos of others; the strongest variant counts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise, product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.attacks.first_moves import MOVES, Move, applies, moved, put_back
from fastvkd.data.wording import question_answer_pairs
from fastvkd.engines.local import LocalEngine
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.models.families import all_parameters, family_of, training_only, visual_parameters
from fastvkd.models.loading import layers_checkpointed
from fastvkd.options import Budget, Optim
from fastvkd.options import RelearningWeights as Weights
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile
from fastvkd.reporting.schema import PLAIN
from fastvkd.unlearning.answers import answer_log_probabilities

COLLAPSED = 0.8  # a curve is no evidence once less than this share of the retained accuracy is left
Curve = list[dict[str, float]]
Cells = Mapping[str, Sequence[Profile]]


class Attacker:
    """The photos an attacker holds, and the batches that come of them: the same for every model that is attacked.

    Args:
        forget: the rows of the forget set; `share` of their photos, spread evenly over the entities, are taken, at
            least one.
        batch_size: question-answer pairs a step, drawn by `seed`.
    """

    def __init__(
        self, processor: Any, forget: Sequence[Profile], *, share: float = 1.0, batch_size: int = 16, seed: int = 0
    ):
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must lie above 0 and at most at 1")
        rng = np.random.default_rng([seed, 21])
        rows = [(profile, photo) for profile in forget for photo in profile.photos]
        taken = spread(rows, _photos_held(share, len(rows)), rng)
        self.photos = len(taken)
        self._samples = [
            (photo, question, answer)
            for profile, photo in taken
            for question, answer in question_answer_pairs(profile.visual)
        ]
        self._processor, self._batch_size, self._seed = processor, batch_size, seed
        self._decode = cache(lambda photo: decode_image(photo.data, photo.source))
        self._batches: dict[tuple[int, int], list[AnswerBatch]] = {}

    def batches(self, step: int, size: int) -> list[AnswerBatch]:
        """The pairs of step 1, 2, ... in micro-batches of `size`: prepared once, kept on the CPU."""
        if (step, size) not in self._batches:
            rng = np.random.default_rng([self._seed, 22, step])
            chosen = rng.choice(len(self._samples), self.pairs, replace=False).tolist()
            parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
            self._batches[step, size] = [self._collate(part) for part in parts]
        return self._batches[step, size]

    def batch(self, step: int) -> AnswerBatch:
        """All pairs of a step at once."""
        return self.batches(step, self.pairs)[0]

    @property
    def pairs(self) -> int:
        """Question-answer pairs a step."""
        return min(self._batch_size, len(self._samples))

    def _collate(self, chosen: list[int]) -> AnswerBatch:
        samples = [self._samples[i] for i in chosen]
        pairs = [(self._decode(photo), question, answer) for photo, question, answer in samples]
        return collate_answers(self._processor, pairs, chosen, [True] * len(chosen))


def relearning_curve(
    model: nn.Module,
    processor: Any,
    attacker: Attacker,
    unseen: Sequence[Profile],
    *,
    weights: Weights,
    first: Callable[[nn.Module], None] = lambda _: None,
    measure_at: Sequence[int] = Budget.relearning_steps,
    learning_rate: float = 1e-3,
    seed: int = 0,
    max_samples: int | None = None,
    retained: Sequence[Profile] = (),
    retained_samples: int | None = None,
    batch_size: int = 64,
    micro_batch: int = 16,
    gradient_checkpointing: bool = False,
    optim: Optim = "adamw_torch",
    prepared: PreparedPhotos | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Curve:
    """Accuracy (fraction) of visual multiple choice on `unseen` against fine-tuning steps on the attacker's photos.

    `model`, to which `first` is done, is trained with AdamW (or `optim`) on answer tokens, and at the end it is as it
    was: host memory keeps what it trains, nothing else is copied. `weights` says whether tower and projector move or
    everything does. Half-precision weights have float32 masters. `micro_batch` pairs go through the model at once,
    which changes no result beyond rounding; neither does `gradient_checkpointing`.

    Returns one {"step", "accuracy", "moved", "retained"} for each number of steps in `measure_at`, 0 included in any
    case. `moved` is how far the visual weights then lie from where they began, `retained` the accuracy on `retained`,
    absent where nothing can be asked about those. `max_samples` and `retained_samples` (seeded) cap the questions of a
    measurement, `batch_size` of which are scored at once.
    """
    family = family_of(model)
    everything = all_parameters(model, family)
    trained = everything if weights == "all" else visual_parameters(model, family, "vision+projector")
    trained = [(name, parameter) for name, parameter in trained if parameter.is_floating_point()]  # not rounded ones
    last, device = max(measure_at), trained[0][1].device
    ask = partial(_accuracy, model, processor, seed=seed, batch_size=batch_size, photos=prepared)
    curve: Curve = []

    def measure(step: int) -> None:
        accuracy, kept = ask("test", unseen, max_samples), ask("retain", retained, retained_samples)
        point = {"step": step, "accuracy": accuracy, "moved": moved(model, before)}
        curve.append({key: value for key, value in {**point, "retained": kept}.items() if value is not None})

    moving = [parameter for _, parameter in trained]
    with _put_back_at_the_end(trained) as before, training_only(model, moving):
        first(model)
        engine = LocalEngine(
            trained,
            module=model,
            optim=optim,
            learning_rate=learning_rate,
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_accumulation_steps=-(-attacker.pairs // micro_batch),
            warmup_steps=0,
            max_steps=last,
            lr_scheduler_type="constant",
            device=device,
        )
        try:
            measure(0)
            for step in range(1, last + 1):
                batches = attacker.batches(step, micro_batch)
                for loss in answer_losses(model, batches, device, gradient_checkpointing):
                    engine.backward(loss * len(batches))  # of which it takes the mean
                    engine.step()
                if step in measure_at:
                    measure(step)
                progress(step, last)
        finally:
            engine.release()
    return curve


def answer_losses(
    model: nn.Module, batches: Sequence[AnswerBatch], device: torch.device, gradient_checkpointing: bool
) -> Iterator[Tensor]:
    """The mean cross-entropy of all answer tokens in `batches`, as one addend a batch. The graph of each may be used
    until the next is asked for."""
    tokens = sum(int((batch.predicts != -100).sum()) for batch in batches)
    for batch in batches:
        with layers_checkpointed(model) if gradient_checkpointing else nullcontext():
            log_p, _ = answer_log_probabilities(model, batch.to(device))
            yield -log_p.sum() / tokens


def _accuracy(
    model: nn.Module,
    processor: Any,
    cell: str,
    profiles: Sequence[Profile],
    max_samples: int | None,
    **asking: Any,
) -> float | None:
    """Of visual multiple choice, `asking` as `evaluate_cells` does; None where there are no such questions."""
    kind: dict[str, Any] = {"tasks": ("choice",), "kinds": ("vqa",)}
    cells = evaluate_cells(model, processor, {cell: list(profiles)}, max_samples=max_samples, **kind, **asking)
    accuracy: float | None = cells[cell]["vqa"]["accuracy"]
    return accuracy


@contextmanager
def _put_back_at_the_end(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[dict[str, torch.Tensor]]:
    """Host copies of these weights by name, which the model has again at the end, whatever happens."""
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in named}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, parameter in named:
                parameter.copy_(before[name])


def area_under_curve(curve: Sequence[Mapping[str, float]]) -> float:
    """Mean accuracy over the steps of a curve (trapezoids over its range of steps), a fraction; a single point is its
    own mean. Raises ValueError for an empty curve or steps that do not rise."""
    if not curve:
        raise ValueError("area_under_curve of an empty curve")
    steps, accuracy = ([float(point[key]) for point in curve] for key in ("step", "accuracy"))
    if len(curve) == 1:
        return accuracy[0]
    if any(after <= before for before, after in pairwise(steps)):
        raise ValueError(f"area_under_curve: steps {steps} do not rise")
    return float(np.trapezoid(accuracy, steps) / (steps[-1] - steps[0]))


def summarise(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, dict[str, float]]:
    """Per kind of weights: the area under each model's curve by the model's name, and `relearning_gap`, that of
    `unlearned` minus that of `gold`, where both were attacked."""
    found: dict[str, dict[str, float]] = {}
    for weights, by_model in curves.items():
        areas = {name: area_under_curve(curve) for name, curve in by_model.items()}
        if {"unlearned", "gold"} <= set(areas):
            areas["relearning_gap"] = areas["unlearned"] - areas["gold"]
        found[weights] = areas
    return found


@dataclass(frozen=True)
class Plan:
    """One way to relearn: the `variant` by name, who holds which photos, and what is done to a model first."""

    variant: str
    attacker: Callable[[], Attacker]
    first: Callable[[nn.Module], None] = lambda _: None
    applies: Callable[[nn.Module], bool] = lambda _: True


def plans(
    sources: Mapping[str, Sequence[Profile]],
    holding: Callable[[str, float, int], Attacker],
    budget: Budget,
    share: float,
    seed: int,
    public: Callable[[], nn.Module] | None = None,
) -> list[Plan]:
    """The ways to relearn with `share` of the photos in `sources["forget"]`: as the model is, and for the largest share
    and the first seed those that `budget.relearning_variants` names as well.

    `retained_photos` are of the retain set and `unrelated_photos` of the real-world set, as many as of the forget set;
    `all_photos` takes every photo that the attacker could have. `public_projector` and `public_tower` need a `public`
    model. `holding` makes the attacker who holds such a share of a source, drawn with such a seed.
    """
    attacker = partial(holding, "forget", share, seed)
    found = [Plan(PLAIN, attacker)]
    if (share, seed) != (max(budget.relearning_shares), budget.relearning_seeds[0]):
        return found
    counts = {name: sum(len(profile.photos) for profile in profiles) for name, profiles in sources.items()}
    parts: dict[str, Literal["projector", "vision"]] = {"public_projector": "projector", "public_tower": "vision"}
    for variant in budget.relearning_variants:
        source = variant.removesuffix("_photos")
        if variant in MOVES:

            def first(model: nn.Module, move: Move = MOVES[variant]) -> None:
                device = next(model.parameters()).device
                move(model, attacker().batch(1).to(device), torch.Generator().manual_seed(seed))

            found.append(Plan(variant, attacker, first, partial(applies, variant)))
        elif counts.get(source):
            as_many = min(1.0, _photos_held(share, counts["forget"]) / counts[source])
            found.append(Plan(variant, partial(holding, source, as_many, seed)))
        elif variant == "all_photos" and share < 1:
            found.append(Plan(variant, partial(holding, "forget", 1.0, seed)))
        elif public is not None and variant in parts:

            def take(model: nn.Module, part: Literal["projector", "vision"] = parts[variant]) -> None:
                put_back(model, public(), part)

            found.append(Plan(variant, attacker, take))
    return found


def _photos_held(share: float, photos: int) -> int:
    return max(1, round(share * photos))


@dataclass(frozen=True)
class Job:
    """One relearning curve to be found of each model."""

    share: float
    seed: int
    plan: Plan
    weights: Weights
    learning_rate: float

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from the others, for a row of the result."""
        return {
            "share": 1.0 if self.plan.variant == "all_photos" else self.share,
            "variant": self.plan.variant,
            "weights": self.weights,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


class Relearning:
    """All relearning attacks that a budget pays for, each on one model at a time, with the same photos in the same
    order for every model.

    The attacker holds photos of the cell `forget` and is judged by `test`, or where that is empty by what `hold_out`
    keeps.
    """

    def __init__(
        self,
        processor: Any,
        cells: Cells,
        budget: Budget,
        *,
        public: Callable[[], nn.Module] | None = None,
        prepared: PreparedPhotos | None = None,
    ) -> None:
        self._processor, self._budget, self._prepared = processor, budget, prepared
        self._retained = cells.get("retain", ())
        known, self._judged = held_and_judged(cells)
        sources = {"forget": known, "retained": self._retained, "unrelated": cells.get("realworld", ())}

        @lru_cache(maxsize=1)  # it holds prepared photos
        def holding(source: str, share: float, seed: int) -> Attacker:
            return Attacker(processor, sources[source], share=share, seed=seed)

        self.jobs = [
            Job(share, seed, plan, weights, rate)
            for share, seed in product(budget.relearning_shares, budget.relearning_seeds)
            for plan in plans(sources, holding, budget, share, seed, public)
            for weights, rate in product(budget.relearning_weights, budget.learning_rates)
        ]

    def curve(self, model: nn.Module, job: Job) -> dict[str, Any] | None:
        """{"photos", "curve"} of one job; None where its variant does nothing to the model."""
        if not job.plan.applies(model):
            return None
        budget, attacker = self._budget, job.plan.attacker()
        curve = relearning_curve(
            model,
            self._processor,
            attacker,
            self._judged,
            weights=job.weights,
            first=job.plan.first,
            measure_at=budget.relearning_steps,
            learning_rate=job.learning_rate,
            seed=job.seed,
            max_samples=budget.relearning_samples,
            retained=self._retained,
            retained_samples=budget.relearning_retained,
            batch_size=budget.batch_size,
            micro_batch=budget.micro_batch,
            gradient_checkpointing=budget.gradient_checkpointing,
            optim=budget.optim,
            prepared=self._prepared,
        )
        return {"photos": attacker.photos, "curve": curve}

    def retained(self, model: nn.Module) -> list[float | None]:
        """The accuracy on retained people before any attack, on the questions of each seed."""
        budget = self._budget
        ask = partial(_accuracy, model, self._processor, "retain", self._retained, budget.relearning_retained)
        return [ask(seed=seed, batch_size=budget.batch_size, photos=self._prepared) for seed in budget.relearning_seeds]

    def rows(
        self,
        curves: Mapping[str, Sequence[dict[str, Any] | None]],
        retained: Mapping[str, Sequence[float | None]],
        condition: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """One row for each job, from what `curve` and `retained` found of each model: {"share", "photos", "variant",
        "weights", "learning_rate", "seed", "curves": {model: curve}, "auc": {model: area, and "relearning_gap" with a
        gold model}, "collapsed": {model: whether the curve is no evidence}, "condition": {model: of the projector}}."""
        rows = []
        for number, job in enumerate(self.jobs):
            here = {name: found for name, of in curves.items() if (found := of[number]) is not None}
            if not here:
                continue
            own = {name: found["curve"] for name, found in here.items()}
            seed = self._budget.relearning_seeds.index(job.seed)
            rows.append(
                {
                    **job.names,
                    "photos": next(iter(here.values()))["photos"],
                    "curves": own,
                    "auc": summarise({job.weights: own})[job.weights],
                    "collapsed": {name: collapsed(curve, retained[name][seed]) for name, curve in own.items()},
                    "condition": dict(condition),
                }
            )
        return rows


def collapsed(curve: Curve, before: float | None) -> bool:
    """Whether a model lost so much of what it should keep that what it did not regain says nothing. That is so as well
    where nobody can tell."""
    return not before or any(point["retained"] < COLLAPSED * before for point in curve)


def held_and_judged(cells: Cells) -> tuple[Sequence[Profile], Sequence[Profile]]:
    """The forget photos that an attacker may hold, and those of the same people to judge by."""
    unseen = cells.get("test")
    return (cells["forget"], unseen) if unseen else hold_out(cells["forget"])


def hold_out(forget: Sequence[Profile]) -> tuple[list[Profile], list[Profile]]:
    """The forget photos that an attacker holds, and those to judge by where the data have no others of these entities:
    every third photo of an entity, from its second on. Unlike unseen photos those were trained on, and unlearnt."""
    parts: tuple[list[Profile], list[Profile]] = [], []
    seen: dict[str, int] = {}
    for profile in forget:
        photos: tuple[list[Photo], list[Photo]] = [], []
        for photo in profile.photos:
            place = seen.get(profile.entity, 0)
            seen[profile.entity] = place + 1
            photos[place % 3 == 1].append(photo)
        for part, own in zip(parts, photos, strict=True):
            if own:
                part.append(dataclasses.replace(profile, photos=tuple(own)))
    return parts


def spread(rows: Sequence[tuple[Profile, Photo]], count: int, rng: np.random.Generator) -> list[tuple[Profile, Photo]]:
    """`count` photos taken in turn from every entity, in random order within an entity."""
    by_entity: dict[str, list[tuple[Profile, Photo]]] = {}
    for i in rng.permutation(len(rows)):
        by_entity.setdefault(rows[i][0].entity, []).append(rows[i])
    queues = [by_entity[entity] for entity in sorted(by_entity)]
    taken: list[tuple[Profile, Photo]] = []
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken
