"""How far a model's choices lie from those of a reference, usually a model that never saw the forget set.

The figure is the Jensen-Shannon divergence of both distributions over the options.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import rel_entr, softmax

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
