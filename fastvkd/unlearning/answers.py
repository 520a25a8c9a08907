"""Output-level losses on answers: gradient ascent, NPO and refusal, each with cross-entropy on retained answers.

The only part of unlearning that needs the whole LLM and the text. Labels are answer tokens only; logits are computed at
answer positions and nowhere else, so image placeholders can neither be supervised nor cost memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastvkd.data.images import decode_image
from fastvkd.data.records import Photo, Profile
from fastvkd.evaluation.inputs import with_answer
from fastvkd.evaluation.wording import question_answer_pairs
from fastvkd.models import families
from fastvkd.models.prompts import adds_special_tokens, chat_prompt
from fastvkd.settings import Settings
from fastvkd.unlearning.images import BatchPlan

REFUSALS = (
    "I don't know.",
    "I am not able to tell who this is.",
    "I cannot answer that.",
    "That is not something I know.",
)


@dataclass
class AnswerBatch:
    """Question-answer pairs as model inputs, padded on the right.

    inputs: input_ids (B, T), attention_mask (B, T), pixel_values and what else the processor gives. predicts: (B, T)
    int64, the token that each position must predict, -100 outside answers. is_forget: (B,) bool. sample: (B,) int64,
    positions in the sampler's list.
    """

    inputs: dict[str, Tensor]
    predicts: Tensor
    is_forget: Tensor
    sample: Tensor

    def to(self, device: torch.device) -> "AnswerBatch":
        moved = {key: value.to(device, non_blocking=True) for key, value in self.inputs.items()}
        return AnswerBatch(moved, self.predicts.to(device), self.is_forget.to(device), self.sample.to(device))


def collate_answers(
    processor: Any, pairs: Sequence[tuple[Image.Image, str, str]], indices: Sequence[int], is_forget: Sequence[bool]
) -> AnswerBatch:
    """`pairs` are (image, question, answer), `indices` their positions in the sampler's list."""
    tokenizer = processor.tokenizer
    prompts = [chat_prompt(processor, question, image=True) for _, question, _ in pairs]
    texts = [with_answer(p, a) + tokenizer.eos_token for p, (_, _, a) in zip(prompts, pairs, strict=True)]
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    side, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        encoded = processor(
            text=texts,
            images=[[image] for image, _, _ in pairs],
            add_special_tokens=adds_special_tokens(processor, prompts[0]),
            padding=True,
            return_tensors="pt",
        )
    finally:
        tokenizer.padding_side = side
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    predicts = torch.full_like(ids, -100)
    for row, answer in enumerate(answers):
        count = len(tokenizer(answer, add_special_tokens=False).input_ids)
        end = int(mask[row].sum())
        predicts[row, end - count - 1 : end - 1] = ids[row, end - count : end]
    return AnswerBatch(dict(encoded), predicts, torch.tensor(list(is_forget)), torch.tensor(list(indices)))


