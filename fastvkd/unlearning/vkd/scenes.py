"""Views in which the subject of a photo stands in other surroundings.

One photo shows a person in certain clothes before a certain background, and training on views of it alone learns to
forget these together. In a scene the middle of the photo, which is what a photo is of, stands on another photo, or the
photo shares the frame with another one. Legend: B images, N visual tokens, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN, _ELSEWHERE, _BESIDE = 0, 1, 2
_MIDDLE = (0.45, 0.8)  # sides of the middle that is kept, as shares of the photo's
_ASTRAY = 0.1  # how far the middle may lie off, as a share of a side
_SMALLER = (1.3, 1.8)  # beside another one: how many times smaller a photo is drawn, so that a half holds its middle
_SIDEWAYS, _UP, _DOWN = 0.15, 0.25, 0.15  # how far it is moved there, in halves of a side


@dataclass(frozen=True)
class Scenes:
    """Which images of a batch are set in what surroundings; made by `draw_scenes`.

    kind: (B,) int64. other: (B,) int64, the image that lends them. place: (B, 6) float64 in [0, 1), where things stand.
    left: (B,) bool, the half of an image that is beside another one.
    """

    kind: np.ndarray
    other: np.ndarray
    place: np.ndarray
    left: np.ndarray

    @property
    def moved(self) -> list[int]:
        """The images whose surroundings change."""
        return np.flatnonzero(self.kind != _PLAIN).tolist()

    def of(self, image: int) -> "Scenes":
        """The scene of one image alone."""
        one = slice(image, image + 1)
        return Scenes(self.kind[one], self.other[one], self.place[one], self.left[one])

    def apply(self, pixels: Tensor, others: Tensor) -> Tensor:
        """(B, 3, S, S) -> the same in their scenes; `others` (B, 3, S, S) lend the surroundings."""
        set_in = pixels.clone()
        for i in np.flatnonzero(self.kind == _ELSEWHERE):
            rows, columns = (_middle(pixels.shape[2 + k], *self.place[i, 2 * k : 2 * k + 2]) for k in (0, 1))
            set_in[i] = others[i]
            set_in[i, :, rows, columns] = pixels[i, :, rows, columns]
        beside = np.flatnonzero(self.kind == _BESIDE)
        if len(beside):
            place = self.place[beside]
            mine, theirs = _half(pixels[beside], place[:, :3]), _half(others[beside], place[:, 3:6])
            left = torch.from_numpy(self.left[beside])[:, None, None, None]
            first, second = torch.where(left, mine, theirs), torch.where(left, theirs, mine)
            set_in[beside] = torch.cat([first, second], -1)[..., : pixels.shape[-1]].to(set_in.dtype)
        return set_in

    def subject(self, image: int, tokens: int) -> Tensor | None:
        """(N,) bool: which of an image's tokens, a square grid in reading order, show its subject; None for all."""
        if self.kind[image] != _BESIDE:
            return None
        side = int(tokens**0.5)
        in_left = torch.arange(tokens) % side < side / 2
        return in_left if self.left[image] else ~in_left


def draw_scenes(
    seed: tuple[int, ...],
    positions: Sequence[int],
    total: int,
    movable: Sequence[bool],
    lenders: Sequence[int],
    elsewhere: float,
    beside: float,
) -> Scenes:
    """Scenes for a share `elsewhere` and a share `beside` of the `movable` images of a batch.

    Images stand at `positions` in the batch of all ranks, which has `total`, so a job draws what one process would.
    `lenders` are the images to draw surroundings from.
    """
    rng, of = np.random.default_rng([*seed, 19]), np.asarray(positions)
    chance, other = rng.random(total)[of], rng.integers(len(lenders), size=total)[of]
    place, left = rng.random((total, 6))[of], (rng.random(total) < 0.5)[of]
    kind = np.where(chance < elsewhere, _ELSEWHERE, np.where(chance < elsewhere + beside, _BESIDE, _PLAIN))
    return Scenes(np.where(movable, kind, _PLAIN), np.asarray(lenders)[other], place, left)


def _middle(size: int, length: float, offset: float) -> slice:
    """The middle of a side of `size` pixels, as long and as far off as two numbers in [0, 1) say."""
    kept = int(size * (_MIDDLE[0] + length * (_MIDDLE[1] - _MIDDLE[0])))
    start = int((size - kept) / 2 + (2 * offset - 1) * _ASTRAY * size)
    start = min(max(start, 0), size - kept)
    return slice(start, start + kept)


def _half(pixels: Tensor, place: np.ndarray) -> Tensor:
    """(b, 3, S, S) -> (b, 3, S, S / 2): the middle of each image, drawn smaller; its border goes on outside."""
    count, _, height, width = pixels.shape
    smaller = _SMALLER[0] + place[:, 0] * (_SMALLER[1] - _SMALLER[0])
    across, down = (2 * place[:, 1] - 1) * _SIDEWAYS, place[:, 2] * (_UP + _DOWN) - _UP
    affine = np.zeros((count, 2, 3))
    affine[:, 0, 0], affine[:, 1, 1] = smaller / 2, smaller
    affine[:, 0, 2], affine[:, 1, 2] = across, down
    shape = [count, 3, height, -(-width // 2)]
    grid = F.affine_grid(torch.from_numpy(affine).float(), shape, align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
