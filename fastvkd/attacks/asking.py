"""Multiple-choice questions about photos of forgotten people, as an attacker words, dresses and repeats them.

What differs from the evaluation protocol is only the query; the answer is scored in the same way (docs/data.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastvkd.data.records import Choice, Photo, Profile
from fastvkd.evaluation.inputs import Embedder, PreparedPhotos, Query, embeddable
from fastvkd.evaluation.multiple_choice import OptionScores, score_options, score_options_packed
from fastvkd.evaluation.statistics import bootstrap_interval
from fastvkd.models.prompts import chat_prompt

Figures = dict[str, Any]  # accuracy (fraction), ci95 [low, high], n


@dataclass(frozen=True)
class Asked:
    """One multiple-choice question about one photo of an entity."""

    entity: str
    photo: Photo
    choice: Choice


class Examiner:
    """Puts queries to one model. Features of a photo are computed once, so the weights must not change meanwhile."""

    def __init__(
        self, model: nn.Module, processor: Any, *, prepared: PreparedPhotos | None = None, batch_size: int = 64
    ):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self._embedder = Embedder(model, processor, batch_size, prepared) if embeddable(model) else None

    def scores(self, queries: Sequence[Query], options: Sequence[Sequence[str]]) -> list[OptionScores]:
        """The likelihood of every option as the answer to its query. Fewer go at once where a query has many photos."""
        size = max(1, self.batch_size // max(1, *(len(query.photos) for query in queries)))
        if self._embedder is not None:
            self._embedder.batch_size = size
            return score_options_packed(self._embedder, queries, options)
        return score_options(self.model, self.processor, queries, options, size)

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
    values = [float(one) for one in right]
    return {
        "accuracy": float(np.mean(values)),
        "ci95": list(bootstrap_interval(values, seed=seed)),
        "n": len(values),
    }


def chance_of(asked: Sequence[Asked]) -> float:
    """Accuracy of guessing; ValueError where nothing is asked."""
    if not asked:
        raise ValueError("chance_of no questions")
    return float(np.mean([1 / len(one.choice.options) for one in asked]))


def ask_all(
    examiner: Examiner, asked: Sequence[Asked], variants: Mapping[str, Sequence[Query]], seed: int
) -> Iterator[tuple[str, Figures]]:
    """Figures of every variant of the same questions."""
    for name, queries in variants.items():
        yield name, figures(examiner.right(asked, queries), seed)
