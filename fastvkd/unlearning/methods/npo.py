"""Negative preference optimisation: forget answers shall become less likely than under the original."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvkd.unlearning.answers import Answers, mean_where


class NegativePreference:
    """L = -lambda_forget (2 / beta) mean log sigmoid(-beta (log p - log p_0)) + lambda_retain l_r.

    log p is that of a whole answer. p_0 is the frozen original, of which one number for each forget answer is
    remembered. As beta goes to 0 the forget term becomes gradient ascent.

    Source: Zhang et al., arXiv 2404.05868 (eq. 3); with the retain term their "NPO + retain".
    """

    def __init__(self, beta: float):
        self.beta = beta
        self._log_p0: dict[int, float] = {}

    def remember(self, answers: Answers) -> None:
        """Note the original's log-probability of the batch's answers."""
        self._log_p0.update(zip(answers.sample.tolist(), answers.log_probabilities().tolist(), strict=True))

    def __call__(self, answers: Answers) -> dict[str, Tensor]:
        log_p = answers.log_probabilities()
        known = [
            self._log_p0[s] if f else 0.0
            for s, f in zip(answers.sample.tolist(), answers.is_forget.tolist(), strict=True)
        ]
        margin = -self.beta * (log_p - torch.tensor(known, device=log_p.device))
        terms = -(2 / self.beta) * F.logsigmoid(margin)
        return {"forget": mean_where(terms, answers.is_forget), "retain": answers.cross_entropy(forget=False)}
