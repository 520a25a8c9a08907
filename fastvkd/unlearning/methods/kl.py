"""KL minimisation: gradient ascent on forget answers; on retained ones the whole answer distribution stays put."""

import torch
from torch import Tensor

from fastvkd.unlearning.answers import Answers


class Remembered:
    """Distributions at the answer positions of samples: the log-probabilities of a few tokens, in host memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # sample -> (tokens, k) log-probabilities and token ids

    def note(self, answers: Answers, log_p: Tensor, ids: Tensor) -> None:
        """log_p, ids: (n, k), of the tokens that are remembered at each of the batch's answer positions."""
        for position, sample in enumerate(answers.sample.tolist()):
            own = answers.row == position
            self._kept[sample] = (log_p[own].float().cpu(), ids[own].to("cpu", torch.int32))

    def divergence(self, answers: Answers, *, forget: bool) -> Tensor:
        """Mean KL(noted || answers) over the tokens of forget (or else of retained) answers; 0 (with a graph) where
        there are none."""
        assert answers.logits is not None
        samples = answers.samples_of(forget=forget)
        if not samples:
            return answers.logits.sum() * 0
        kept = zip(*(self._kept[sample] for sample in samples), strict=True)
        log_p, ids = (torch.cat(of).to(answers.logits.device) for of in kept)
        here = answers.logits[answers.answers_of(forget)].log_softmax(-1)
        return top_k_divergence(log_p, here, ids.long()).mean()


class KlMinimisation:
    """L = -lambda_forget l_f + lambda_retain (l_r + KL(p_0 || p)), KL being the mean over tokens of retained answers.

    p_0 is the frozen original's distribution over the next token. Its `top_k` most likely tokens at each answer
    position are remembered (float32 log-probability and int32 id, in host memory); all others count as one outcome. The
    KL divergence over these top_k + 1 outcomes is a lower bound, and exact for a vocabulary of at most `top_k`.

    Source: "KL-min" in TOFU (arXiv 2401.06121) and MLLMU-Bench (arXiv 2410.22108), there against a second model.
    """

    def __init__(self, top_k: int):
        self.top_k, self._original = top_k, Remembered()

    def remember(self, answers: Answers) -> None:
        """Note the original's distribution at the batch's answer positions."""
        assert answers.logits is not None
        log_p0 = answers.logits.log_softmax(-1)
        self._original.note(answers, *log_p0.topk(min(self.top_k, log_p0.shape[-1]), dim=-1))

    def __call__(self, answers: Answers) -> dict[str, Tensor]:
        return {
            "forget": -answers.cross_entropy(forget=True),
            "retain": answers.cross_entropy(forget=False) + self._original.divergence(answers, forget=False),
        }


def top_k_divergence(log_p0: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    """KL(p_0 || p) over the outcomes `ids` and "any other": (n,).

    log_p0: (n, k), of the tokens `ids` (n, k). log_p: (n, V). The rest counts nothing where the k tokens are the whole
    vocabulary, or all of p_0's mass to float32 precision.
    """
    chosen = log_p.gather(1, ids)
    divergence = (log_p0.exp() * (log_p0 - chosen)).sum(1)
    if ids.shape[1] == log_p.shape[1]:
        return divergence
    tiny = torch.finfo(torch.float32).eps
    rest0 = 1 - log_p0.exp().sum(1)
    # The mass of the others from their own log-probabilities: 1 - sum would cancel.
    others = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    safe = rest0.clamp(min=tiny)
    return divergence + torch.where(rest0 > tiny, safe * (safe.log() - others), 0.0)
