"""The output-level task: batches of questions and answers, and what a model makes of them at answer positions.

Labels are answer tokens only. Hidden states and logits are taken at answer positions and nowhere else, so image
placeholders are not supervised and cost no memory. The losses are in `methods/`. Legend: B answers, T tokens of the
longest, n answer tokens in a batch, H width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvkd.data.wording import question_answer_pairs
from fastvkd.methods import Side
from fastvkd.models import families
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.models.packing import PackedBatch
from fastvkd.models.pooled import DecodedPhotos
from fastvkd.models.processing import tokens_and_features
from fastvkd.records import Photo, Profile
from fastvkd.settings import Settings
from fastvkd.unlearning.sampling import BatchPlan, draw, world_size_of

Asked = dict[str, AnswerBatch]  # the questions of a step: "answer" about images, and "text" where a method asks such


@dataclass
class Answers:
    """What a model makes of a batch at its answer positions.

    hidden: (n, H), of the LLM's last layer (or the last one that is loaded). logits: (n, V) float32; None where the
    model has no head. tokens: (n,) int64, the right token at each position. row: (n,) int64, the answer that it
    belongs to. is_forget, sample: (B,), of the batch.
    """

    hidden: Tensor
    logits: Tensor | None
    tokens: Tensor
    row: Tensor
    is_forget: Tensor
    sample: Tensor

    def log_probabilities(self) -> Tensor:
        """(B,) summed log-probability of each answer, float32."""
        assert self.logits is not None
        token_loss = F.cross_entropy(self.logits, self.tokens, reduction="none")
        return torch.zeros(len(self.is_forget), device=token_loss.device).index_add(0, self.row, -token_loss)

    def loss(self) -> Tensor:
        """Mean cross-entropy over all answer tokens."""
        assert self.logits is not None
        return F.cross_entropy(self.logits, self.tokens)

    def cross_entropy(self, *, forget: bool) -> Tensor:
        """Mean cross-entropy over the tokens of forget (or else of retained) answers; 0 where there are none."""
        assert self.logits is not None
        return mean_where(F.cross_entropy(self.logits, self.tokens, reduction="none"), self.answers_of(forget))

    def only(self, chosen: slice) -> "Answers":
        """Those of some answers, numbered anew."""
        count = len(self.is_forget)
        wanted = torch.zeros(count, dtype=torch.bool, device=self.row.device)
        wanted[chosen] = True
        here = wanted[self.row]
        row = (wanted.cumsum(0) - 1)[self.row[here]]
        logits = None if self.logits is None else self.logits[here]
        return Answers(self.hidden[here], logits, self.tokens[here], row, self.is_forget[chosen], self.sample[chosen])

    def answers_of(self, forget: bool) -> Tensor:
        """(n,) bool: the tokens of forget (or else of retained) answers."""
        return self.is_forget[self.row] == forget

    def samples_of(self, *, forget: bool) -> list[int]:
        """Positions in the sampler's list of the forget (or else the retained) answers with tokens here, in the order
        of those tokens."""
        rows = self.row[self.answers_of(forget)].unique_consecutive()
        return self.sample[rows].tolist()


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of those `values` (n,) that `chosen` (n,) bool selects; 0 (with a graph) where it selects none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def read_answers(model: nn.Module, batch: AnswerBatch) -> Answers:
    """One forward pass of `model`, whole or truncated, over `batch`."""
    with tokens_and_features():
        hidden = families.base_model(model)(**batch.inputs, use_cache=False).last_hidden_state
    wanted = batch.predicts != -100
    kept = hidden.to(wanted.device)[wanted]  # a model that is spread ends on another card than it begins on
    head: Any = getattr(model, "lm_head", None)
    logits = head(kept).to(wanted.device).float() if head is not None else None
    row = batch.asked_by if isinstance(batch, PackedBatch) else wanted.nonzero()[:, 0]
    return Answers(kept, logits, batch.predicts[wanted], row, batch.is_forget, batch.sample)


def answer_log_probabilities(model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probability of each answer in float32, and (B,) its number of tokens."""
    answers = read_answers(model, batch)
    return answers.log_probabilities(), torch.bincount(answers.row, minlength=len(answers.is_forget))


@dataclass(frozen=True)
class AnswerTask:
    """Questions to (un)learn, and one output-level loss of `methods/` on the answers to them under `model`."""

    model: nn.Module
    answer_loss: Any
    sampler: "AnswerSampler"
    device: torch.device
    lambda_forget: float
    lambda_retain: float

    def load(self, step: int, rank: int, world_size: int) -> Asked:
        """The questions of one step on one rank, on the host."""
        texts = self.sampler.text_batch(step, rank, world_size)
        return {"answer": self.sampler.batch(step, rank, world_size)} | ({} if texts is None else {"text": texts})

    def place(self, loaded: Asked) -> Asked:
        """The same questions on the device."""
        return {name: questions.to(self.device) for name, questions in loaded.items()}

    def loss(self, batch: Asked, only: Side | None = None) -> dict[str, Tensor]:
        """`loss`, the weighted sum of the terms that the method has, a scalar with graph; and each term, detached.

        Terms are called `loss_answer_forget`, `loss_text_retain` and the like. With `only` the other side's answers
        carry no label, and texts are left out.
        """
        if only is not None:
            asked = batch["answer"]
            kept = asked.is_forget == (only == "forget")
            batch = {"answer": replace(asked, predicts=torch.where(kept[:, None], asked.predicts, -100))}
        lambdas = {"forget": self.lambda_forget, "retain": self.lambda_retain}
        totals: list[Tensor] = []
        found: dict[str, Tensor] = {}
        for name, questions in batch.items():
            terms = self.answer_loss(read_answers(self.model, questions))
            totals.append(torch.stack([lambdas[side] * term for side, term in terms.items()]).sum())
            found |= {f"loss_{name}_{side}": term.detach() for side, term in terms.items()}
        return {"loss": sum(totals[1:], totals[0]), **found}

    @torch.no_grad()
    def remember(self, side: Side, micro_steps: int, world_size: int) -> None:
        """Let the loss note what `model`, still the original, makes of all answers of `side` that training will ask."""
        for batch in self.sampler.visited(micro_steps, world_size, side):
            self.answer_loss.remember(read_answers(self.model, batch.to(self.device)))