def answer_log_probabilities(model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probability of each answer in float32, and (B,) its number of tokens."""
    hidden = families.base_model(model)(**batch.inputs, use_cache=False).last_hidden_state
    wanted = batch.predicts != -100
    head: Any = model.lm_head
    token_loss = F.cross_entropy(head(hidden[wanted]).float(), batch.predicts[wanted], reduction="none")
    row = wanted.nonzero()[:, 0]
    zeros = torch.zeros(len(batch.predicts), device=token_loss.device)
    return zeros.index_add(0, row, -token_loss), wanted.sum(1)


def answer_loss(
    kind: str, log_p: Tensor, tokens: Tensor, is_forget: Tensor, *, log_p0: Tensor | None, beta: float
) -> dict[str, Tensor]:
    """Forget and retain terms of an output-level loss.

    `log_p` (B,) summed answer log-probabilities, `tokens` (B,) their lengths. With l the mean token cross-entropy:
    ga is -l on forget answers (Thudi et al., 2022); npo is -(2 / beta) log sigmoid(-beta (log p - log p0)) a
    sequence (Zhang et al., arXiv 2404.05868); idk is l on refusals, which the caller puts in place of the forget
    answers (TOFU, arXiv 2401.06121). Retained answers have l.
    """

    def mean_nll(rows: Tensor) -> Tensor:
        return -(log_p * rows).sum() / (tokens * rows).sum().clamp(min=1)

    if kind == "ga":
        forget = -mean_nll(is_forget)
    elif kind == "idk":
        forget = mean_nll(is_forget)
    elif kind == "npo":
        assert log_p0 is not None
        terms = -(2 / beta) * F.logsigmoid(-beta * (log_p - log_p0))
        forget = (terms * is_forget).sum() / is_forget.sum().clamp(min=1)
    else:
        raise ValueError(f"unknown answer loss {kind!r}")
    return {"forget": forget, "retain": mean_nll(~is_forget)}


class AnswerTerm(nn.Module):
    """`answer_loss` of one batch under `model`, whose LLM is whole."""

    def __init__(self, model: nn.Module, kind: str, log_p0: Tensor | None, *, beta: float, lambda_retain: float):
        super().__init__()
        self.model, self.kind, self.beta, self.lambda_retain = model, kind, beta, lambda_retain
        self.log_p0 = log_p0  # (samples,), of the frozen original

    def forward(self, batch: AnswerBatch) -> dict[str, Tensor]:
        """`forget` and `retain`, scalars with graph."""
        log_p, tokens = answer_log_probabilities(self.model, batch)
        log_p0 = None if self.log_p0 is None else self.log_p0[batch.sample]
        return answer_loss(self.kind, log_p, tokens, batch.is_forget, log_p0=log_p0, beta=self.beta)


class AnswerSampler:
    """Batches of image questions, forget first; every rank and step gets as many of each."""

    def __init__(
        self, processor: Any, forget: Sequence[Profile], retain: Sequence[Profile], settings: Settings, *, idk: bool
    ):
        self._processor, self._size = processor, settings.per_device_train_batch_size
        self._decode = lru_cache(maxsize=4096)(lambda photo: decode_image(photo.data, photo.source))
        rng = np.random.default_rng([settings.seed, 16])
        self._samples = _image_questions(forget)
        if idk:
            self._samples = [(photo, question, str(rng.choice(REFUSALS))) for photo, question, _ in self._samples]
        self._n_forget = len(self._samples)
        self._samples += _image_questions(retain)
        self._plan = BatchPlan(
            range(self._n_forget),
            range(self._n_forget, len(self._samples)),
            batch_size=self._size,
            forget_share=settings.forget_share,
            seed=settings.seed,
        )

    def batch(self, step: int, rank: int, world_size: int) -> AnswerBatch:
        forget, retain = self._plan.indices(step, rank, world_size)
        return self._collate(forget + retain)

    @torch.no_grad()
    def reference_log_probabilities(self, model: nn.Module, device: torch.device) -> Tensor:
        """(samples,) log-probabilities under the frozen original, computed once, so that no second model is held."""
        parts = []
        for start in range(0, len(self._samples), self._size):
            batch = self._collate(list(range(start, min(start + self._size, len(self._samples)))))
            parts.append(answer_log_probabilities(model, batch.to(device))[0])
        return torch.cat(parts)

    def _collate(self, indices: Sequence[int]) -> AnswerBatch:
        samples = [self._samples[i] for i in indices]
        pairs = [(self._decode(photo), question, answer) for photo, question, answer in samples]
        return collate_answers(self._processor, pairs, indices, [i < self._n_forget for i in indices])


def _image_questions(profiles: Sequence[Profile]) -> list[tuple[Photo, str, str]]:
    """Every (photo, question, answer) of the profiles' image questions, worded as the evaluation words them."""
    return [
        (photo, question, answer)
        for profile in profiles
        for photo in profile.photos
        for question, answer in question_answer_pairs(profile.visual)
    ]
