"""A process that is killed, or asked to end, at any moment: the same command once more ends as if nothing had been.

What must be the same: weights and moments by their bytes, every figure, every file of an export. The base model's
folder never changes, and nothing that bears the mark of something unfinished is left.
"""

import random
import signal

import pytest
from forked import Fault
from jobs import PARTS, Bench
from ledger import note

QUICK = ("export", "purge", "steer", "report")
LONG = ("train", "eval")
LONGEST = ("stranger", "attack", "demo-data")  # their points are tried by draw
COMMANDS = tuple(name for name in PARTS if name != "demo-data")  # which is called without the command line
WRITING = tuple(name for name in PARTS if name not in ("train", "stranger", "purge"))  # purge only deletes
MOMENTS = 20


def kill(bench: Bench, name: str, fault: Fault) -> bool:
    """Kill a part and go on; returns whether the kill came before the part's end."""
    straight, _ = bench.straight(name)
    folder, ended = bench.disturbed(name, fault)
    by = signal.SIGXFSZ if fault.kind == "torn" else signal.SIGKILL
    killed = ended.code == -by
    if fault.kind == "kill" and fault.after is None:
        assert killed, f"{name}: point {fault.at} was not reached: {ended.err}"
    else:
        assert killed or ended.code == straight.code, ended.err
    bench.goes_on(name, folder)
    what = "SIGKILL within a write" if fault.kind == "torn" else "SIGKILL"
    if killed:
        note(what, name, "same result")
    return killed


def points(bench: Bench, name: str) -> int:
    return len(bench.straight(name)[0].points)


@pytest.mark.parametrize("name", ("train", "stranger", "export", "eval", "attack", "purge"))
def test_a_kill_at_a_random_point_changes_nothing(bench: Bench, name: str) -> None:
    assert kill(bench, name, Fault("kill", random.Random(f"point of {name}").randint(2, points(bench, name))))


@pytest.mark.proof
@pytest.mark.parametrize("name", (*QUICK, *LONG))
def test_a_kill_at_any_point_changes_nothing(bench: Bench, name: str) -> None:
    for at in range(1, points(bench, name) + 1):
        assert kill(bench, name, Fault("kill", at))


@pytest.mark.proof
@pytest.mark.parametrize("name", LONGEST)
def test_a_kill_at_drawn_points_of_a_long_part_changes_nothing(bench: Bench, name: str) -> None:
    count = points(bench, name)
    for at in sorted(random.Random(f"points of {name}").sample(range(1, count + 1), min(8, count))):
        assert kill(bench, name, Fault("kill", at))


@pytest.mark.proof
def test_kills_at_random_moments_change_nothing(bench: Bench) -> None:
    """Wherever the process is: in Python, in torch, in the system."""
    drawn, killed = random.Random("moments"), 0
    for number in range(MOMENTS + 10):
        name = PARTS[number % len(PARTS)]
        killed += kill(bench, name, Fault("kill", after=drawn.random() * bench.straight(name)[0].seconds))
        if killed == MOMENTS:
            break
    assert killed == MOMENTS, "too many kills came after the end"


@pytest.mark.parametrize("name", ("train", *(pytest.param(name, marks=pytest.mark.proof) for name in WRITING)))
def test_a_kill_within_a_write_changes_nothing(bench: Bench, name: str) -> None:
    """Files end in the middle of a line, a tensor or a page.

    Not every draw kills: nothing may be written any more that is as long.
    """
    drawn, killed, wanted = random.Random(f"torn {name}"), 0, 1 if name == "train" else 3
    for _ in range(10 * wanted):
        fault = Fault("torn", drawn.randint(1, points(bench, name)), room=drawn.choice((1, 100, 1500)))
        killed += kill(bench, name, fault)
        if killed == wanted:
            break
    assert killed == wanted, "too few kills came within a write"


@pytest.mark.parametrize(
    ("name", "times"),
    [("train", 1), ("export", 1), *(pytest.param(name, 3, marks=pytest.mark.proof) for name in COMMANDS)],
)
def test_who_is_asked_to_end_says_so_and_goes_on_later(bench: Bench, name: str, times: int) -> None:
    """SIGTERM: a training run saves and ends well, everything else ends with one line; or it was about to be done."""
    straight, _ = bench.straight(name)
    drawn = random.Random(f"term {name} {times}")
    for _ in range(times):
        folder, ended = bench.disturbed(name, Fault("term", drawn.randint(1, points(bench, name))))
        saved, said = "SIGTERM: saving at step" in ended.err, "fastvkd: ended by SIGTERM; what was" in ended.err
        assert "Traceback" not in ended.err
        assert ended.code == (128 + signal.SIGTERM if said else straight.code), ended.err
        assert not (saved and said)
        bench.goes_on(name, folder)
        note("SIGTERM", name, "saved, same result" if saved else "one line, same result" if said else "done already")
