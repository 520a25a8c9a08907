"""Membership inference: do the model's own likelihoods give away what it was trained on?

There are two pairs of sets. Both are about the forgotten people, so that nothing but membership tells them apart.

- `photos`: the forget set's photos against photos of the same people that nobody trained on, with the same questions
  and answers. This is the usual test. A model that generalises well gives little away here even before unlearning.
- `pairs`: the forget set's photos with their own answers, against the same photos with the answers of another forgotten
  person. No model was trained on the latter. A model that still links face and fact tells them apart at once.

A model that never saw them has 0.5. Below 0.5 is a trace too: answers were pushed away, as gradient ascent does.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from fastvkd.attacks.asking import Asked
from fastvkd.models import families
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.photos import decode_image
from fastvkd.unlearning.answers import read_answers

SCORES = ("loss", "zlib", "min_k", "min_k++")  # of likelihoods
GRADIENT = "grad_norm"
LOWEST = 0.2  # the share of least likely tokens that Min-K % looks at
FALSE_POSITIVES = 0.01
_GRADIENTS = 64  # statements of a side whose gradient is taken: each costs a backward pass of its own


@dataclass(frozen=True)
class Statement:
    """An answer to a question about a photo, true or not."""

    asked: Asked
    answer: str


def photo_sets(forget: Sequence[Asked], unseen: Sequence[Asked]) -> tuple[list[Statement], list[Statement]]:
    """Members and non-members of `photos`."""
    members, others = ([Statement(one, one.choice.answer_text) for one in side] for side in (forget, unseen))
    return members, others


def pair_sets(forget: Sequence[Asked], seed: int) -> tuple[list[Statement], list[Statement]]:
    """Members and non-members of `pairs`. Questions to which all entities have the same answer are left out."""
    rng = np.random.default_rng([seed, 35])
    answers: dict[str, set[str]] = {}
    for one in forget:
        answers.setdefault(one.choice.question, set()).add(one.choice.answer_text)
    members, others = [], []
    for one in forget:
        wrong = sorted(answers[one.choice.question] - {one.choice.answer_text})
        if wrong:
            members.append(Statement(one, one.choice.answer_text))
            others.append(Statement(one, str(rng.choice(wrong))))
    return members, others


def token_statistics(model: nn.Module, batch: AnswerBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each answer two float64 arrays (tokens,): log p of its tokens, and (log p - mean) / standard deviation. Mean
    and deviation are over the vocabulary, under the model's own distribution."""
    hidden = families.base_model(model)(**batch.inputs, use_cache=False).last_hidden_state
    wanted = batch.predicts != -100
    head: Any = model.lm_head
    log_p_MV = head(hidden[wanted]).double().log_softmax(-1)
    log_p_M = log_p_MV.gather(-1, batch.predicts[wanted][:, None])[:, 0]
    p_MV = log_p_MV.exp()
    mean_M = (p_MV * log_p_MV).sum(-1)
    variance_M = (p_MV * log_p_MV.square()).sum(-1) - mean_M.square()
    normalised_M = (log_p_M - mean_M) / variance_M.clamp_min(1e-12).sqrt()
    counts = wanted.sum(1).tolist()
    return list(
        zip(
            (part.cpu().numpy() for part in log_p_M.split(counts)),
            (part.cpu().numpy() for part in normalised_M.split(counts)),
            strict=True,
        )
    )


def membership_scores(answer: str, log_p: np.ndarray, normalised: np.ndarray) -> dict[str, float]:
    """Scores of one answer, higher for a likelier member.

    - loss: mean log-probability (Yeom et al., arXiv 1709.01604).
    - zlib: total log-probability per byte of the compressed answer (Carlini et al., arXiv 2012.07805). The paper
      divides the mean; answers of a few tokens hardly differ in compressed size, so that would be the first score
      again.
    - min_k: mean of the lowest 20 % of token log-probabilities, at least one (Shi et al., arXiv 2310.16789).
    - min_k++: the same of values normalised over the vocabulary (Zhang et al., arXiv 2404.02936).
    """
    count = max(1, int(LOWEST * len(log_p)))
    return {
        "loss": float(log_p.mean()),
        "zlib": float(log_p.sum() / len(zlib.compress(answer.encode()))),
        "min_k": float(np.sort(log_p)[:count].mean()),
        "min_k++": float(np.sort(normalised)[:count].mean()),
    }


