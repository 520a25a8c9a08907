"""General sight before anybody is known: tower and projector learn to see the traits of strangers.

It stands for the pretrained tower that a real multimodal model starts from. A vanilla and a gold model of one seed
start from the same sight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvkd.demo.data import DemoData
from fastvkd.demo.descent import Descent
from fastvkd.demo.photos import Deck, beside, jitter
from fastvkd.demo.visual_input import VisualInput
from fastvkd.models.families import visual_parameters

_HIDDEN = -100  # a trait that a photo does not show


@dataclass(frozen=True)
class SightSchedule:
    """How long and how fast; a step sees `photos` photos of one stranger and `pairs` of two."""

    steps: int = 450
    photos: int = 32
    pairs: int = 32
    rate: float = 1e-2
    vector_rate: float = 6e-3


def teach_sight(
    visual: VisualInput,
    data: DemoData,
    schedule: SightSchedule,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """Train tower and projector of the model in place on what strangers' photos show, one or two in each.

    `progress(step, steps, loss)` is called after every step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 7])
    photos = [profile.photos[0] for profile in data.strangers]
    halves = [half.photo for half in data.halves if half.photo.source in data.traits]
    values = _values(list(data.traits.values()))
    alone, by_side = ([_truth(data.traits[p.source], values) for p in of] for of in (photos, halves))
    alone_truth, side_truth = torch.tensor(alone), torch.tensor(by_side)
    pixels, half_pixels = visual.pixels(photos), visual.pixels(halves)

    model, side = visual.model, visual.side
    width: int = model.get_output_embeddings().in_features
    count, none = len(values), torch.tensor([[_HIDDEN]])
    readouts = _Readouts(3 * [len(known) for known in values.values()], width, side)
    _prepare(*visual.patches(), torch.cat([pixels, half_pixels]))
    descent = Descent(
        [*visual_parameters(model, visual.family, "vision+projector"), *readouts.named_parameters()],
        steps=schedule.steps,
        rate=schedule.rate,
        vector_rate=schedule.vector_rate,
    )
    decks = Deck(len(photos), rng), Deck(len(halves), rng)
    model.train()
    for step in range(schedule.steps):
        one = decks[0].draw(schedule.photos)
        left, right = decks[1].draw(schedule.pairs), decks[1].draw(schedule.pairs)
        batch = torch.cat([pixels[one], beside(half_pixels[left], half_pixels[right])])
        # Three groups of traits: of a lone person, of the one on the left, of the one on the right.
        truth = torch.cat(
            [
                torch.cat([alone_truth[one], none.expand(len(one), 2 * count)], dim=1),
                torch.cat([none.expand(len(left), count), side_truth[left], side_truth[right]], dim=1),
            ]
        )
        features, _ = visual.features(jitter(batch, rng))
        # Where more tokens follow the photo's grid, they show it again.
        loss = readouts.loss(features.view(len(batch), -1, width)[:, : side * side], truth)
        descent.step(loss)
        progress(step + 1, schedule.steps, float(loss.detach()))
    model.eval()


def _values(shown: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Every trait and the values that it has."""
    return {name: sorted({row[name] for row in shown if name in row}) for name in sorted(set().union(*shown))}


def _truth(shown: dict[str, str], values: dict[str, list[str]]) -> list[int]:
    return [known.index(shown[name]) if name in shown else _HIDDEN for name, known in values.items()]


class _Readouts(nn.Module):
    """Reads every trait from visual tokens (B, T, H) by one attention query a trait, and from each token where it
    stands: the language model has to tell left from right by that."""

    def __init__(self, values: Sequence[int], width: int, side: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(values), width) / math.sqrt(width))
        self.key = nn.Linear(width, width, bias=False)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in values)
        self.place = nn.Linear(width, 2 * side)
        self._side = side

    def loss(self, tokens: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy of the traits that `truth` (B, traits) does not hide, and half that of the places."""
        weights = torch.einsum("ah,bth->bat", self.queries, self.key(tokens)).softmax(-1)
        read = torch.einsum("bat,bth->bah", weights, tokens)
        wrong = [
            F.cross_entropy(head(read[:, a]), truth[:, a], ignore_index=_HIDDEN, reduction="sum")
            for a, head in enumerate(self.heads)
        ]
        traits = torch.stack(wrong).sum() / (truth != _HIDDEN).sum()
        rows, columns = self.place(tokens).flatten(0, 1).split(self._side, dim=-1)
        place = torch.arange(self._side * self._side).repeat(len(tokens))
        where = F.cross_entropy(rows, place // self._side) + F.cross_entropy(columns, place % self._side)
        return traits + 0.5 * where


@torch.no_grad()
def _prepare(convolution: Any, table: Tensor | None, pixels: Tensor, strength: float = 0.5) -> None:
    """A start from which a small tower learns several times faster: patches enter by their principal components,
    positions are sines and cosines of row and column, as large as what the patches bring. (CLIP's own start gives
    positions a twentieth of that.)"""
    width, size = convolution.weight.shape[0], convolution.kernel_size[-1]
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)
    variances, components = torch.linalg.eigh(torch.cov(patches.T).double())
    scale = strength / (variances + 0.003 * variances.mean()).sqrt()
    filters = (components * scale).T.flip(0)[:width]
    convolution.weight.zero_()
    if convolution.weight.ndim == 5:  # over frames, of which a photo has as many alike
        frames = convolution.kernel_size[0]
        filters = (filters / frames).view(-1, 3, 1, size, size).expand(-1, -1, frames, -1, -1)
    convolution.weight[: len(filters)] = filters.reshape(-1, *convolution.weight.shape[1:]).float()
    if table is None:
        return

    side = pixels.shape[-1] // size
    speed = torch.exp(torch.linspace(0, math.log(side), width // 4)) * math.pi
    waves = (torch.arange(side) / side)[:, None] * speed
    line = torch.cat([waves.sin(), waves.cos()], dim=1)  # (side, width / 2)
    grid = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], dim=-1).flatten(0, 1)
    mixed = grid[:, torch.randperm(width, generator=torch.Generator().manual_seed(0))]
    table.view(-1, width)[-len(mixed) :] = strength * 1.4 * mixed
