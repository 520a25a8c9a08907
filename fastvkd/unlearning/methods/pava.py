"""PAVA's visual-attribute anchors: what the original itself says of the forget photos is kept, and no retain set."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastvkd.errors import TrainingError
from fastvkd.records import Open, Profile, Questions
from fastvkd.unlearning.vkd.asking import Asker
from fastvkd.unlearning.vkd.images import ImageSet, distinct
from fastvkd.unlearning.vkd.stranger import neutral_questions


def own_answers(model: nn.Module, processor: Any, forget: Sequence[Profile]) -> list[Profile]:
    """The photos of `forget`, each once, with questions about what they show beside who it is, and the greedy answers
    that `model`, still the original, gives to them, of at most 16 tokens.

    Questions are the data's `description` questions, or else a list of ours; an empty answer is left out. Source: Ko et
    al., arXiv 2608.30649 (section 4.3). Raises TrainingError where every answer is empty.
    """
    photos = distinct([photo for profile in forget for photo in profile.photos])
    questions = neutral_questions([forget])
    config: Any = model.config
    images = ImageSet(photos, processor, config, dtype=next(model.parameters()).dtype, pin=False)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        asked = [(i, question) for i in range(len(photos)) for question in questions]
        said = Asker(model, processor, images).say([i for i, _ in asked], [question for _, question in asked])
    model.train(was_training)
    found: list[list[Open]] = [[] for _ in photos]
    for (i, question), answer in zip(asked, said, strict=True):
        if answer:
            found[i].append(Open(question, answer))
    owner = {photo.key: profile for profile in forget for photo in profile.photos}
    anchors = [
        dataclasses.replace(
            owner[photo.key], photos=(photo,), visual=Questions(generation=tuple(pairs)), textual=Questions()
        )
        for photo, pairs in zip(photos, found, strict=True)
        if pairs
    ]
    if not anchors:
        raise TrainingError("method=pava: the original has no answer about what the forget photos show; use method=npo")
    return anchors
