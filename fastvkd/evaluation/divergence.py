"""How far a model's choices and answers lie from those of a reference, usually a model that never saw the forget set.

Of choices the figure is the Jensen-Shannon divergence of both distributions over the options; of answers it compares
how likely both models find the right ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import rel_entr, softmax
from scipy.stats import ks_2samp

from fastvkd.evaluation.statistics import with_interval

Samples = Sequence[Mapping[str, Any]]


def scored_choices(logged: Samples) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Logged samples of multiple choice that hold the options' likelihoods (corrected mode), by (cell, kind)."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in logged:
        if sample.get("task") == "choice" and "log_likelihood" in sample:
            found.setdefault((sample["cell"], sample["kind"]), []).append(sample)
    return found


def asked(samples: Samples) -> list[tuple[Any, ...]]:
    """What was asked, in order. Two lists of samples can be compared where this is equal."""
    return [(s["entity"], s["question"], tuple(s["options"].items()), s["answer"]) for s in samples]


def option_distribution(sample: Mapping[str, Any]) -> np.ndarray:
    """(options,) float64: softmax of the options' scores, which are mean log-probabilities per token."""
    letters = list(sample["options"])
    return softmax([sample["log_likelihood"][letter] / sample["tokens"][letter] for letter in letters])


def jensen_shannon(one: np.ndarray, other: np.ndarray) -> float:
    """The divergence in bits: 0 for equal distributions, 1 for those that share no outcome."""
    middle = (one + other) / 2
    return float((rel_entr(one, middle).sum() + rel_entr(other, middle).sum()) / (2 * np.log(2)))


def option_divergence(
    mine: Mapping[tuple[str, str], Samples], reference: Mapping[tuple[str, str], Samples], seed: int
) -> dict[str, dict[str, Any]]:
    """`{cell: {"js_vqa": mean over questions, "js_vqa_ci95": interval, "js_qa": ...}}` for the cells and kinds that
    both have. Both come from `scored_choices`; their questions must be the same (see `asked`)."""
    figures: dict[str, dict[str, Any]] = {}
    for cell, kind in mine:
        if (cell, kind) in reference:
            pairs = zip(mine[cell, kind], reference[cell, kind], strict=True)
            values = [jensen_shannon(option_distribution(one), option_distribution(other)) for one, other in pairs]
            figures.setdefault(cell, {}).update(with_interval(f"js_{kind}", values, seed))
    return figures


def answer_log_probability(sample: Mapping[str, Any]) -> float:
    """Mean log-probability per token (nats) of the right answer to a logged question of multiple choice, put openly."""
    letter = sample["answer"]
    return float(sample["log_likelihood"][letter] / sample["tokens"][letter])


def answer_distance(
    mine: Mapping[tuple[str, str], Samples], reference: Mapping[tuple[str, str], Samples]
) -> dict[str, dict[str, float]]:
    """`{cell: {"answer_ks_vqa", "answer_js_vqa", "answer_ks_qa", ...}}` for the cells and kinds that both have.

    Both are 0 for equal answers and at most 1, and compare `answer_log_probability` of the same questions (`asked`). KS
    is the two-sample Kolmogorov-Smirnov statistic. JS is the Jensen-Shannon distance (the root of the divergence in
    bits) of the answers' probabilities, each model's divided by their sum, as CLEAR (arXiv 2410.18057) takes it.
    """
    figures: dict[str, dict[str, float]] = {}
    for cell, kind in mine:
        if (cell, kind) in reference:
            one, other = (
                np.array([answer_log_probability(sample) for sample in of[cell, kind]]) for of in (mine, reference)
            )
            divergence = jensen_shannon(softmax(one), softmax(other))
            figures.setdefault(cell, {}).update(
                {
                    f"answer_ks_{kind}": float(ks_2samp(one, other).statistic),
                    f"answer_js_{kind}": max(0.0, divergence) ** 0.5,
                }
            )
    return figures
