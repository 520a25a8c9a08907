"""Multiple-choice questions about photos of forgotten people, as an attacker words, dresses and repeats them.

What differs from the evaluation protocol is only the query; the answer is scored in the same way (docs/evaluation.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvkd.evaluation.asker import Asker
from fastvkd.evaluation.statistics import with_interval
from fastvkd.models.answers import Query
from fastvkd.models.prompts import chat_prompt
from fastvkd.records import Choice, Photo, Profile

Figures = dict[str, Any]  # accuracy (fraction), ci95 [low, high], n


@dataclass(frozen=True)
class Asked:
    """One multiple-choice question about one photo of an entity."""

    entity: str
    photo: Photo
    choice: Choice


class Examiner(Asker):
    """Puts multiple-choice questions to one model."""

    def right(self, asked: Sequence[Asked], queries: Sequence[Query]) -> list[bool]:
        """Whether the likeliest option of each question is the right one."""
        scores = self.scores(queries, [list(one.choice.options.values()) for one in asked])
        return [
            list(one.choice.options)[score.best] == one.choice.answer for one, score in zip(asked, scores, strict=True)
        ]


def choices_of(profiles: Sequence[Profile], limit: int | None, seed: int) -> list[Asked]:
    """Every multiple-choice question about every photo, or `limit` of them, drawn by `seed`."""
    found = [
        Asked(profile.entity, photo, choice)
        for profile in profiles
        for photo in profile.photos
        for choice in profile.visual.choice
    ]
    if limit is None or len(found) <= limit:
        return found
    drawn = np.random.default_rng([seed, 31]).choice(len(found), limit, replace=False)
    return [found[i] for i in sorted(drawn)]


def plain_query(processor: Any, question: str, photo: Photo) -> Query:
    return Query(chat_prompt(processor, question, image=True), (photo,))


def figures(right: Sequence[bool], seed: int) -> Figures:
    """Accuracy with its 95 % bootstrap interval over questions."""
    return with_interval("accuracy", [float(one) for one in right], seed, "ci95") | {"n": len(right)}


def chance_of(asked: Sequence[Asked]) -> float:
    """Accuracy of guessing; ValueError where nothing is asked."""
    if not asked:
        raise ValueError("chance_of no questions")
    return float(np.mean([1 / len(one.choice.options) for one in asked]))
