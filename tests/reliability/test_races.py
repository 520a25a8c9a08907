"""Two commands that begin at the same moment and share a folder: each ends as it would alone, or says who was first."""

import pytest
from jobs import Bench, leftovers
from ledger import note


def test_two_runs_fill_one_cache(bench: Bench) -> None:
    folder = bench.folder("shared-cache")
    part = bench.part("train")
    for name in ("one", "other"):
        (folder / name).mkdir()
    _, expected = bench.straight("train")
    cache = f"cache_dir={folder}/cache"
    commands = [[*part.arguments(folder / name), cache] for name in ("one", "other")]
    ended = bench.server.together(commands, folder)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    for name in ("one", "other"):
        found = part.result(folder / name)
        assert found["weights"] == expected["weights"] and found["metrics"] == expected["metrics"]
    assert not leftovers(folder)
    note("two runs at once", "one cache_dir", "both as alone")


@pytest.mark.parametrize("name", ("train", "export", "eval"))
def test_of_two_commands_with_one_output_folder_one_is_refused(bench: Bench, name: str) -> None:
    folder, part = bench.folder(f"shared-{name}"), bench.part(name)
    straight, expected = bench.straight(name)
    part.before(folder)
    ended = bench.server.together([part.arguments(folder)] * 2, folder)
    refused = [one for one in ended if one.code == 2]
    assert len(refused) < 2 and all(one.code in (2, straight.code) for one in ended), [one.err for one in ended]
    for one in refused:  # the other one held the folder, or was done with it
        assert "another process writes here" in one.error or "exists and is not an empty folder" in one.error
    assert part.result(folder) == expected
    assert not leftovers(folder)
    note("two runs at once", f"one output folder, {name}", "one refused" if refused else "one after the other")
