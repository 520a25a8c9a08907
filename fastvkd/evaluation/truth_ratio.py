"""Prob, truth ratio, model utility, forget quality: of TOFU (arXiv 2401.06121) as used in CLEAR (arXiv 2410.18057).

They compare the likelihood of an answer with those of its paraphrase and of wrong answers.

All losses are mean negative log-likelihoods per token (nats) of an answer, given its prompt.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import hmean, ks_2samp

# Cells whose Prob is the plain probability; elsewhere it is normalised over the wrong answers.
PLAIN_PROBABILITY = ("forget", "retain")
UTILITY_CELLS = ("real_faces", "real_world", "retain", "retain_faces")
UTILITY_FIGURES = ("prob", "rouge_l_recall", "truth_ratio")


def probability(loss: float, perturbed_losses: Sequence[float], cell: str) -> float:
    """exp(-loss), off the forget and retain cells divided by itself plus the sum of exp(-loss) of the wrong answers."""
    if cell in PLAIN_PROBABILITY:
        return math.exp(-loss)
    # After too much gradient ascent the exponentials of all losses are 0. Hence the logarithms.
    return math.exp(-loss - np.logaddexp.reduce(-np.array([loss, *perturbed_losses])))


def log_truth_ratios(
    paraphrase_losses: Sequence[float], perturbed_losses: Sequence[Sequence[float]], mode: str
) -> np.ndarray:
    """log R_i = mean_j l_perturbed,ij - l_paraphrase,i, (samples,) float64: above 0 where the truth is likelier.

    `paper` takes the mean over the wrong answers of all samples, as the published code does, so that a sample's ratio
    depends on which others are in the cell.
    """
    if mode == "paper":
        wrong = np.full(len(paraphrase_losses), np.mean(np.concatenate([np.asarray(one) for one in perturbed_losses])))
    else:
        wrong = np.array([np.mean(one) for one in perturbed_losses])
    return wrong - np.asarray(paraphrase_losses, dtype=np.float64)


def truth_score(log_ratio: float, cell: str) -> float:
    """Forget side: min(R, 1/R), 1 where truth and untruth are alike. Else max(0, 1 - 1/R), 1 where truth wins."""
    if cell.startswith("forget"):
        return math.exp(-abs(log_ratio))
    return -math.expm1(-max(0.0, log_ratio))


def model_utility(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """`model_utility`: the harmonic mean of Prob, ROUGE-L recall and truth ratio over `UTILITY_CELLS`. It is None where
    one of the twelve was not measured; `utility_missing` names those."""
    values: dict[str, float | None] = {}
    for cell in UTILITY_CELLS:
        kinds = figures.get(cell, {})
        # real_world may ask without a photo
        measured = next((one for one in (kinds.get("vqa"), kinds.get("qa")) if one and one.get("n_truth")), {})
        values |= {f"{cell} {name}": measured.get(name) for name in UTILITY_FIGURES}
    missing = [name for name, value in values.items() if value is None]
    return {"model_utility": None if missing else float(hmean(list(values.values()))), "utility_missing": missing}


def forget_quality(
    samples: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], mode: str
) -> dict[str, float]:
    """Two-sided Kolmogorov-Smirnov test of the forget set's truth ratios against those of a model that never saw it.

    `forget_quality` is the p-value (high: no difference found), `forget_quality_ks` the statistic. Both arguments are
    logged samples of the task `truth` of the cell `forget`.
    """

    def ratios(logged: Sequence[Mapping[str, Any]]) -> np.ndarray:
        losses = [sample["paraphrase_loss"] for sample in logged]
        return log_truth_ratios(losses, [sample["perturbed_losses"] for sample in logged], mode)

    # the test compares ranks, so the logarithms of the ratios serve as well
    test = ks_2samp(ratios(samples), ratios(reference))
    return {"forget_quality": float(test.pvalue), "forget_quality_ks": float(test.statistic)}
