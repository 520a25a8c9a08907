"""Gradient difference: gradient ascent on forget answers, descent on retained ones."""

from torch import Tensor

from fastvkd.unlearning.answers import Answers


def gradient_difference(answers: Answers) -> dict[str, Tensor]:
    """L = -lambda_forget l_f + lambda_retain l_r, with l the mean token cross-entropy.

    Source: Liu et al., "Continual Learning and Private Unlearning" (2022); "GD" or "GA + retain" in MLLMU-Bench.
    """
    return {"forget": -answers.cross_entropy(forget=True), "retain": answers.cross_entropy(forget=False)}
