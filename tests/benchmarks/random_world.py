"""A benchmark's `World` over the tests' random model: nothing has to be trained, and it is at chance from the start."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from study import methods
from world import World

from fastvkd.data.sources import evaluation_cells
from fastvkd.demo.run import SIZES
from fastvkd.evaluation.benchmarks import BENCHMARKS


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


def brief_world(world: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same with a gold model, which is the same one too, and with methods that take a few steps and questions."""
    short = {"ends": "max_steps", "max_steps": 21, "learning_rate": 1e-3, "stranger": {"steps": 2}}
    spec: dict[str, Any] = {"overrides": {**short, "auxiliary_images": 4}, "max_samples": 12}
    small = world_over(world, out, **spec)
    small.gold = world.model
    for name, value in {"STEPS": 4, "EVERY": 2, "BATCH": 4, "GRID_SAMPLES": 8, "ATTACK_SAMPLES": 8}.items():
        monkeypatch.setattr(methods, name, value)
    # A random model never ends an answer.
    corrected = BENCHMARKS["mllmu"]["corrected"]
    monkeypatch.setitem(BENCHMARKS["mllmu"], "corrected", dataclasses.replace(corrected, max_new_tokens=3))
    return small
