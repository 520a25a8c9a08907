"""Prompt and answer as tokens: what a model is asked, and which positions predict the answer.

Training, evaluation and attacks all take their labels from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastvkd.models.patch_sequences import moved
from fastvkd.models.pooled import in_threads, pooled
from fastvkd.models.processing import processed
from fastvkd.models.prompts import adds_special_tokens, chat_prompt
from fastvkd.photos import decode_image
from fastvkd.records import Photo


@dataclass(frozen=True)
class Query:
    """A prompt that ends where the answer begins, with one image placeholder per photo, in order."""

    prompt: str
    photos: tuple[Photo, ...] = ()


def with_answer(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, as the model is trained on it. One space stands between them, unless the prompt
    ends in white space (a chat template's newline)."""
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


def common_prefix(one: list[int], other: list[int]) -> int:
    """Length of the common prefix, found by bisection: lists compare slices fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def token_ids(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. The tokenizer adds its special tokens, unless the text already begins with them, as the chat
    templates of some families do."""
    if not texts:
        return []
    return processor.tokenizer(list(texts), add_special_tokens=adds_special_tokens(processor, texts[0]))["input_ids"]


def answer_lengths(processor: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Number of tokens of each answer: those of `texts` (prompt and answer) behind what they share with `prompts`.

    An answer is never tokenised alone. A tokenizer may merge across the border; the answer then has the tokens that it
    changed. And Llama's puts a mark before the first word of any text.
    """
    pairs = zip(token_ids(processor, prompts), token_ids(processor, texts), strict=True)
    return [len(whole) - common_prefix(prompt, whole) for prompt, whole in pairs]


def processor_inputs(
    processor: Any, queries: Sequence[Query], answers: Sequence[str] | None, device: torch.device
) -> dict[str, Tensor]:
    """Left-padded inputs of the whole model, made by the processor. With `answers` each prompt carries its own."""
    texts = [q.prompt if answers is None else with_answer(q.prompt, answers[i]) for i, q in enumerate(queries)]
    distinct = {id(photo.data): photo for query in queries for photo in query.photos}
    decoded = dict(zip(distinct, in_threads(lambda p: decode_image(p.data, p.source), distinct.values()), strict=True))
    images = [[decoded[id(photo.data)] for photo in query.photos] for query in queries]
    tokenizer = processor.tokenizer
    ask, photos = processor, {}
    if any(images):
        ask, photos = pooled(processor), {"images": images}
    elif (
        type(processor).__name__ == "PaliGemmaProcessor"
    ):  # refuses text alone, but its model needs the types of tokens
        ask = partial(tokenizer, return_token_type_ids=True)
    # The side is given by word: some families' processors have one of their own, whatever their tokenizer's is.
    special = adds_special_tokens(processor, texts[0])
    padded: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    encoded = processed(ask, text=texts, add_special_tokens=special, **padded, **photos)
    inputs = moved(encoded, device)
    inputs.pop("labels", None)  # PaliGemma's processor makes some
    return inputs


@dataclass
class AnswerBatch:
    """Question-answer pairs as model inputs, padded on the right.

    inputs: input_ids (B, T), attention_mask (B, T), pixel_values, and anything else the processor gives.
    predicts: (B, T) int64, the token that each position must predict; -100 outside answers.
    is_forget: (B,) bool. sample: (B,) int64, positions in the sampler's list.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    is_forget: Tensor
    sample: Tensor

    def to(self, device: torch.device) -> "AnswerBatch":
        inputs = moved(self.inputs, device, non_blocking=True)
        return AnswerBatch(inputs, self.predicts.to(device), self.is_forget.to(device), self.sample.to(device))


def collate_answers(
    processor: Any,
    pairs: Sequence[tuple[Image.Image | None, str, str]],
    indices: Sequence[int],
    is_forget: Sequence[bool],
) -> AnswerBatch:
    """A batch of `pairs` (image, question, answer), all with an image or all without one. `indices` are their positions
    in the sampler's list."""
    prompts = [chat_prompt(processor, question, image=image is not None) for image, question, _ in pairs]
    texts = [with_answer(p, a) + processor.tokenizer.eos_token for p, (_, _, a) in zip(prompts, pairs, strict=True)]
    images = [[image] for image, _, _ in pairs if image is not None]
    encoded = processed(
        pooled(processor),
        text=texts,
        **({"images": images} if images else {}),
        add_special_tokens=adds_special_tokens(processor, prompts[0]),
        padding=True,
        padding_side="right",  # see `processor_inputs`
        return_tensors="pt",
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    predicts = torch.full_like(ids, -100)
    for row, count in enumerate(answer_lengths(processor, prompts, texts)):
        end = int(mask[row].sum())
        predicts[row, end - count - 1 : end - 1] = ids[row, end - count : end]
    return AnswerBatch(dict(encoded), predicts, torch.tensor(list(is_forget)), torch.tensor(list(indices)))
