"""The relearning attack: fine-tune the unlearned model on a few forget photos and watch whether the rest comes back.

Knowledge that was hidden returns for unseen photos within a few steps; knowledge that is gone must be learnt anew, as
slowly as by a model that never had it (the "gold" model).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fastvkd.data.images import decode_image
from fastvkd.data.records import Profile
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.evaluation.wording import question_answer_pairs
from fastvkd.models.families import family_of, train_only, visual_parameters

Weights = Literal["visual", "all"]


def relearning_curve(
    model: nn.Module,
    processor: Any,
    attack: Sequence[Profile],
    unseen: Sequence[Profile],
    *,
    weights: Weights,
    measure_at: Sequence[int] = (0, 2, 5, 10, 20, 40),
    photos: int = 16,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    prepared: PreparedPhotos | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[dict[str, float]]:
    """Accuracy (fraction) of visual multiple choice on `unseen` against fine-tuning steps on `attack`.

    A copy of `model` is trained with AdamW on answer tokens of `photos` images of `attack`, spread evenly over its
    entities; `weights` says whether tower and projector move or everything does. Returns one
    {"step", "accuracy"} for each number of steps in `measure_at`, which begins with 0.
    """
    from fastvkd.unlearning.answers import answer_log_probabilities, collate_answers

    victim: Any = copy.deepcopy(model)
    device = next(victim.parameters()).device
    parameters = list(victim.parameters())
    if weights == "visual":
        parameters = [p for _, p in visual_parameters(victim, family_of(victim), "vision+projector")]
    train_only(victim, parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rng = np.random.default_rng([seed, 21])
    samples = [
        (decode_image(photo.data, photo.source), question, answer)
        for profile in spread(attack, photos, rng)
        for photo in profile.photos[:1]
        for question, answer in question_answer_pairs(profile.visual)
    ]
    curve: list[dict[str, float]] = []

    def measure(step: int) -> None:
        cells = evaluate_cells(
            victim,
            processor,
            {"test": list(unseen)},
            batch_size=64,
            seed=seed,
            tasks=("choice",),
            kinds=("vqa",),
            photos=prepared,
        )
        curve.append({"step": step, "accuracy": cells["test"]["vqa"]["accuracy"]})

    measure(0)
    for step in range(1, max(measure_at) + 1):
        chosen = rng.choice(len(samples), min(batch_size, len(samples)), replace=False)
        batch = collate_answers(processor, [samples[i] for i in chosen], chosen.tolist(), [True] * len(chosen))
        log_p, tokens = answer_log_probabilities(victim, batch.to(device))
        loss = -log_p.sum() / tokens.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step in measure_at:
            measure(step)
        progress(step, max(measure_at))
    return curve


def spread(profiles: Sequence[Profile], count: int, rng: np.random.Generator) -> list[Profile]:
    """`count` rows taken in turn from every entity, in random order within an entity."""
    by_entity: dict[str, list[Profile]] = {}
    for i in rng.permutation(len(profiles)):
        by_entity.setdefault(profiles[i].entity, []).append(profiles[i])
    queues = [by_entity[entity] for entity in sorted(by_entity)]
    taken: list[Profile] = []
    while len(taken) < count and any(queues):
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken
