"""Gradient ascent: raise the loss on forget answers, with nothing to hold the rest."""

from torch import Tensor

from fastvkd.unlearning.answers import Answers


def gradient_ascent(answers: Answers) -> dict[str, Tensor]:
    """L = -l_f, with l_f the mean token cross-entropy of forget answers.

    Source: Thudi et al., "Unrolling SGD" (2022); "GA" in MLLMU-Bench (arXiv 2410.22108) and TOFU (arXiv 2401.06121).
    """
    return {"forget": -answers.cross_entropy(forget=True)}
