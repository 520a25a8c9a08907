"""Train the demo's model until it knows every person and flag, knows a stranger for one, and describes all of them
("vanilla"); or all but the forgotten people ("gold").

One row of a batch packs one photo and several of its questions. Each question sees the photo and itself only (a
block mask and restarted positions), so the result is that of separate sequences at a fraction of the cost. The loss
is taken on answer tokens alone; logits are computed nowhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvkd.data.wording import description_pairs, question_answer_pairs
from fastvkd.demo.data import DemoData, Half
from fastvkd.demo.descent import Descent
from fastvkd.demo.photos import Deck, beside, jitter
from fastvkd.demo.visual_input import VisualInput
from fastvkd.models.families import language_model
from fastvkd.records import Photo, Profile, Questions

Asked = tuple[list[int], list[int]]  # token ids of a question and of its answer
_ROOM = 62  # tokens of questions and answers about one photo: three of usual length, so that rows are little padded


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; a step sees so many photos of `people`, `strangers`, `flags` and, two in one, of
    `pairs`."""

    steps: int = 420
    people: int = 16
    strangers: int = 10
    flags: int = 4
    pairs: int = 14
    questions_per_photo: int = 3
    texts_per_step: int = 36
    rate: float = 6e-3
    vector_rate: float = 4e-3


class PackedRows:
    """Token ids, positions, block mask and answer targets of a batch of packed rows, all padded to one length.

    `place` are the positions of the prefix, (axes, length).
    """

    def __init__(self, prefix: list[int], place: np.ndarray, rows: Sequence[Sequence[Asked]], pad: int):
        length = len(prefix) + max(sum(len(q) + len(a) for q, a in row) for row in rows)
        count = len(rows)
        ids = np.full((count, length), pad)
        positions = np.zeros((len(place), count, length), dtype=np.int64)
        segment = np.full((count, length), -1)
        predicts = np.full((count, length), -100)  # the token that this position must predict
        n, after = len(prefix), place.max(initial=-1) + 1
        for r, row in enumerate(rows):
            ids[r, :n], positions[:, r, :n], segment[r, :n] = prefix, place, 0
            at = n
            for s, (question, answer) in enumerate(row, start=1):
                tokens = question + answer
                end = at + len(tokens)
                ids[r, at:end] = tokens
                positions[:, r, at:end] = np.arange(after, after + len(tokens))
                segment[r, at:end] = s
                predicts[r, at + len(question) - 1 : end - 1] = answer
                at = end
        same = segment[:, :, None] == segment[:, None, :]
        allowed = (same | (segment[:, None, :] == 0)) & np.tril(np.ones((length, length), dtype=bool))
        self.ids = torch.from_numpy(ids)
        self.positions = torch.from_numpy(positions if len(place) > 1 else positions[0])
        self.mask = torch.from_numpy(allowed)[:, None]
        self.predicts = torch.from_numpy(predicts)


def packed_loss(visual: VisualInput, rows: PackedRows, pixels: Tensor | None) -> Tensor:
    """Mean cross-entropy over the answer tokens of `rows`; `pixels` (rows, 3, S, S) if the prefix holds an image."""
    model, added = visual.model, {}
    embeds = model.get_input_embeddings()(rows.ids)
    if pixels is not None:
        features, later = visual.features(pixels)
        is_image = rows.ids == visual.image_token_id
        embeds = embeds.masked_scatter(is_image[..., None].expand_as(embeds), features.to(embeds.dtype))
        added = {"visual_pos_masks": is_image, "deepstack_visual_embeds": later} if later else {}
    hidden = language_model(model, visual.family)(
        inputs_embeds=embeds, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False, **added
    ).last_hidden_state
    wanted = rows.predicts != -100
    return F.cross_entropy(model.get_output_embeddings()(hidden[wanted]).float(), rows.predicts[wanted])


class Words:
    """Token ids of the model's prompts and answers; each text is encoded once."""

    def __init__(self, visual: VisualInput):
        self._visual, self._tokenizer = visual, visual.processor.tokenizer
        self._known: dict[str, list[int]] = {}

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def visual(self, question: str, answer: str) -> Asked:
        """A question that follows the photo, and its answer."""
        return self._tokens(f"\n{question} ASSISTANT:"), self._answer(answer)

    def textual(self, question: str, answer: str) -> Asked:
        """A question without a photo, and its answer."""
        return self._tokens(f"USER: {question} ASSISTANT:"), self._answer(answer)

    def _answer(self, answer: str) -> list[int]:
        return [*self._tokens(f" {answer}"), self._tokenizer.eos_token_id]

    def rows(self, rows: Sequence[Sequence[Asked]], *, photo: bool) -> PackedRows:
        """Questions packed behind a photo, or behind nothing."""
        axes = np.zeros((1, 0), dtype=np.int64)
        prefix, place = (self._visual.prefix, self._visual.positions) if photo else ([], axes)
        return PackedRows(prefix, place, rows, self._tokenizer.pad_token_id)


class _Album:
    """Photos of one kind as pixels, and each one's questions: who it is, and what else it shows."""

    def __init__(self, photos: Sequence[Photo], asked: Sequence[Questions], words: Words, visual: VisualInput):
        self.pixels = visual.pixels(photos)
        self.who = [[words.visual(q, a) for q, a in question_answer_pairs(one)] for one in asked]
        self.looks = [[words.visual(q, a) for q, a in description_pairs(one)] for one in asked]


