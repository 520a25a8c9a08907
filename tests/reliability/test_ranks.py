"""A rank that dies takes the others with it, soon and by its name, instead of leaving them to wait for it."""

import time
from pathlib import Path

import psutil
import pytest
from jobs import Bench
from launching import TRAIN, kill_tree, ranks_of, start, wait_until
from ledger import note

from fastvkd.engines.checkpoints import find_latest


@pytest.mark.slow
@pytest.mark.proof
def test_the_others_end_within_a_minute_of_a_ranks_death(bench: Bench, tmp_path: Path) -> None:
    _, *told = map(str, bench.part("train").arguments(tmp_path))
    told += ["engine=deepspeed", "deepspeed=zero2", "max_steps=100000"]
    launcher = start(TRAIN, *told, log=tmp_path / "log")
    try:
        wait_until(lambda: find_latest(tmp_path / "run") is not None, launcher)
        family = psutil.Process(launcher.pid).children(recursive=True)
        dead = ranks_of(launcher)[1]
        dead.kill()
        died = time.monotonic()
        code = launcher.wait(timeout=60)
        seconds = time.monotonic() - died
    finally:
        kill_tree(launcher)
    said = (tmp_path / "log").read_text()
    assert (code != 0 and f"process {dead.pid}" in said.lower()) or f"subprocess {dead.pid}" in said, said[-3000:]
    assert "--local_rank=1" in said.split("Killing subprocess")[-1], said[-3000:]
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    note("a rank that dies", "two ranks, ZeRO-2", f"the job ended after {seconds:.0f} s and named it")
