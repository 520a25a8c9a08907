"""A disk that is full at any write: one line, exit code 2, nothing half-written under a final name, and once there is
space the same command gives the same result."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from forked import Ended, Fault, Server
from jobs import PARTS, Bench, leftovers
from ledger import note
from PIL import Image
from safetensors import safe_open

from fastvkd.engines.checkpoints import verify_checkpoint

WRITING = tuple(name for name in PARTS if name != "purge")  # which only deletes
PAGE = 4096
ROOMS = (None, 0, 100, 1500)  # bytes that there still are


def whole(folder: Path) -> None:
    """Every file under a final name can be read to its end. Of a log of lines the last one may be cut off."""
    unfinished = set(leftovers(folder))
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(name == left or name.startswith(f"{left}/") for left in unfinished):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            *lines, _ = path.read_text().split("\n")
            assert all(map(json.loads, lines)), name
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(key).numel() for key in file.keys()), name  # noqa: SIM118 - not a dict
        elif path.suffix == ".parquet":
            assert pq.read_table(path).num_rows, name
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), name
    for checkpoint in folder.rglob("checkpoint-*"):
        if ".unfinished" not in str(checkpoint.relative_to(folder)):
            verify_checkpoint(checkpoint)


def refused(ended: Ended, folder: Path, straight: Ended) -> bool:
    """Whether the command was refused for want of space, in one line; else it must have ended as it does with space."""
    whole(folder)
    if ended.code == straight.code:
        return False
    assert any(said in ended.error for said in ("no space left", "no space on disk", "free space")), ended.error
    return True


def fill(bench: Bench, name: str, at: int, room: int | None) -> None:
    straight, _ = bench.straight(name)
    folder, ended = bench.disturbed(name, Fault("full", at, room=room))
    was_refused = refused(ended, folder, straight)
    bench.goes_on(name, folder)
    if was_refused:
        note("full disk", name, "one line, same result later")


def points(bench: Bench, name: str) -> int:
    return len(bench.straight(name)[0].points)


@pytest.mark.parametrize("name", ("train", "export", "eval", "demo-data"))
def test_a_disk_that_is_full_from_a_random_point_on(bench: Bench, name: str) -> None:
    drawn = random.Random(f"full {name}")
    fill(bench, name, drawn.randint(1, points(bench, name) // 2), drawn.choice(ROOMS))


@pytest.mark.proof
@pytest.mark.parametrize("name", WRITING)
def test_a_disk_that_is_full_from_any_point_on(bench: Bench, name: str) -> None:
    """With no room for a new file, or with room for a part of one."""
    drawn, count = random.Random(f"every {name}"), points(bench, name)
    most = {"stranger": 6, "attack": 6, "eval": 8, "train": 24}.get(name, count)
    for at in sorted(drawn.sample(range(1, count + 1), min(most, count))):
        fill(bench, name, at, drawn.choice(ROOMS))


@pytest.mark.parametrize(
    ("name", "sizes"), [("train", 1), *(pytest.param(name, 6, marks=pytest.mark.proof) for name in WRITING)]
)
def test_a_small_disk_that_is_really_full(bench: Bench, server: Server, name: str, sizes: int) -> None:
    """A file system of so many pages, from one up to as many as are not quite enough."""
    if not server.has_disk:
        pytest.skip("this system lets nobody mount a small disk")
    straight, _ = bench.straight(name)
    part, inside = bench.part(name), server.given_disk
    drawn = random.Random(f"pages of {name} {sizes}")
    needed = 0
    for _ in range(sizes):
        shutil.rmtree(server.disk / "work", ignore_errors=True)
        server.resize(1 << 26)
        (server.disk / "work").mkdir()
        part.before(server.disk / "work")
        there = used(server.disk)
        if not needed:  # how much it takes
            assert server.run(part.arguments(inside / "work"), inside / "work").code == straight.code
            needed = used(server.disk) - there
            shutil.rmtree(server.disk / "work")
            (server.disk / "work").mkdir()
            part.before(server.disk / "work")
        server.resize((used(server.disk) // PAGE + drawn.randrange(1, max(2, needed // PAGE))) * PAGE)
        ended = server.run(part.arguments(inside / "work"), inside / "work")
        was_refused = refused(ended, server.disk / "work", straight)
        server.resize(1 << 26)
        bench.goes_on(name, inside / "work", seen=server.disk / "work")
        if was_refused:
            note("full disk, a real one", name, "one line, same result later")


def used(disk: Path) -> int:
    return shutil.disk_usage(disk).used
