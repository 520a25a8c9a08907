"""RMU: steer the representation of forget questions to a random direction, hold that of retained ones."""

import torch
from torch import Tensor

from fastvkd.unlearning.answers import Answers, mean_where


class RepresentationMisdirection:
    """L = lambda_forget mean ||h_k - c u||^2 over forget + lambda_retain mean ||h_k - h_k^0||^2 over retained tokens,
    per dimension.

    h_k is the hidden state after LLM layer k at answer positions; only k layers are loaded. u is a random unit vector
    and c `scale`. h^0 is the frozen original's state, remembered in host memory for retained answers. The paper takes
    all tokens of a text, layer 7 of 32 and c = 6.5 for Zephyr-7B, and trains the weights of layers k-2 ... k.

    Source: Li et al., "The WMDP Benchmark", arXiv 2403.03218 (section 4).
    """

    def __init__(self, scale: float, seed: int):
        self.scale, self.seed = scale, seed
        self._original: dict[int, Tensor] = {}
        self._direction: Tensor | None = None

    def remember(self, answers: Answers) -> None:
        """Note the original's hidden states at the batch's answer positions."""
        for position, sample in enumerate(answers.sample.tolist()):
            self._original[sample] = answers.hidden[answers.row == position].cpu()

    def direction(self, width: int) -> Tensor:
        """The random unit vector u (width,), the same for the same seed; each entry drawn uniformly from [0, 1)."""
        u = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return u / u.norm()

    def __call__(self, answers: Answers) -> dict[str, Tensor]:
        hidden, forget = answers.hidden.float(), answers.answers_of(forget=True)
        if self._direction is None:
            self._direction = (self.scale * self.direction(hidden.shape[1])).to(hidden.device)
        away = (hidden - self._direction).square().mean(1)
        samples = answers.samples_of(forget=False)
        drift = hidden.sum() * 0
        if samples:
            original = torch.cat([self._original[s] for s in samples]).to(hidden.device, torch.float32)
            drift = (hidden[~forget] - original).square().mean()
        return {"forget": mean_where(away, forget), "retain": drift}