class AnswerSampler:
    """Batches of questions with their answers. Every rank and step gets as many of each kind.

    Args:
        forget, retain: profiles whose image questions are asked; one of them may be empty.
        texts: profiles whose text questions are asked too, in batches of their own (fine-tuning).
        refusals: put in place of the forget answers, at random; empty for the true answers.
    """

    def __init__(
        self,
        processor: Any,
        settings: Settings,
        *,
        forget: Sequence[Profile] = (),
        retain: Sequence[Profile] = (),
        texts: Sequence[Profile] = (),
        refusals: Sequence[str] = (),
    ):
        self._processor, self._size, self._seed = processor, settings.per_device_train_batch_size, settings.seed
        self._decode = DecodedPhotos()
        rng = np.random.default_rng([settings.seed, 16])
        self._samples: list[tuple[Photo | None, str, str]] = list(image_questions(forget))
        if refusals:
            self._samples = [(photo, question, str(rng.choice(refusals))) for photo, question, _ in self._samples]
        self._n_forget = len(self._samples)
        self._samples += image_questions(retain)
        n_images = len(self._samples)
        self._samples += text_questions(texts)
        self._text_range = range(n_images, len(self._samples))
        self._texts_per_batch = 0
        if self._text_range:
            share = round(self._size * len(self._text_range) / len(self._samples))
            self._texts_per_batch = min(max(1, share), self._size - 1)
        self._pool = range(n_images)
        self._plan: BatchPlan | None = None
        if 0 < self._n_forget < n_images:
            self._plan = BatchPlan(
                range(self._n_forget),
                range(self._n_forget, n_images),
                batch_size=self._size,
                forget_share=settings.forget_share,
                seed=settings.seed,
            )

    def __len__(self) -> int:
        """Number of questions that one epoch asks: the forget set's where there is one, else all."""
        return self._n_forget or len(self._samples)

    @property
    def per_batch(self) -> int:
        """How many of those one batch asks."""
        return self._plan.forget_per_rank if self._plan is not None else self._size

    def updates(self, settings: Settings) -> int:
        """Optimiser updates: `max_steps`, or what `num_train_epochs` passes over those questions take."""
        if settings.num_train_epochs is None:
            return settings.max_steps
        each = self.per_batch * settings.gradient_accumulation_steps * world_size_of(settings)
        return max(1, math.ceil(settings.num_train_epochs * len(self) / each))

    def batch(self, step: int, rank: int, world_size: int) -> AnswerBatch:
        """The image questions of one step on one rank, forget first."""
        return self.collate(self._indices(step, rank, world_size))

    def text_batch(self, step: int, rank: int, world_size: int) -> AnswerBatch | None:
        """The text questions of one step on one rank; None where there are none."""
        if not self._text_range:
            return None
        each = self._texts_per_batch
        chosen = draw(len(self._text_range), (step * world_size + rank) * each, each, (self._seed, 20))
        return self.collate([self._text_range[i] for i in chosen])

    def visited(self, steps: int, world_size: int, side: Side) -> Iterator[AnswerBatch]:
        """Batches of every image question of `side` that `steps` micro-batches on all ranks draw, each once."""
        seen: dict[int, None] = {}
        for step in range(steps):
            for rank in range(world_size):
                seen.update(dict.fromkeys(self._indices(step, rank, world_size)))
        wanted = sorted(i for i in seen if (i < self._n_forget) == (side == "forget"))
        for start in range(0, len(wanted), self._size):
            yield self.collate(wanted[start : start + self._size])

    def collate(self, indices: Sequence[int]) -> AnswerBatch:
        samples = [self._samples[i] for i in indices]
        pairs = [
            (None if photo is None else self._decode(photo), question, answer) for photo, question, answer in samples
        ]
        return collate_answers(self._processor, pairs, indices, [i < self._n_forget for i in indices])

    def _indices(self, step: int, rank: int, world_size: int) -> list[int]:
        if self._plan is not None:
            forget, retain = self._plan.indices(step, rank, world_size)
            return forget + retain
        each = self._size - self._texts_per_batch
        return draw(len(self._pool), (step * world_size + rank) * each, each, (self._seed, 19))


def image_questions(profiles: Sequence[Profile]) -> list[tuple[Photo, str, str]]:
    """Every (photo, question, answer) of the profiles' image questions, worded as the evaluation words them."""
    return [
        (photo, question, answer)
        for profile in profiles
        for photo in profile.photos
        for question, answer in question_answer_pairs(profile.visual)
    ]


def text_questions(profiles: Sequence[Profile]) -> list[tuple[None, str, str]]:
    """Every distinct (None, question, answer) of the profiles' text questions: rows of one entity repeat them."""
    pairs = (pair for profile in profiles for pair in question_answer_pairs(profile.textual))
    return [(None, question, answer) for question, answer in dict.fromkeys(pairs)]