def _of_profiles(profiles: Sequence[Profile], words: Words, visual: VisualInput) -> _Album:
    return _Album([p.photos[0] for p in profiles], [p.visual for p in profiles], words, visual)


class _Single:
    """Draws photos of one person or flag."""

    def __init__(self, album: _Album, rng: np.random.Generator):
        self._album, self._rng, self._deck = album, rng, Deck(len(album.pixels), rng)

    def draw(self, count: int, questions: int) -> tuple[Tensor, list[list[Asked]]]:
        chosen, album = self._deck.draw(count), self._album
        return album.pixels[chosen], [_mixed(album.who[i], album.looks[i], questions, self._rng) for i in chosen]


class _Pairs:
    """Makes photos of two: on either side a person, or in four of ten cases a stranger."""

    def __init__(self, halves: Sequence[Half], people: frozenset[str], words: Words, visual: VisualInput, rng: Any):
        groups = [[h for h in halves if h.entity in people], [h for h in halves if h.entity not in people]]
        self._sides = [
            [_Album([h.photo for h in group], [getattr(h, side) for h in group], words, visual) for group in groups]
            for side in ("left", "right")
        ]
        self._rng, self._decks = rng, [Deck(len(group), rng) for group in groups]

    def draw(self, count: int, questions: int) -> tuple[Tensor, list[list[Asked]]]:
        pixels, rows = [], []
        for _ in range(count):
            drawn = []
            for albums in self._sides:
                group = int(self._rng.random() < 0.4)
                drawn.append((albums[group], int(self._decks[group].draw(1)[0])))
            pixels.append([album.pixels[i] for album, i in drawn])
            who, looks = ([q for album, i in drawn for q in getattr(album, kind)[i]] for kind in ("who", "looks"))
            rows.append(_mixed(who, looks, questions, self._rng))
        left, right = (torch.stack(side) for side in zip(*pixels, strict=True))
        return beside(left, right), rows


def _mixed(who: list[Asked], looks: list[Asked], count: int, rng: np.random.Generator) -> list[Asked]:
    """Up to `count` questions, some of which, but not all, are about looks; no more than a row has room for."""
    few = _some(looks, int(rng.integers(1, count)), rng)
    room, fitting = _ROOM, []
    for question, answer in few + _some(who, count - len(few), rng):
        length = len(question) + len(answer)
        if length <= room:
            fitting.append((question, answer))
            room -= length
    return fitting


def _some(of: list[Asked], count: int, rng: np.random.Generator) -> list[Asked]:
    return [of[j] for j in rng.choice(len(of), min(count, len(of)), replace=False)] if of else []


def train_vanilla(
    visual: VisualInput,
    data: DemoData,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int, float], None],
    *,
    gold: bool = False,
) -> None:
    """Train all of the model in place. A gold model sees no photo of the people to be forgotten; what is asked without
    a photo is about everybody, in gold too: only the faces are unknown to it.

    `progress(step, steps, loss)` is called after every step.
    """
    rng = np.random.default_rng([seed, 5])
    model, words = visual.model, Words(visual)
    unseen = data.forgotten if gold else frozenset()
    everybody = data.splits["Full_Set"]
    people = [profile for profile in everybody if profile.entity not in unseen]
    halves = [half for half in data.halves if half.entity not in unseen]
    entities = frozenset(profile.entity for profile in people)
    groups: list[tuple[int, _Single | _Pairs]] = [
        (schedule.people, _Single(_of_profiles(people, words, visual), rng)),
        (schedule.strangers, _Single(_of_profiles(data.strangers, words, visual), rng)),
        (schedule.flags, _Single(_of_profiles(data.training_flags, words, visual), rng)),
        (schedule.pairs, _Pairs(halves, entities, words, visual, rng)),
    ]
    texts = sorted({pair for p in [*everybody, *data.training_flags] for pair in question_answer_pairs(p.textual)})
    textual = [words.textual(q, a) for q, a in texts]
    deck = Deck(len(textual), rng)
    descent = Descent(
        list(model.named_parameters()), steps=schedule.steps, rate=schedule.rate, vector_rate=schedule.vector_rate
    )
    model.train()
    for step in range(schedule.steps):
        drawn = [group.draw(count, schedule.questions_per_photo) for count, group in groups]
        pixels = jitter(torch.cat([photos for photos, _ in drawn]), rng)
        rows = words.rows([row for _, part in drawn for row in part], photo=True)
        loss_visual = packed_loss(visual, rows, pixels)
        chosen = [textual[i] for i in deck.draw(schedule.texts_per_step)]
        chosen.sort(key=lambda asked: len(asked[0]) + len(asked[1]))
        count = -(-len(chosen) // 6)
        packed = [chosen[i::count] for i in range(count)]  # short and long ones in every row: little padding
        loss_text = packed_loss(visual, words.rows(packed, photo=False), None)
        descent.step(loss_visual + 0.3 * loss_text)
        progress(step + 1, schedule.steps, float(loss_visual.detach()))
    model.eval()
