"""Several questions about one photo as one row, so that the photo's tokens go through the model once.

A question's tokens see the beginning up to the photo and themselves, at the positions that they would have alone. So a
causal decoder makes of them what it makes of separate rows, up to rounding. Legend: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvkd.models.answers import AnswerBatch

_MASKED_ATTENTION = ("sdpa", "eager")
_NOWHERE = -1  # the question of padding


def takes_any_mask(config: Any, attention: str | None = None) -> bool:
    """Whether the LLM of a model's `config` attends by whichever mask it is given, with the implementation of that name
    or its own."""
    text = config.text_config
    attention = attention or text._attn_implementation
    return attention in _MASKED_ATTENTION and getattr(text, "sliding_window", None) is None


def packs(config: Any, attention: str | None = None) -> bool:
    """Whether `pack` is right for a model: LLaVA's, whose decoder is causal and counts a token's place in the text."""
    return config.model_type == "llava" and takes_any_mask(config, attention)


@dataclass
class PackedBatch(AnswerBatch):
    """Rows of several questions each. attention_mask is (B, 1, T, T) and added to scores, position_ids is (B, T).

    question: (B, T) int64, the question that a token belongs to, counted on from row to row; -1 before the questions
    and in padding. is_forget and sample are those of the questions.
    """

    question: Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        moved = super().to(device)
        return PackedBatch(moved.inputs, moved.predicts, moved.is_forget, moved.sample, self.question.to(device))

    @property
    def asked_by(self) -> Tensor:
        """(n,) int64, the question of every answer token, in the order of `predicts`."""
        return self.question[self.predicts != -100]


def pack(rows: Sequence[Sequence[AnswerBatch]], image_token: int, pad: int, dtype: torch.dtype) -> PackedBatch:
    """One row for each of `rows`, whose questions are batches of one with one image each, without its pixels.

    dtype: of the mask, the model's. Raises ValueError where the questions of a row do not begin alike.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("ids", "predicts", "question", "place")}
    number = 0
    for questions in rows:
        texts = [one.inputs["input_ids"][0] for one in questions]
        begin = int((texts[0] == image_token).nonzero()[-1]) + 1
        if any(not torch.equal(text[:begin], texts[0][:begin]) for text in texts):
            raise ValueError("questions about one photo do not begin alike")
        ends = [text[begin:] for text in texts]
        parts["ids"].append(torch.cat([texts[0][:begin], *ends]))
        parts["predicts"].append(
            torch.cat([questions[0].predicts[0, :begin], *(one.predicts[0, begin:] for one in questions)])
        )
        counts = torch.tensor([begin, *map(len, ends)])
        parts["question"].append(torch.tensor([_NOWHERE, *range(number, number + len(ends))]).repeat_interleave(counts))
        after = [torch.arange(begin, begin + len(end)) for end in ends]
        parts["place"].append(torch.cat([torch.arange(begin), *after]))
        number += len(ends)

    def stacked(name: str, value: int) -> Tensor:
        return pad_sequence(parts[name], batch_first=True, padding_value=value)

    ids, question = stacked("ids", pad), stacked("question", _NOWHERE)
    inputs = {
        "input_ids": ids,
        "attention_mask": _mask(question, torch.tensor([len(row) for row in parts["ids"]]), dtype),
        "position_ids": stacked("place", 0),
    }
    return PackedBatch(
        inputs, stacked("predicts", -100), torch.ones(number, dtype=torch.bool), torch.arange(number), question
    )


def _mask(question: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T): 0 where a token (row) sees another (column), else the least number. Padding sees itself."""
    size = question.shape[1]
    place = torch.arange(size)
    real = place < lengths[:, None]
    before = (question == _NOWHERE) & real
    alike = question[:, :, None] == question[:, None, :]
    seen = (alike | before[:, None, :]) & real[:, None, :] & (place[:, None] >= place)
    seen |= torch.eye(size, dtype=torch.bool)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
