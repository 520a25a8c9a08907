"""Prompts and answers as tokens, in every family: whatever its processor does, answers stand where labels say."""

import pytest
import tiny
import torch

from fastvkd.models.answers import Query, collate_answers, processor_inputs
from fastvkd.models.prompts import chat_prompt

ANSWERS = ("the photo", "the")
# From a tower with many tokens an image to one with few: rows are padded behind or before.
SIZES = ((64, 64), (64, 64))


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_labels_are_the_answers_where_rows_are_padded(name: str) -> None:
    _, processor = tiny.BUILDERS[name]()
    pairs = [(image, "the photo", answer) for image, answer in zip(tiny.photos(*SIZES), ANSWERS, strict=True)]
    batch = collate_answers(processor, pairs, range(2), [True, False])
    assert bool((batch.inputs["attention_mask"] == 0).any())
    for predicts, answer in zip(batch.predicts, ANSWERS, strict=True):
        expected = processor.tokenizer(answer + processor.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        assert predicts[predicts != -100].tolist() == expected
    ends = batch.inputs["attention_mask"].shape[1] - batch.inputs["attention_mask"].flip(1).argmax(1)
    assert ends.tolist() == batch.inputs["attention_mask"].sum(1).tolist()  # all padding is on the right


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_prompts_end_where_their_answers_begin(name: str) -> None:
    _, processor = tiny.BUILDERS[name]()
    queries = [
        Query(chat_prompt(processor, question, image=True), (tiny.as_photo(image),))
        for image, question in zip(tiny.photos(*SIZES), ANSWERS, strict=True)
    ]
    inputs = processor_inputs(processor, queries, None, torch.device("cpu"))
    assert bool((inputs["attention_mask"] == 0).any())
    assert bool(inputs["attention_mask"][:, -1].all())