def auc(members: Sequence[float], others: Sequence[float], *, seed: int, resamples: int = 1000) -> dict[str, Any]:
    """{"auc", "ci95", "tpr_at_1_fpr", "n_members", "n_others"}. The AUC is the probability that a member scores above a
    non-member; ties count half. ci95 is a percentile bootstrap over members and non-members. The last but two is
    `true_positives`. Raises ValueError where a side is empty."""
    if not len(members) or not len(others):
        raise ValueError("auc: both sides need at least one score")
    one, two = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    wins = (one[:, None] > two[None, :]) + 0.5 * (one[:, None] == two[None, :])
    rng = np.random.default_rng([seed, 36])
    rows = rng.multinomial(len(one), np.full(len(one), 1 / len(one)), resamples)
    columns = rng.multinomial(len(two), np.full(len(two), 1 / len(two)), resamples)
    # divided once: halves and counts add up exactly, so that no area lies above 1
    areas = ((rows @ wins) * columns).sum(1) / (len(one) * len(two))
    low, high = np.quantile(areas, [0.025, 0.975])
    return {
        "auc": float(wins.mean()),
        "ci95": [float(low), float(high)],
        "tpr_at_1_fpr": true_positives(one, two),
        "n_members": len(one),
        "n_others": len(two),
    }


def true_positives(members: ArrayLike, others: ArrayLike, rate: float = FALSE_POSITIVES) -> float:
    """Share of members above a threshold that at most `rate` of the non-members are above (TPR at low FPR, Carlini et
    al., arXiv 2112.03570). With fewer than 1 / `rate` non-members none of them may be above it."""
    sorted_others = np.sort(np.asarray(others))[::-1]
    allowed = int(rate * len(sorted_others) + 1e-9)
    return float(np.mean(np.asarray(members) > sorted_others[allowed]))


@torch.inference_mode()
def score_statements(
    model: nn.Module, processor: Any, statements: Sequence[Statement], *, batch_size: int = 32
) -> dict[str, list[float]]:
    """Every score of `SCORES` for every statement, in order."""
    device = next(model.parameters()).device
    decoded = {id(s.asked.photo): decode_image(s.asked.photo.data, s.asked.photo.source) for s in statements}
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for start in range(0, len(statements), batch_size):
        part = statements[start : start + batch_size]
        pairs = [(decoded[id(s.asked.photo)], s.asked.choice.question, s.answer) for s in part]
        batch = collate_answers(processor, pairs, range(len(part)), [True] * len(part)).to(device)
        for statement, (log_p, normalised) in zip(part, token_statistics(model, batch), strict=True):
            for name, value in membership_scores(statement.answer, log_p, normalised).items():
                found[name].append(value)
    return found


def gradient_norms(model: nn.Module, processor: Any, statements: Sequence[Statement]) -> list[float]:
    """Minus the L2 norm of the gradient of each answer's mean token loss for the projector's weights.

    What was trained on leaves little to learn (GradNorm, Wang et al., arXiv 2402.17012). `model` is left as it was."""
    device = next(model.parameters()).device
    trained = [p for _, p in families.visual_parameters(model, families.family_of(model), "projector")]
    found = []
    with families.training_only(model, trained):
        for one in statements:
            image = decode_image(one.asked.photo.data, one.asked.photo.source)
            batch = collate_answers(processor, [(image, one.asked.choice.question, one.answer)], [0], [True]).to(device)
            loss = read_answers(model, batch).cross_entropy(forget=True)
            squares = [gradient.double().square().sum() for gradient in torch.autograd.grad(loss, trained)]
            found.append(-float(torch.stack(squares).sum().sqrt()))
    return found


def membership(
    model: nn.Module,
    processor: Any,
    sets: dict[str, tuple[list[Statement], list[Statement]]],
    *,
    seed: int,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]]:
    """{set: {score: `auc` of it}} for sets of (members, non-members).

    The gradient is taken of at most 64 statements a side, spread evenly; and of none where a part of the model lies in
    host memory."""
    found = {}
    whole = not any(p.is_meta for p in model.parameters())
    for name, (members, others) in sets.items():
        inside, outside = (
            score_statements(model, processor, side, batch_size=batch_size) for side in (members, others)
        )
        if whole:
            inside[GRADIENT], outside[GRADIENT] = (
                gradient_norms(model, processor, side[:: math.ceil(len(side) / _GRADIENTS)])
                for side in (members, others)
            )
        found[name] = {score: auc(inside[score], outside[score], seed=seed) for score in inside}
    return found
