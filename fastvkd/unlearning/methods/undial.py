"""UNDIAL: self-distillation from the original with the logit of the right token lowered."""

import torch
from torch import Tensor

from fastvkd.unlearning.answers import Answers
from fastvkd.unlearning.methods.kl import Remembered


class AdjustedSelfDistillation:
    """L = lambda_forget mean KL(q || p) over the tokens of forget answers + lambda_retain l_r.

    q = softmax(z_0 - strength * onehot(y)): the frozen original's distribution at an answer position, with the logit of
    the right token y lowered. The paper's cross-entropy H(q, p) differs from KL by the entropy of q, a constant. Of q
    the right token and the `top_k` - 1 likeliest others are remembered, in host memory; all others count as one
    outcome, as in `KlMinimisation`. With a strength of 0 q is the original and the forget term begins at zero.

    Source: Dong et al., arXiv 2402.10052, who take strengths of 3, 10 and 30 and no retain term (lambda_retain = 0).
    """

    def __init__(self, strength: float, top_k: int):
        self.strength, self.top_k, self._adjusted = strength, top_k, Remembered()

    def remember(self, answers: Answers) -> None:
        """Note the adjusted distribution at the batch's answer positions."""
        assert answers.logits is not None
        right = answers.tokens[:, None]
        lowered = torch.full_like(right, -self.strength, dtype=torch.float64)
        log_q = answers.logits.double().scatter_add(1, right, lowered).log_softmax(-1)
        others = log_q.scatter(1, right, -torch.inf).topk(min(self.top_k, log_q.shape[1]) - 1, dim=1).indices
        ids = torch.cat([right, others], 1)
        self._adjusted.note(answers, log_q.gather(1, ids), ids)

    def __call__(self, answers: Answers) -> dict[str, Tensor]:
        return {
            "forget": self._adjusted.divergence(answers, forget=True),
            "retain": answers.cross_entropy(forget=False),
        }
