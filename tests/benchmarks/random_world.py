"""A benchmark's `World` over the tests' random model: nothing has to be trained, and it is at chance from the start."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from world import World

from fastvkd.data.sources import evaluation_cells
from fastvkd.demo.run import SIZES


def world_over(world: Any, out: Path, *, relearning_steps: tuple[int, ...] = (0, 1), **spec: Any) -> World:
    """`world` is the fixture; `spec` changes the tiny demo's `Size`, `relearning_steps` that of its attacks."""
    made = World.__new__(World)
    made.seed, made.out, made.shared, made.vanilla, made.folder = 0, out, out, world.model, world.data
    made.size, made.overrides = "tiny", {}
    attacks = dataclasses.replace(SIZES["tiny"].attacks, relearning_steps=relearning_steps)
    made.spec = dataclasses.replace(SIZES["tiny"], attacks=attacks, **spec)
    made.data = SimpleNamespace(forget_split=world.forget_split, retain_split=world.retain_split)
    made.cells = evaluation_cells(str(world.data), world.forget_split, world.retain_split)
    return made
