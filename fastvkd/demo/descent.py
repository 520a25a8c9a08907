"""The optimiser of the demo's trainings: Muon for the matrices inside the network, AdamW for all else."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A matrix of these has a row for each token, word or place: rows are learnt one by one, so they are AdamW's.
_TABLES = ("embed_tokens", "lm_head", "position_embedding", "pos_embed")


class Descent:
    """`steps` steps of Muon (arXiv 2502.16982) at `rate` and AdamW at `vector_rate`: linear warm-up, cosine to zero.
    `named` are the parameters, by their names in the model."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        *,
        steps: int,
        rate: float,
        vector_rate: float,
        warmup: int = 40,
    ):
        matrices = [p for name, p in named if p.ndim == 2 and not any(table in name for table in _TABLES)]
        inside = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in inside]
        self._parameters = [p for _, p in named]
        self._optimizers = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=vector_rate, weight_decay=0.02, betas=(0.9, 0.98)),
        ]
        self._schedulers = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, s / steps))) + 0.002)
            )
            for optimizer in self._optimizers
        ]

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, with gradients clipped to norm 1."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            scheduler.step()
