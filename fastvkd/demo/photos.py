"""Photos as the demo's trainings draw them: each comes up once before any comes up twice, moved and lit a little."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def beside(left: Tensor, right: Tensor) -> Tensor:
    """(N, 3, S, S): the middle halves of the photos `left` and `right` (N, 3, S, S) beside each other, as
    `fastvkd.demo.people.side_by_side` has them."""
    half = left.shape[-1] // 2
    middle = slice(half // 2, half // 2 + half)
    return torch.cat([left[..., middle], right[..., middle]], dim=-1)


def jitter(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift each image by up to three pixels, replicating the border, and vary its brightness."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    shifts = rng.integers(0, 7, (len(pixels), 2))
    moved = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, shifts, strict=True)])
    light = torch.from_numpy(rng.uniform(0.85, 1.15, (len(pixels), 1, 1, 1)).astype(np.float32))
    return moved * light


class Deck:
    """Draws indices so that all come up once before any comes up twice."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng, self.cards = size, rng, np.empty(0, dtype=np.int64)

    def draw(self, count: int) -> np.ndarray:
        while len(self.cards) < count:
            self.cards = np.concatenate([self.cards, self.rng.permutation(self.size)])
        drawn, self.cards = self.cards[:count], self.cards[count:]
        return drawn
