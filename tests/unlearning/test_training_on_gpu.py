"""Training on a GPU: every way to run a step trains as the plain one does, none waits for the device or grows."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvkd.engines.checkpoints import load_weights
from fastvkd.unlearning import loop
from fastvkd.unlearning.loop import Unlearned, unlearn

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EIGHT_BIT = pytest.param(
    {"sites": "llm:2", "optim": "adamw_8bit"},
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
)


def lines(run: Unlearned) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_a_gpu_trains_as_the_cpu_does(leaves_world, tmp_path: Path) -> None:
    on_cpu = unlearn(leaves_world.settings(tmp_path / "cpu", sites={"llm:2": 1, "vision:1": 1}))
    on_gpu = unlearn(leaves_world.settings(tmp_path / "gpu", sites={"llm:2": 1, "vision:1": 1}, device=DEVICE))
    for expected, found in zip(lines(on_cpu), lines(on_gpu), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("bf16", "overrides"),
    [
        (False, {"sites": "llm:2", "fused_frozen_ops": True}),
        (True, {"sites": "llm:2", "fused_frozen_ops": True}),
        (True, {"sites": "llm:2", "fused_frozen_ops": True, "compile": True}),
        pytest.param(True, *EIGHT_BIT.values, marks=EIGHT_BIT.marks),
    ],
    ids=str,
)
def test_every_way_to_run_a_step_trains_alike(leaves_world, tmp_path: Path, bf16: bool, overrides: dict) -> None:
    common = {"device": DEVICE, "bf16": bf16, "learning_rate": 1e-4}
    plain = unlearn(leaves_world.settings(tmp_path / "plain", **common, sites="llm:2"))
    other = unlearn(leaves_world.settings(tmp_path / "other", **common, **overrides))
    for expected, found in zip(lines(plain), lines(other), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-2 if bf16 else 1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-1 if bf16 else 1e-2)
    before, after = load_weights(plain.checkpoint), load_weights(other.checkpoint)
    # Four steps of Adam move a weight by at most 4e-4.
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3, rtol=1e-2) for name in before)


def watched(monkeypatch: pytest.MonkeyPatch, after: Callable[[int], None]) -> None:
    """Call `after(step)` at the end of every step, before its figures may be read."""

    class Watched(loop.Metrics):
        def record(self, step, *rest):
            super().record(step, *rest)
            after(step)

    monkeypatch.setattr(loop, "Metrics", Watched)


@pytest.mark.parametrize(
    "overrides",
    [
        {"sites": "llm:2"},
        {"sites": "llm:2", "bf16": True, "fused_frozen_ops": True, "compile": True},
        {"augment": True},
        EIGHT_BIT,
    ],
    ids=str,
)
def test_a_step_never_waits(leaves_world, tmp_path: Path, overrides: dict, monkeypatch) -> None:
    waits: list[int] = []
    watching = False

    def strict(step: int) -> None:
        """Waiting is an error from the third step on, until the figures are read."""
        nonlocal watching
        watching = 2 <= step < 6
        torch.cuda.set_sync_debug_mode("error" if watching else "default")

    synchronize = torch.cuda.synchronize  # CUDA's check does not see it

    def counted(*arguments):
        if watching:
            waits.append(1)
        synchronize(*arguments)

    monkeypatch.setattr(torch.cuda, "synchronize", counted)
    watched(monkeypatch, strict)
    try:
        settings = leaves_world.settings(tmp_path, device=DEVICE, max_steps=8, logging_steps=8, prefetch=2, **overrides)
        run = unlearn(settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.steps == 8 and not waits


@pytest.mark.parametrize("overrides", [{"sites": "llm:2", "bf16": True}, {"augment": True}, EIGHT_BIT], ids=str)
def test_memory_does_not_grow_over_twenty_steps(leaves_world, tmp_path: Path, overrides: dict, monkeypatch) -> None:
    held: list[int] = []
    watched(monkeypatch, lambda step: held.append(torch.cuda.memory_allocated()))
    unlearn(leaves_world.settings(tmp_path, device=DEVICE, max_steps=24, logging_steps=4, **overrides))
    # The same place in each logging period; batches made ahead of time are on the host.
    at_the_same_place = held[3::4][1:]
    assert len(at_the_same_place) == 5 and max(at_the_same_place) - min(at_the_same_place) <= 4096, held
