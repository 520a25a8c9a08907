"""Few-shot prompts: solved questions about retained people come first and show the model that naming faces is wanted
(after arXiv 2411.12103). No forgotten person is among the examples, so nothing is told, only encouraged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvkd.attacks.asking import Asked
from fastvkd.models.answers import Query, with_answer
from fastvkd.models.prompts import chat_prompt


def few_shot(processor: Any, asked: Sequence[Asked], retained: Sequence[Asked], shots: int, seed: int) -> list[Query]:
    """Each question behind `shots` solved ones about different retained entities, as earlier turns of the chat; fewer
    where there are fewer entities. They are drawn (seeded) once for each photo, so that all questions about a photo
    share their beginning, which is then computed once."""
    rng = np.random.default_rng([seed, 32, shots])
    by_entity: dict[str, list[Asked]] = {}
    for one in retained:
        by_entity.setdefault(one.entity, []).append(one)
    entities = sorted(by_entity)
    drawn: dict[str, list[Asked]] = {}
    queries = []
    for one in asked:
        key = one.photo.key
        if key not in drawn:
            chosen = rng.choice(len(entities), min(shots, len(entities)), replace=False)
            drawn[key] = [by_entity[entities[i]][rng.integers(len(by_entity[entities[i]]))] for i in chosen]
        queries.append(conversation(processor, drawn[key], one))
    return queries


def conversation(processor: Any, shown: Sequence[Asked], asked: Asked) -> Query:
    """Solved turns, each ended by the tokenizer's end token, and the open one; the BOS is written once at most."""
    tokenizer = processor.tokenizer
    turns = [
        with_answer(chat_prompt(processor, one.choice.question, image=True), one.choice.answer_text)
        + tokenizer.eos_token
        for one in shown
    ]
    turns.append(chat_prompt(processor, asked.choice.question, image=True))
    bos = tokenizer.bos_token or ""
    text = turns[0] + "".join(turn.removeprefix(bos) if bos else turn for turn in turns[1:])
    return Query(text, (*(one.photo for one in shown), asked.photo))
