"""What keeps the loop fast, and that none of it changes a result: prefetching, compiled blocks, no waits, no growth."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastvkd.engines.checkpoints import load_weights
from fastvkd.errors import SettingsError
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.phases import PHASES
from fastvkd.unlearning.prefetch import prefetched

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "cudaStreamSynchronize")


def lines(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_prefetched_results_are_those_of_calling_in_order() -> None:
    for depth in (0, 1, 3):
        with prefetched(lambda step: step * step, range(3, 20), depth) as results:
            assert list(results) == [step * step for step in range(3, 20)]


def test_no_more_is_built_ahead_than_asked_and_leaving_ends_the_thread() -> None:
    built: list[int] = []
    reached = threading.Event()

    def load(step: int) -> int:
        built.append(step)
        if step == 3:
            reached.set()
        return step

    before = threading.active_count()
    with prefetched(load, range(100), 2) as results:
        assert next(results) == 0
        assert reached.wait(10)  # one taken, two ready, one more in the thread's hands
    assert built == [0, 1, 2, 3]
    assert threading.active_count() == before


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise SettingsError("image 2 is broken")
        return step

    with prefetched(load, range(5), 2) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(SettingsError, match="image 2"):
            next(results)


@pytest.mark.parametrize("augment", [False, True])
def test_prefetching_changes_no_bit(world, tmp_path: Path, augment: bool) -> None:
    ahead = unlearn(world.settings(tmp_path / "ahead", augment=augment, prefetch=3))
    each = unlearn(world.settings(tmp_path / "each", augment=augment, prefetch=0))
    expected, found = load_weights(each.checkpoint), load_weights(ahead.checkpoint)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{"sites": {"llm:2": 1, "vision:1": 1}}, {"augment": True}])
def test_compiled_blocks_change_nothing_but_time(world, tmp_path: Path, overrides: dict) -> None:
    plain = unlearn(world.settings(tmp_path / "plain", max_steps=2, **overrides))
    compiled = unlearn(world.settings(tmp_path / "compiled", max_steps=2, compile=True, **overrides))
    for a, b in zip(lines(plain.metrics), lines(compiled.metrics), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(a["grad_norm"], 1e-3)
    before, after = load_weights(plain.checkpoint), load_weights(compiled.checkpoint)
    moved = [name for name in before if not torch.allclose(before[name], after[name], rtol=1e-3, atol=2e-4)]
    assert not moved  # Adam moves a weight by 2e-3 in two steps


def test_every_step_says_how_long_each_phase_took(world, tmp_path: Path) -> None:
    for line in lines(unlearn(world.settings(tmp_path, gradient_accumulation_steps=2)).metrics):
        spent = [line[f"{phase}_seconds"] for phase in PHASES]
        assert all(value >= 0 for value in spent) and line["forward_seconds"] > 0 and line["backward_seconds"] > 0
        assert sum(spent) < 60


def test_a_profile_of_the_run_is_written(world, tmp_path: Path) -> None:
    unlearn(world.settings(tmp_path, profile=True, max_steps=5))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert all(names.count(phase) == 3 for phase in PHASES)  # updates 3 to 5
    with pytest.raises(SettingsError, match="updates 3 to 5"):
        world.settings(tmp_path, profile=True, max_steps=2)


def inside(event, *names: str) -> bool:
    while event is not None:
        if any(event.name.startswith(name) for name in names):
            return True
        event = event.cpu_parent
    return False


@pytest.mark.parametrize("overrides", [{"sites": "llm:2"}, {"augment": True}, {"sites": "vision:1"}])
def test_nothing_in_a_step_waits_for_the_device(world, tmp_path: Path, overrides: dict) -> None:
    """On a GPU these operations would stop the host; the kernels' twins and the plain optimiser run here only."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        unlearn(world.settings(tmp_path, max_steps=3, logging_steps=3, **overrides))
    waits = [event for event in profiler.events() if event.name in WAITS]
    in_step = [event for event in waits if inside(event, *PHASES[1:])]
    found = [event for event in in_step if not inside(event, "fastvkd::", "Optimizer.step")]
    assert waits and not found, sorted({f"{e.name} in {e.cpu_parent.name}" for e in found})


def test_memory_does_not_grow_from_step_to_step(world, tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        unlearn(world.settings(tmp_path, max_steps=9, logging_steps=3, sites="llm:2", prefetch=0))
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    level, at_end_of_step = 0, []
    ends = sorted(e.start_ns() + e.duration_ns() for e in events if e.name() == "step")
    for event in events:
        while len(at_end_of_step) < len(ends) and event.start_ns() > ends[len(at_end_of_step)]:
            at_end_of_step.append(level)
        if event.name() == "[memory]":
            level += event.nbytes()
    assert len(at_end_of_step) == 9
    # The same place in each of three logging periods; the figures kept for logging are a few bytes each.
    assert max(at_end_of_step[3:]) - min(at_end_of_step[3:]) < 10_000, at_end_of_step
