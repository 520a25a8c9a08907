"""The relearning attack: fine-tune the unlearned model on some forget photos and watch whether the rest comes back.

Knowledge that was hidden returns for unseen photos within a few steps; knowledge that is gone must be learnt anew, as
slowly as by a model that never had it (the "gold" model). So the figure is not how far accuracy rises, but by how much
its curve lies above gold's under the same budget: `relearning_gap`. An attacker may first undo what a way of
forgetting rests on (`first_moves.py`) or train on photos of others; the strongest variant counts.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fastvkd.attacks.first_moves import MOVES, Move, applies, condition_number, moved, put_back
from fastvkd.data.wording import question_answer_pairs
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.options import Budget
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile
from fastvkd.reporting.schema import PLAIN
from fastvkd.unlearning.answers import answer_log_probabilities

Weights = Literal["visual", "all"]
Curve = list[dict[str, float]]


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
        taken = spread(rows, max(1, round(share * len(rows))), rng)
        self.photos = len(taken)
        self._samples = [
            (photo, question, answer)
            for profile, photo in taken
            for question, answer in question_answer_pairs(profile.visual)
        ]
        self._processor, self._batch_size, self._seed = processor, batch_size, seed
        self._decode = cache(lambda photo: decode_image(photo.data, photo.source))
        self._batches: dict[int, AnswerBatch] = {}

    def batch(self, step: int) -> AnswerBatch:
        """The batch of step 1, 2, ...: prepared once, kept on the CPU."""
        if step not in self._batches:
            rng = np.random.default_rng([self._seed, 22, step])
            chosen = rng.choice(len(self._samples), min(self._batch_size, len(self._samples)), replace=False).tolist()
            pairs = [
                (self._decode(photo), question, answer)
                for photo, question, answer in (self._samples[i] for i in chosen)
            ]
            self._batches[step] = collate_answers(self._processor, pairs, chosen, [True] * len(chosen))
        return self._batches[step]


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
    batch_size: int = 64,
    prepared: PreparedPhotos | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Curve:
    """Accuracy (fraction) of visual multiple choice on `unseen` against fine-tuning steps on the attacker's photos.

    A copy of `model`, to which `first` is done, is trained with AdamW on answer tokens; `weights` says whether tower
    and projector move or everything does. Returns one {"step", "accuracy", "moved"} for each number of steps in
    `measure_at`, 0 included in any case; `moved` is how far the visual weights then lie from those of `model`.
    `max_samples` (seeded) caps the questions of a measurement, `batch_size` of which are scored at once.
    """
    victim: Any = copy.deepcopy(model)
    first(victim)
    device = next(victim.parameters()).device
    parameters = list(victim.parameters())
    if weights == "visual":
        parameters = [p for _, p in visual_parameters(victim, family_of(victim), "vision+projector")]
    train_only(victim, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    curve: Curve = []

    def measure(step: int) -> None:
        cells = evaluate_cells(
            victim,
            processor,
            {"test": list(unseen)},
            batch_size=batch_size,
            seed=seed,
            tasks=("choice",),
            kinds=("vqa",),
            max_samples=max_samples,
            photos=prepared,
        )
        curve.append({"step": step, "accuracy": cells["test"]["vqa"]["accuracy"], "moved": moved(victim, model)})

    measure(0)
    for step in range(1, max(measure_at) + 1):
        log_p, tokens = answer_log_probabilities(victim, attacker.batch(step).to(device))
        loss = -log_p.sum() / tokens.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step in measure_at:
            measure(step)
        progress(step, max(measure_at))
    return curve


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
    """One way to relearn: the `variant` by name, the photos it is done with, and what is done to a model first."""

    variant: str
    attacker: Attacker
    first: Callable[[nn.Module], None] = lambda _: None
    applies: Callable[[nn.Module], bool] = lambda _: True


def plans(
    processor: Any,
    cells: Mapping[str, Sequence[Profile]],
    known: Sequence[Profile],
    budget: Budget,
    share: float,
    seed: int,
    public: nn.Module | None = None,
) -> list[Plan]:
    """The ways to relearn with `share` of the `known` photos: as the model is, and for the largest share and the first
    seed those that `budget.relearning_variants` names as well.

    `retained_photos` are of the retain set and `unrelated_photos` of the real-world set, as many as of the forget set.
    `public_projector` and `public_tower` need a `public` model.
    """
    attacker = Attacker(processor, known, share=share, seed=seed)
    found = [Plan(PLAIN, attacker)]
    if (share, seed) != (max(budget.relearning_shares), budget.relearning_seeds[0]):
        return found
    others = {"retained_photos": cells.get("retain"), "unrelated_photos": cells.get("realworld")}
    parts: dict[str, Literal["projector", "vision"]] = {"public_projector": "projector", "public_tower": "vision"}
    for variant in budget.relearning_variants:
        if variant in MOVES:

            def first(model: nn.Module, move: Move = MOVES[variant]) -> None:
                device = next(model.parameters()).device
                move(model, attacker.batch(1).to(device), torch.Generator().manual_seed(seed))

            found.append(Plan(variant, attacker, first, partial(applies, variant)))
        elif profiles := others.get(variant):
            as_many = min(1.0, attacker.photos / sum(len(profile.photos) for profile in profiles))
            found.append(Plan(variant, Attacker(processor, profiles, share=as_many, seed=seed)))
        elif public is not None and variant in parts:
            found.append(Plan(variant, attacker, partial(put_back, public=public, part=parts[variant])))
    return found


def relearn(
    models: Mapping[str, nn.Module],
    processor: Any,
    cells: Mapping[str, Sequence[Profile]],
    budget: Budget,
    *,
    weights: Sequence[Weights] = ("visual", "all"),
    public: nn.Module | None = None,
    prepared: PreparedPhotos | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """The whole attack: every share of the forget photos x seed x way (see `plans`) x weights, on every model of
    `models` (`unlearned`, and `gold` where there is one) with the same photos in the same order.

    The attacker holds photos of the cell `forget` and is judged by `test`, or where that is empty by what `hold_out`
    keeps. Returns one {"share", "photos", "variant", "weights", "seed", "curves": {model: curve}, "auc": {model: area,
    and "relearning_gap" with a gold model}, "condition": {model: condition number of the projector}} for each. A
    variant is left out where it does nothing to any model.
    """
    unseen = cells.get("test")
    known, judged = (cells["forget"], unseen) if unseen else hold_out(cells["forget"])
    condition = {name: condition_number(model) for name, model in models.items()}
    jobs = [
        (share, seed, plan, kind)
        for share, seed in product(budget.relearning_shares, budget.relearning_seeds)
        for plan in plans(processor, cells, known, budget, share, seed, public)
        if any(map(plan.applies, models.values()))
        for kind in weights
    ]
    last = max(budget.relearning_steps)
    rows, done, total = [], 0, len(jobs) * len(models) * last
    for share, seed, plan, kind in jobs:
        curves = {}
        for name, model in models.items():
            curves[name] = relearning_curve(
                model,
                processor,
                plan.attacker,
                judged,
                weights=kind,
                first=plan.first,
                measure_at=budget.relearning_steps,
                learning_rate=budget.learning_rate,
                seed=seed,
                max_samples=budget.relearning_samples,
                batch_size=budget.batch_size,
                prepared=prepared,
                progress=lambda step, _, before=done: progress(before + step, total),  # type: ignore[misc]
            )
            done += last
        rows.append(
            {
                "share": share,
                "photos": plan.attacker.photos,
                "variant": plan.variant,
                "weights": kind,
                "seed": seed,
                "curves": curves,
                "auc": summarise({kind: curves})[kind],
                "condition": condition,
            }
        )
    return rows


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
