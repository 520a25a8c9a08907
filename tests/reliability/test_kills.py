"""A process that is killed, or asked to end, at any moment: the same command once more ends as if nothing had been."""

import random
import signal

import pytest
from forked import Fault
from jobs import PARTS, Bench
from ledger import note


def kill(bench: Bench, name: str, fault: Fault) -> None:
    """Disturb a part and go on."""
    folder, ended = bench.disturbed(name, fault)
    by = {"kill": signal.SIGKILL, "torn": signal.SIGXFSZ}[fault.kind]
    straight, _ = bench.straight(name)
    killed = ended.code == -by
    if fault.kind == "kill" and fault.after is None:
        assert killed, f"point {fault.at} was not reached: {ended.err}"
    else:  # too late, or a write that was within its limit
        assert killed or ended.code == straight.code, ended.err
    bench.goes_on(name, folder)
    note("SIGKILL" if fault.kind == "kill" else "SIGKILL within a write", name, "same result" if killed else "too late")


@pytest.mark.parametrize("name", PARTS)
def test_straight(bench: Bench, name: str) -> None:
    ended, result = bench.straight(name)
    print(name, ended.seconds, len(ended.points))
    for i, p in enumerate(ended.points):
        print("  ", i + 1, p)


@pytest.mark.parametrize("name", PARTS)
def test_killed(bench: Bench, name: str) -> None:
    points = len(bench.straight(name)[0].points)
    bad = []
    for at in range(1, points + 1):
        try:
            kill(bench, name, Fault("kill", at))
        except AssertionError as e:
            bad.append((at, bench.straight(name)[0].points[at - 1], str(e)[:1500]))
    for b in bad:
        print(*b)
    assert not bad
