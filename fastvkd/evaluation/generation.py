"""Greedy answers in batches, and how close they are to a reference: ROUGE and BLEU. Batching changes no text.

Letters in tensor names: B rows, T tokens.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from fastvkd.evaluation.inputs import Embedder, Tick, Tokens, eos_ids, evaluating
from fastvkd.models.answers import Query, processor_inputs
from fastvkd.models.processing import tokens_and_features

MAX_NEW_TOKENS = 50


def generate_with_processor(
    model: nn.Module,
    processor: Any,
    queries: Sequence[Query],
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    tick: Tick | None = None,
) -> list[str]:
    """Greedy answers through the processor and `model.generate`; right for every family. After every batch `tick` gets
    its number of answers."""
    answers = [""] * len(queries)
    ends = eos_ids(model, processor)
    generator: Any = model
    # Prompts of like length share a batch; the order of equals does not matter for the text.
    order = sorted(range(len(queries)), key=lambda index: (bool(queries[index].photos), len(queries[index].prompt)))
    with evaluating(model):
        for part in _batches(order, batch_size, [bool(query.photos) for query in queries]):
            inputs = processor_inputs(
                processor, [queries[index] for index in part], None, next(model.parameters()).device
            )
            with tokens_and_features():
                ids_BT = generator.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=ends or None,
                    pad_token_id=processor.tokenizer.pad_token_id,
                )
            new = ids_BT[:, inputs["input_ids"].shape[1] :].tolist()
            for index, ids in zip(part, new, strict=True):
                answers[index] = _decode(processor, ids, ends)
            if tick is not None:
                tick(len(part))
    return answers


def generate_embedded(
    embedder: Embedder, queries: Sequence[Query], max_new_tokens: int = MAX_NEW_TOKENS, tick: Tick | None = None
) -> list[str]:
    """The texts of `generate_with_processor`, faster, for a family in `inputs.EMBEDDABLE`. The vision tower runs once
    per distinct photo, logits exist for the last token only, and finished rows leave batch and key-value cache."""
    answers = [""] * len(queries)
    with evaluating(embedder.model):
        prompts = embedder.encode(queries)
        order = sorted(range(len(queries)), key=lambda index: len(prompts[index].ids))
        lengths, stop = [len(prompts[index].ids) + max_new_tokens for index in order], 0
        while stop < len(order):
            here = embedder.part(lengths, stop, embedder.answer_bytes)
            part, stop = order[here], here.stop
            new = _greedy(
                embedder, [prompts[index] for index in part], [queries[index] for index in part], max_new_tokens
            )
            ends = eos_ids(embedder.model, embedder.processor)
            for index, tokens in zip(part, new, strict=True):
                answers[index] = _decode(embedder.processor, tokens, ends)
            if tick is not None:
                tick(len(part))
    return answers


def _greedy(
    embedder: Embedder, prompts: Sequence[Tokens], queries: Sequence[Query], max_new_tokens: int
) -> list[list[int]]:
    device = embedder.device
    model = embedder.model
    lengths_B = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    size = max(len(prompt.ids) for prompt in prompts)
    pad_id = 0 if embedder.image_token_id != 0 else 1
    ids_BT = torch.tensor([[pad_id] * (size - len(prompt.ids)) + prompt.ids for prompt in prompts], device=device)
    # Left padding: every row's next token then sits in the same column.
    mask_BT = (torch.arange(size, device=device)[None, :] >= size - lengths_B[:, None]).long()
    # Padded on the left like the ids; axes (one, or three under M-RoPE) x rows x tokens.
    positions = np.stack([np.pad(p.positions, ((0, 0), (size - len(p.ids), 0))) for p in prompts], axis=1)
    last = positions[:, :, -1:]
    padded = bool((lengths_B < size).any())
    past = DynamicCache(config=model.config.get_text_config(decoder=True))
    embeds = embedder.embeddings(ids_BT, [query.photos for query in queries])
    ends_E = torch.tensor(eos_ids(model, embedder.processor), device=device, dtype=torch.long)
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch still is
    active_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        hidden = embedder.hidden(
            inputs_embeds=embeds,
            attention_mask=mask_BT if padded else None,
            position_ids=embedder.position_ids(positions),
            past_key_values=past,
            use_cache=True,
        )[:, -1]
        next_B = embedder.logits(hidden).argmax(-1)
        tokens, was_active = next_B.tolist(), active_B.tolist()
        for place, row in enumerate(rows):
            if was_active[place]:
                found[row].append(tokens[place])
        active_B = active_B & ~torch.isin(next_B, ends_E)
        left = int(active_B.sum())
        if left == 0 or step == max_new_tokens - 1:
            break
        if left <= 0.75 * len(rows):
            # Copying the cache costs less than carrying a quarter of rows that nobody reads.
            keep = active_B.nonzero().flatten()
            past.batch_select_indices(keep)
            rows = [rows[place] for place in keep.tolist()]
            next_B, mask_BT, active_B = next_B[keep], mask_BT[keep], active_B[keep]
            last = last[:, keep.cpu().numpy()]
        embeds = model.get_input_embeddings()(next_B[:, None])
        positions = last + 1 + step
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
    return found


def _decode(processor: Any, ids: list[int], ends: Sequence[int]) -> str:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()


def _batches(order: Sequence[int], batch_size: int, groups: Sequence[bool]) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        # A processor takes either photos for all prompts of a batch or for none.
        if not batches or len(batches[-1]) == batch_size or groups[batches[-1][0]] != groups[index]:
            batches.append([])
        batches[-1].append(index)
    return batches


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # late: training imports this file and scores nothing

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(reference: str, answer: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 and ROUGE-L recall with Porter's stemmer (rouge-score), each in [0, 1]."""
    scores = _rouge().score(reference, answer)
    return {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
        "rouge_l_recall": scores["rougeL"].recall,
    }


def bleu(reference: str, answer: str) -> float:
    """Sentence BLEU-4 on words split at white space, smoothing method 1 (Chen and Cherry 2014), in [0, 1]."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # late, as rouge_score

    if not answer.split():
        return 0.0
    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([reference.split()], answer.split(), smoothing_function=smoothing))
