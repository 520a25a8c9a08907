"""Train the demo's model until it knows every person and flag ("vanilla"), or all but the forgotten ones ("gold").

One row of a batch packs one photo and several of its questions. Each question sees the photo and itself only (a
block mask and restarted positions), so the result is that of separate sequences at a fraction of the cost. The loss
is taken on answer tokens alone; logits are computed nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from fastvkd.data.images import decode_image
from fastvkd.data.records import Profile
from fastvkd.evaluation.wording import question_answer_pairs


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int = 600
    photos_per_step: int = 32
    questions_per_photo: int = 6
    texts_per_step: int = 48
    learning_rate: float = 1.5e-3
    warmup: int = 40


class PackedRows:
    """Token ids, positions, block mask and answer targets of a batch of packed rows, all padded to one length."""

    def __init__(self, prefix: list[int], rows: Sequence[Sequence[tuple[list[int], list[int]]]], pad: int):
        length = len(prefix) + max(sum(len(q) + len(a) for q, a in row) for row in rows)
        count = len(rows)
        ids = np.full((count, length), pad)
        positions = np.zeros((count, length), dtype=np.int64)
        segment = np.full((count, length), -1)
        predicts = np.full((count, length), -100)  # the token that this position must predict
        for r, row in enumerate(rows):
            n = len(prefix)
            ids[r, :n], positions[r, :n], segment[r, :n] = prefix, np.arange(n), 0
            at = n
            for s, (question, answer) in enumerate(row, start=1):
                tokens = question + answer
                end = at + len(tokens)
                ids[r, at:end] = tokens
                positions[r, at:end] = np.arange(n, n + len(tokens))
                segment[r, at:end] = s
                predicts[r, at + len(question) - 1 : end - 1] = answer
                at = end
        same = segment[:, :, None] == segment[:, None, :]
        allowed = (same | (segment[:, None, :] == 0)) & np.tril(np.ones((length, length), dtype=bool))
        self.ids = torch.from_numpy(ids)
        self.positions = torch.from_numpy(positions)
        self.mask = torch.from_numpy(allowed)[:, None]
        self.predicts = torch.from_numpy(predicts)


def packed_loss(model: LlavaForConditionalGeneration, rows: PackedRows, pixels: Tensor | None) -> Tensor:
    """Mean cross-entropy over the answer tokens of `rows`; `pixels` (rows, 3, S, S) if the prefix holds an image."""
    core = model.model
    embeds = core.get_input_embeddings()(rows.ids)
    if pixels is not None:
        features = torch.cat(tuple(core.get_image_features(pixels).pooler_output)).flatten(0, -2)
        is_image = (rows.ids == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    ).last_hidden_state
    wanted = rows.predicts != -100
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), rows.predicts[wanted])


def train_vanilla(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    profiles: Sequence[Profile],
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int, float], None],
    textual_profiles: Sequence[Profile] | None = None,
) -> None:
    """Train all of `model` in place on the photos of `profiles` and on the text questions of `textual_profiles`
    (default: the same).

    `progress(step, steps, loss)` is called after every step.
    """
    rng = np.random.default_rng([seed, 5])
    tokenizer = processor.tokenizer
    encode: dict[str, list[int]] = {}

    def tokens(text: str) -> list[int]:
        if text not in encode:
            encode[text] = tokenizer(text, add_special_tokens=False).input_ids
        return encode[text]

    eos = [tokenizer.eos_token_id]
    image_ids = [model.config.image_token_id] * model.config.image_seq_length
    photo_prefix = tokens("USER: ") + image_ids
    visual = [
        [(tokens(f"\n{q} ASSISTANT:"), tokens(f" {a}") + eos) for q, a in question_answer_pairs(p.visual)]
        for p in profiles
    ]
    texts = sorted({pair for p in textual_profiles or profiles for pair in question_answer_pairs(p.textual)})
    textual = [(tokens(f"USER: {q} ASSISTANT:"), tokens(f" {a}") + eos) for q, a in texts]
    images = [decode_image(p.photos[0].data, p.photos[0].source) for p in profiles]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]

    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / schedule.warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, s / schedule.steps))) + 0.01),
    )
    photo_order, text_order = _Deck(len(profiles), rng), _Deck(len(textual), rng)
    model.train()
    for step in range(schedule.steps):
        batch = photo_order.draw(schedule.photos_per_step)
        rows = []
        for i in batch:
            chosen = rng.choice(len(visual[i]), min(schedule.questions_per_photo, len(visual[i])), replace=False)
            rows.append([visual[i][j] for j in chosen])
        loss_visual = packed_loss(
            model, PackedRows(photo_prefix, rows, tokenizer.pad_token_id), jitter(pixels[batch], rng)
        )
        drawn = [textual[i] for i in text_order.draw(schedule.texts_per_step)]
        packed = [drawn[i : i + 6] for i in range(0, len(drawn), 6)]
        loss_text = packed_loss(model, PackedRows([], packed, tokenizer.pad_token_id), None)
        loss = loss_visual + 0.3 * loss_text
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress(step + 1, schedule.steps, float(loss_visual.detach()))
    model.eval()


def jitter(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift each image by up to three pixels, replicating the border, and vary its brightness."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    shifts = rng.integers(0, 7, (len(pixels), 2))
    moved = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, shifts, strict=True)])
    light = torch.from_numpy(rng.uniform(0.85, 1.15, (len(pixels), 1, 1, 1)).astype(np.float32))
    return moved * light


class _Deck:
    """Draws indices so that all come up once before any comes up twice."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng, self.cards = size, rng, np.empty(0, dtype=np.int64)

    def draw(self, count: int) -> np.ndarray:
        while len(self.cards) < count:
            self.cards = np.concatenate([self.cards, self.rng.permutation(self.size)])
        drawn, self.cards = self.cards[:count], self.cards[count:]
        return drawn
