"""The order in which training visits images and questions: stateless, so that any rank or a resumed run finds it."""

import itertools
import os
from collections.abc import Sequence

import numpy as np

from fastvkd.settings import Settings


def world_size_of(settings: Settings) -> int:
    """Number of processes that draw from the data together; DeepSpeed's launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1")) if settings.engine == "deepspeed" else 1


def draw(population: int, start: int, count: int, seed: Sequence[int]) -> list[int]:
    """Entries start ... start + count of an endless sequence of permutations of range(population).

    It has no state: any rank or a resumed run can ask for any part of it.
    """
    drawn: list[int] = []
    position = start
    while len(drawn) < count:
        turn, offset = divmod(position, population)
        order = np.random.default_rng([*seed, turn]).permutation(population)
        take = order[offset : offset + count - len(drawn)]
        drawn += [int(i) for i in take]
        position += len(take)
    return drawn


class BatchPlan:
    """Which images make up step `t` on rank `r`: as many of each kind on every rank and step.

    `auxiliary` images take `auxiliary_share` of the retained part of a batch and count as retained.
    """

    def __init__(
        self,
        forget: Sequence[int],
        retain: Sequence[int],
        *,
        batch_size: int,
        forget_share: float,
        seed: int,
        auxiliary: Sequence[int] = (),
        auxiliary_share: float = 0.0,
    ):
        self.forget, self.retain, self.auxiliary, self.seed = list(forget), list(retain), list(auxiliary), seed
        self.forget_per_rank = min(batch_size - 1, max(1, round(batch_size * forget_share)))
        kept = batch_size - self.forget_per_rank
        self.auxiliary_per_rank = round(kept * auxiliary_share) if self.auxiliary else 0
        self.retain_per_rank = kept - self.auxiliary_per_rank

    def indices(self, step: int, rank: int, world_size: int) -> tuple[list[int], list[int]]:
        """(forget, retained) image indices of micro-batch `step`, counted from 0."""

        def part(of: list[int], each: int, salt: int) -> list[int]:
            if not each:
                return []
            chosen = draw(len(of), (step * world_size + rank) * each, each, (self.seed, salt))
            return [of[i] for i in chosen]

        retained = part(self.retain, self.retain_per_rank, 12) + part(self.auxiliary, self.auxiliary_per_rank, 17)
        return part(self.forget, self.forget_per_rank, 11), retained

    def visited(self, steps: int, world_size: int) -> set[int]:
        """The images that any rank takes in the first `steps` micro-batches."""
        seen: set[int] = set()
        everything = len(self.forget) + len(self.retain) + (len(self.auxiliary) if self.auxiliary_per_rank else 0)
        for step, rank in itertools.product(range(steps), range(world_size)):
            for part in self.indices(step, rank, world_size):
                seen.update(part)
            if len(seen) == everything:
                break
        return seen

    def positions(self, rank: int, world_size: int) -> list[int]:
        """Where the images of `indices` stand in the batch of one process that takes all ranks' images at once."""
        found: list[int] = []
        start = 0
        for each in (self.forget_per_rank, self.retain_per_rank, self.auxiliary_per_rank):
            found += range(start + rank * each, start + (rank + 1) * each)
            start += world_size * each
        return found
