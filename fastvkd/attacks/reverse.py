"""Questions in reverse: which of these photos is X? (after arXiv 2411.12103)

A model that no longer says a name may still tell to whose photo it belongs. The photo that makes the answer likeliest
is its choice. All candidates are forgotten people: among retained ones even a model that never knew the face would find
it by elimination.
"""

from collections.abc import Sequence

import numpy as np

from fastvkd.attacks.asking import Asked, Examiner, Figures, figures, plain_query

CANDIDATES = 4


def groups_of(asked: Sequence[Asked], limit: int | None, seed: int) -> list[list[Asked]]:
    """Groups of questions that are worded alike, about different entities with different answers.

    A group has `CANDIDATES` questions, or as many as there are entities, at least two. All groups together hold about
    `limit` questions.
    """
    rng = np.random.default_rng([seed, 33])
    by_question: dict[str, dict[str, list[Asked]]] = {}
    for i in rng.permutation(len(asked)):
        one = asked[i]
        by_question.setdefault(one.choice.question, {}).setdefault(one.entity, []).append(one)
    size = max(2, min(CANDIDATES, max((len(of) for of in by_question.values()), default=0)))
    groups: list[list[Asked]] = []
    for question in sorted(by_question):
        queues = by_question[question]
        while True:
            group: list[Asked] = []
            able = [entity for entity in sorted(queues) if queues[entity]]
            for entity in rng.permutation(able):
                candidate = queues[entity][-1]
                if candidate.choice.answer_text not in {one.choice.answer_text for one in group}:
                    group.append(candidate)
                if len(group) == size:
                    break
            if len(group) < size:
                break
            for one in group:
                queues[one.entity].pop()
            groups.append(group)
    if limit is not None and len(groups) > max(1, limit // size):
        drawn = rng.choice(len(groups), max(1, limit // size), replace=False)
        groups = [groups[i] for i in sorted(drawn)]
    return groups


def reverse(examiner: Examiner, groups: Sequence[Sequence[Asked]], seed: int) -> Figures:
    """Share of answers that are likeliest with their own photo, among the photos of their group."""
    queries = [plain_query(examiner.processor, one.choice.question, one.photo) for group in groups for one in group]
    options = [[other.choice.answer_text for other in group] for group in groups for _ in group]
    scores = iter(examiner.scores(queries, options))
    right: list[bool] = []
    for group in groups:
        likelihood = np.array([next(scores).normalised for _ in group])  # (photo, answer)
        right += [bool(photo == answer) for answer, photo in enumerate(likelihood.argmax(0))]
    return figures(right, seed)
