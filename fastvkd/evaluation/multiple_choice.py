"""Multiple choice: the log-likelihood of every option's text as the answer (zero-shot).

Letters in tensor names: B rows, T tokens, H hidden size, M scored tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.evaluation.inputs import Embedder, Tick, Tokens, evaluating
from fastvkd.models.answers import Query, answer_lengths, common_prefix, processor_inputs, token_ids, with_answer
from fastvkd.models.processing import tokens_and_features

# Rows of hidden states that go through the head at once: 512 x 32,000 logits in float32 are 64 MB.
_HEAD_ROWS = 512
# A pack holds this many tokens beyond its first prompt, or as many as that prompt has, whichever is more. That is
# enough to share an image between questions, and short enough for attention, which is quadratic in the pack.
_PACK_TOKENS = 128


@dataclass(frozen=True)
class OptionScores:
    """Per option, in order: the sum of the log-probabilities of its tokens (nats), and how many tokens it has."""

    log_likelihood: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def normalised(self) -> tuple[float, ...]:
        """Mean log-probability per token. A sum would favour short options, whatever the question. With the mean, an
        option that continues another one ('Guinea', 'Guinea-Bissau') can still win."""
        return tuple(total / count for total, count in zip(self.log_likelihood, self.tokens, strict=True))

    @property
    def best(self) -> int:
        return int(np.argmax(self.normalised))


@dataclass
class _Pack:
    """A tree of tokens laid out as one sequence. A token sees only its ancestors, and has the position of its own text.

    Questions about one photo share the photo's tokens; options share their question's. A token sees exactly the text
    that it would have had alone. So scores are the same, and shared tokens are computed once.
    """

    photos: tuple[Any, ...]
    ids: list[int] = field(default_factory=list)
    # (axes, nodes of one branch), one array per branch.
    positions: list[np.ndarray] = field(default_factory=list)
    # The last path added, as indices into `ids`, root first: new ones branch off from it.
    path: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    # (first new node, path it hangs from): what the attention mask is built from.
    branches: list[tuple[int, int, list[int]]] = field(default_factory=list)
    # (question, option, parent node, target token) of every scored token.
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)
    first_prompt: int = 0

    def add(self, text: Tokens, answer_start: int, question: int, option: int) -> None:
        tokens = text.ids
        shared = common_prefix(self.tokens, tokens)
        start = len(self.ids)
        self.ids.extend(tokens[shared:])
        self.positions.append(text.positions[:, shared:])
        self.branches.append((start, len(self.ids), self.path[:shared]))
        self.path = self.path[:shared] + list(range(start, len(self.ids)))
        self.tokens = tokens
        self.first_prompt = self.first_prompt or answer_start
        self.targets.extend(
            (question, option, self.path[place - 1], tokens[place]) for place in range(answer_start, len(tokens))
        )

    def visible(self, size: int) -> np.ndarray:
        """(size, size) bool: token n (row) sees token m (column). Padding sees itself, so that no row is empty."""
        mask = np.eye(size, dtype=bool)
        for start, stop, ancestors in self.branches:
            mask[start:stop, ancestors] = True
            mask[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
        return mask


def score_options(
    model: nn.Module,
    processor: Any,
    queries: Sequence[Query],
    options: Sequence[Sequence[str]],
    batch_size: int,
    tick: Tick | None = None,
) -> list[OptionScores]:
    """Score each option text as the answer to its query, through the processor and the whole model, one row per option.

    This is right for every family; `score_options_packed` gives the same numbers faster where the family allows. After
    every batch `tick` gets the number of questions that it finished.
    """
    rows = [(q, o) for q, texts in enumerate(options) for o in range(len(texts))]
    answers = [options[q][o] for q, o in rows]
    prompts = [queries[q].prompt for q, _ in rows]
    lengths = answer_lengths(processor, prompts, [with_answer(p, a) for p, a in zip(prompts, answers, strict=True)])
    rows_by_length = sorted(range(len(rows)), key=lambda row: len(queries[rows[row][0]].prompt) + len(answers[row]))
    totals = [0.0] * len(rows)
    left = [len(texts) for texts in options]
    device = next(model.parameters()).device
    # In PaliGemma all tokens of type 0 see each other: an answer of that type would be read off, not predicted.
    config: Any = model.config
    prefix_attends_both_ways = config.model_type == "paligemma"
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows_by_length[start : start + batch_size]
            inputs = processor_inputs(
                processor, [queries[rows[row][0]] for row in part], [answers[row] for row in part], device
            )
            longest = max(lengths[row] for row in part)
            if prefix_attends_both_ways:
                for place, row in enumerate(part):
                    inputs["token_type_ids"][place, -lengths[row] :] = 1
            # Left padding puts every answer at the end: only its tokens and the one before them need logits.
            with tokens_and_features():
                logits_BTV = model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits
            for place, row in enumerate(part):
                count = lengths[row]
                targets_M = inputs["input_ids"][place, -count:]
                log_probs_MV = logits_BTV[place, -count - 1 : -1].float().log_softmax(-1)
                totals[row] = float(log_probs_MV.gather(-1, targets_M[:, None]).double().sum())
                left[rows[row][0]] -= 1
            if tick is not None:
                tick(len({rows[row][0] for row in part if left[rows[row][0]] == 0}))
    return _collect(options, {row: (totals[i], lengths[i]) for i, row in enumerate(rows)})


def score_options_packed(
    embedder: Embedder, queries: Sequence[Query], options: Sequence[Sequence[str]], tick: Tick | None = None
) -> list[OptionScores]:
    """The numbers of `score_options`, faster, for a family in `inputs.EMBEDDABLE`.

    Questions that share a photo and options that share a question go into one pack (see `_Pack`). Up to
    `embedder.batch_size` packs go through the decoder at once. Logits exist at scored tokens only.
    """
    model = embedder.model
    found: dict[tuple[int, int], tuple[float, int]] = {}
    with evaluating(model):
        packs = sorted(_packs(embedder, queries, options), key=lambda pack: len(pack.ids))
        lengths, stop = [len(pack.ids) for pack in packs], 0
        while stop < len(packs):
            here = embedder.part(lengths, stop, embedder.pack_bytes)
            part, stop = packs[here], here.stop
            for key, value in _score_packs(embedder, part):
                total, count = found.get(key, (0.0, 0))
                found[key] = (total + value, count + 1)
            if tick is not None:  # a pack holds whole questions
                tick(sum(len({q for q, *_ in pack.targets}) for pack in part))
    return _collect(options, found)


def _packs(embedder: Embedder, queries: Sequence[Query], options: Sequence[Sequence[str]]) -> Iterator[_Pack]:
    prompts = embedder.encode(queries)
    joint = iter(
        token_ids(
            embedder.processor,
            [with_answer(q.prompt, text) for q, texts in zip(queries, options, strict=True) for text in texts],
        )
    )
    full = [[next(joint) for _ in texts] for texts in options]
    keys = [tuple(photo.key for photo in query.photos) for query in queries]
    pack: _Pack | None = None
    previous: tuple[str, ...] = ()
    for question in sorted(range(len(queries)), key=lambda index: (keys[index], index)):
        photos = queries[question].photos
        prompt = prompts[question]
        room = pack is not None and len(pack.ids) < pack.first_prompt + max(_PACK_TOKENS, pack.first_prompt)
        # Text questions share too little with each other to be worth a longer sequence.
        if pack is None or keys[question] != previous or not keys[question] or not room:
            if pack is not None:
                yield pack
            pack = _Pack(photos)
        previous = keys[question]
        for option, ids in enumerate(full[question]):
            text = prompt.with_ids(embedder.expand(ids, photos))
            pack.add(text, common_prefix(prompt.ids, text.ids), question, option)
    if pack is not None:
        yield pack


def _score_packs(embedder: Embedder, packs: Sequence[_Pack]) -> Iterator[tuple[tuple[int, int], float]]:
    size = max(len(pack.ids) for pack in packs)
    ids = np.zeros((len(packs), size), dtype=np.int64)
    positions = np.zeros((len(packs[0].positions[0]), len(packs), size), dtype=np.int64)
    for row, pack in enumerate(packs):
        ids[row, : len(pack.ids)] = pack.ids
        positions[:, row, : len(pack.ids)] = np.concatenate(pack.positions, axis=1)
    device = embedder.device
    # Padding must not be taken for an image token, which id 0 may well be.
    padding_BT = torch.arange(size)[None, :] >= torch.tensor([len(pack.ids) for pack in packs])[:, None]
    pad_id = 0 if embedder.image_token_id != 0 else 1
    ids_BT = torch.from_numpy(ids).masked_fill(padding_BT, pad_id).to(device)
    embeds_BTH = embedder.embeddings(ids_BT, [pack.photos for pack in packs])
    seen = torch.from_numpy(np.stack([pack.visible(size) for pack in packs])).to(device)
    mask_B1TT = torch.zeros(seen.shape, dtype=embeds_BTH.dtype, device=device)
    mask_B1TT = mask_B1TT.masked_fill_(~seen, torch.finfo(embeds_BTH.dtype).min)[:, None]
    hidden_BTH = embedder.hidden(
        inputs_embeds=embeds_BTH,
        attention_mask=mask_B1TT,
        position_ids=embedder.position_ids(positions),
        use_cache=False,
    )
    targets = [(row, *target) for row, pack in enumerate(packs) for target in pack.targets]
    rows_M = torch.tensor([row * size + parent for row, _, _, parent, _ in targets], device=device)
    tokens_M = torch.tensor([token for *_, token in targets], device=device)
    values = _log_probabilities(embedder.logits, hidden_BTH.flatten(0, 1), rows_M, tokens_M)
    for (_, question, option, _, _), value in zip(targets, values.tolist(), strict=True):
        yield (question, option), value


def _log_probabilities(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, rows_M: Tensor, tokens_M: Tensor) -> Tensor:
    """log p(token | hidden row), (M,) float64. A row that is asked about several times, such as the parent of all
    options, goes through the head once."""
    unique_K, place_M = rows_M.unique(return_inverse=True)
    found_M = torch.empty(len(rows_M), dtype=torch.float64, device=hidden_NH.device)
    for start in range(0, len(unique_K), _HEAD_ROWS):
        logits_KV = head(hidden_NH[unique_K[start : start + _HEAD_ROWS]])
        inside = (place_M >= start) & (place_M < start + _HEAD_ROWS)
        local = place_M[inside] - start
        found_M[inside] = (logits_KV[local, tokens_M[inside]] - logits_KV.logsumexp(-1)[local]).double()
    return found_M


def _collect(options: Sequence[Sequence[str]], found: dict[tuple[int, int], tuple[float, int]]) -> list[OptionScores]:
    scores = []
    for question, texts in enumerate(options):
        pairs = [found[question, option] for option in range(len(texts))]
        scores.append(OptionScores(tuple(total for total, _ in pairs), tuple(count for _, count in pairs)))
    return scores
