"""The teacher cache: what is written can be read back by whoever shares the folder, and ranks share the work."""

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvkd.models.visual_path import SiteFeatures
from fastvkd.unlearning.vkd.teacher import FeatureCache, fill_caches

pytestmark = pytest.mark.fault("shared or damaged teacher cache")

KEYS = [f"image-{i}" for i in range(9)]  # with two ranks and batches of two, one has none left in the last round


def features_of(position: int) -> torch.Tensor:
    """(N, 4): as many rows as the image's number asks for."""
    return torch.full((1 + position % 3, 4), float(position))


class Batch:
    def __init__(self, positions: Sequence[int]):
        self.positions = list(positions)

    def to(self, device):
        return self


def path(batch: Batch) -> dict[str, SiteFeatures]:
    blocks = [features_of(p) for p in batch.positions]
    counts = torch.tensor([len(block) for block in blocks])
    hidden = torch.cat(blocks)
    images = torch.arange(len(blocks)).repeat_interleave(counts)
    return {"projector": SiteFeatures(hidden, torch.arange(len(hidden)), images)}


def cache(folder: Path, rank: int = 0, dtype: str = "float32") -> FeatureCache:
    return FeatureCache(folder, site="projector", dtype=dtype, ingredients={"weights": "test"}, rank=rank)


def fill(made: FeatureCache, keys: list[str], all_ranks_run: bool = False) -> list[list[int]]:
    """Fills the cache and returns the positions of each batch that this rank ran."""
    ran: list[list[int]] = []

    def run(batch: Batch):
        ran.append(batch.positions)
        return path(batch)

    images = {key: position for position, key in enumerate(keys)}
    fill_caches({"projector": made}, run, images, Batch, torch.device("cpu"), batch_size=2, all_ranks_run=all_ranks_run)
    return ran


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    made = cache(tmp_path, dtype=dtype)
    assert fill(made, KEYS[:5]) == [[0, 1], [2, 3], [4]]
    assert fill(made, KEYS) == [[5, 6], [7, 8]]  # what is there is not computed again
    for found in (made, cache(tmp_path, dtype=dtype)):
        for i, key in enumerate(KEYS):
            assert torch.equal(found.features(key).float(), features_of(i))


def data_file(made: FeatureCache) -> Path:
    return next(made.folder.glob("features-*.bin"))


def test_what_an_interrupted_run_left_behind_is_passed_over(tmp_path: Path) -> None:
    made = cache(tmp_path)
    fill(made, KEYS[:3])
    with data_file(made).open("ab") as file:
        file.write(b"half a row")
    for again in (made, cache(tmp_path)):
        fill(again, KEYS)
        assert all(torch.equal(again.features(key), features_of(i)) for i, key in enumerate(KEYS))


def test_runs_that_share_a_folder_at_the_same_time_read_their_own(tmp_path: Path) -> None:
    """Both open it empty, and each adds while the other does, the same image too."""
    one, other = cache(tmp_path), cache(tmp_path)
    one.add({"a": torch.full((2, 4), 1.0)})
    other.add({"b": torch.full((2, 4), 2.0), "a": torch.full((2, 4), 1.0)})
    one.add({"c": torch.full((3, 4), 3.0)})
    assert one.features("a").unique().tolist() == [1.0] and one.features("c").shape == (3, 4)
    third = cache(tmp_path)
    assert third.missing(["a", "b", "c", "d"]) == ["d"]
    assert [third.features(key).unique().tolist() for key in "abc"] == [[1.0], [2.0], [3.0]]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def change_index(made: FeatureCache, change: Callable[[dict], dict]) -> None:
    file = next(made.folder.glob("index-*.json"))
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


DAMAGE = {
    "flipped": lambda made: flip(data_file(made)),
    "truncated": lambda made: data_file(made).write_bytes(data_file(made).read_bytes()[:40]),
    "gone": lambda made: data_file(made).unlink(),
    "index": lambda made: next(made.folder.glob("index-*.json")).write_text('{"width": 4, "pl'),
    "index of no rows": lambda made: change_index(made, lambda index: index | {"width": 1.5}),
    "index of too many rows": lambda made: change_index(
        made, lambda index: index | {"places": {key: [0, 10**30, told] for key, (*_, told) in index["places"].items()}}
    ),
    "index of another kind": lambda made: next(made.folder.glob("index-*.json")).write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_computed_again(tmp_path: Path, damage: str) -> None:
    made = cache(tmp_path)
    fill(made, KEYS)
    DAMAGE[damage](made)
    for runs in (1, 0):  # what was mended stays so
        again = cache(tmp_path)
        assert bool(fill(again, KEYS)) == bool(runs)
        assert all(torch.equal(again.features(key), features_of(i)) for i, key in enumerate(KEYS))


def one_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for all_ranks_run in (False, True):
        made = cache(Path(folder, f"all-{all_ranks_run}"), rank)
        ran = fill(made, KEYS, all_ranks_run)
        whole = all(torch.equal(made.features(key), features_of(i)) for i, key in enumerate(KEYS))
        found[str(all_ranks_run)] = {"ran": ran, "whole": whole}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_work_and_read_all_of_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert all(found["whole"] for rank in (first, second) for found in rank.values())
    assert first["False"]["ran"] == first["True"]["ran"] == [[0, 1], [4, 5], [8]]
    assert second["False"]["ran"] == [[2, 3], [6, 7]]
    assert second["True"]["ran"] == [[2, 3], [6, 7], [8]]  # runs along, writes nothing
    # one process reads what two wrote, and asks for nothing
    alone = cache(tmp_path / "all-True")
    assert fill(alone, KEYS) == [] and torch.equal(alone.features(KEYS[3]), features_of(3))
