"""KL minimisation: gradient ascent on forget answers; on retained ones the whole answer distribution stays put."""

import torch
from torch import Tensor

from fastvkd.unlearning.answers import Answers


class KlMinimisation:
    """L = -lambda_forget l_f + lambda_retain (l_r + KL(p_0 || p)), KL being the mean over tokens of retained answers.

    p_0 is the frozen original's distribution over the next token. Its `top_k` most likely tokens at each answer
    position are remembered (float32 log-probability and int32 id, in host memory); all others count as one outcome. The
    KL divergence over these top_k + 1 outcomes is a lower bound, and exact for a vocabulary of at most `top_k`.

    Source: "KL-min" in TOFU (arXiv 2401.06121) and MLLMU-Bench (arXiv 2410.22108), there against a second model.
    """

    def __init__(self, top_k: int):
        self.top_k = top_k
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # sample -> (tokens, k) log-probabilities and token ids

    def remember(self, answers: Answers) -> None:
        """Note the original's distribution at the batch's answer positions."""
        assert answers.logits is not None
        log_p0 = answers.logits.log_softmax(-1)
        values, ids = log_p0.topk(min(self.top_k, log_p0.shape[-1]), dim=-1)
        for position, sample in enumerate(answers.sample.tolist()):
            own = answers.row == position
            self._kept[sample] = (values[own].cpu(), ids[own].to("cpu", torch.int32))

    def __call__(self, answers: Answers) -> dict[str, Tensor]:
        assert answers.logits is not None
        retained = answers.answers_of(forget=False)
        divergence = answers.logits.sum() * 0
        samples = answers.retained_samples()
        if samples:
            kept = [self._kept[s] for s in samples]
            log_p0 = torch.cat([values for values, _ in kept]).to(answers.logits.device)
            ids = torch.cat([ids for _, ids in kept]).to(answers.logits.device, torch.int64)
            divergence = top_k_divergence(log_p0, answers.logits[retained].log_softmax(-1), ids).mean()
        return {
            "forget": -answers.cross_entropy(forget=True),
            "retain": answers.cross_entropy(forget=False) + divergence,
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
