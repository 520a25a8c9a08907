"""A run of thousands of steps needs no more memory and no more open files at its end than at its beginning."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from ledger import note

from fastvkd.unlearning.loop import unlearn

STEPS, WARM = 5_000, 500
MOST_BYTES_A_STEP = 100  # 5,000 steps: half a megabyte; one float32 batch of the tiny world's features is 20 kB


def growth(figures: list[tuple[int, int]]) -> float:
    """The slope of a line through (step, figure)."""
    steps, values = np.array(figures, dtype=float).T
    return float(np.polyfit(steps, values, 1)[0])


@pytest.mark.proof
def test_memory_and_open_files_stay_flat_over_thousands_of_steps(world, tmp_path: Path) -> None:
    own = psutil.Process()
    memory: list[tuple[int, int]] = []
    files: list[tuple[int, int]] = []

    def look(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        if phase == "unlearn" and done > WARM:
            memory.append((done, own.memory_info().rss))
            files.append((done, own.num_fds()))

    short = dict(max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-5, logging_steps=50)
    settings = world.settings(tmp_path / "out", **short)
    assert unlearn(settings, progress=look).finished
    assert len(memory) == (STEPS - WARM) // 50
    slope = growth(memory)
    assert abs(growth(files)) < 1e-3 and files[-1][1] <= files[0][1], files
    assert slope < MOST_BYTES_A_STEP, memory
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    note("a long run", f"{STEPS} steps", f"memory {slope:+.0f} bytes a step, open files constant")
