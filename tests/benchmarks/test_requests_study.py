"""The study of requests that keep coming: a chain of models in which nobody is asked about twice, row by row."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from random_world import world_over
from study import requests
from world import World

from fastvkd.data import mllmu
from fastvkd.engines.requests import requests_of
from fastvkd.evaluation.benchmarks import BENCHMARKS
from fastvkd.models.folder import identify_base

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(world, tmp_path: Path, monkeypatch) -> World:
    """A `World` over the shared random model, with three requests that train for a moment."""
    short = {"max_steps": 2, "watch_steps": 0, "warmup_steps": 0, "learning_rate": 1e-3, "auxiliary_images": 4}
    short |= {"forget_target": "noise", "elsewhere": 0.0, "beside": 0.0, "per_device_train_batch_size": 6}
    monkeypatch.setitem(requests.SHORT, "tiny", short)
    monkeypatch.setitem(requests.REQUESTS, "tiny", (1, 2, 1))
    monkeypatch.setattr(requests, "SAMPLES", 12)
    monkeypatch.setattr(requests, "gold", lambda world, everybody: world.vanilla)
    corrected = BENCHMARKS["mllmu"]["corrected"]  # a random model never ends an answer
    monkeypatch.setitem(BENCHMARKS["mllmu"], "corrected", replace(corrected, max_new_tokens=3))
    return world_over(world, tmp_path)


def rows_of(world: World, *variants: str) -> list[dict]:
    return [{"size": "tiny", "seed": 0, "variant": name, **requests.measure(world, name)} for name in variants]


@pytest.mark.slow
def test_each_request_starts_from_the_model_after_the_one_before(small: World, monkeypatch) -> None:
    rows = rows_of(small, "request 3", "before", "request 1", "request 2", "at once", "gold")
    by_name = {row["variant"]: row for row in rows}
    asking = requests.asking(small)
    assert [len(one) for one in asking] == [1, 2, 1] and len({entity for one in asking for entity in one}) == 4
    assert asking[0][0] in {profile.entity for profile in small.cells["forget"]}
    found = requests_of(requests.after(small, 3))
    assert [len(one.entities) for one in found] == [1, 2, 1]
    everybody = mllmu.read_split(small.folder, "Full_Set")
    told = [{one.entity for one in everybody if request.told_by(one)} for request in found]
    assert told == [set(one) for one in asking]

    assert [by_name[f"request {n}"]["asked"] for n in (1, 2, 3)] == [[1], [1, 2], [1, 2, 1]]
    assert by_name["before"]["drift"] == 0 == by_name["before"]["step"] and by_name["before"]["seconds"] is None
    first, second = by_name["request 1"], by_name["request 2"]
    assert first["drift"] == first["step"] > 0 and second["step"] != second["drift"] > 0
    assert "drift" not in by_name["gold"] and by_name["at once"]["asked"] == [1, 2, 1]
    for row in rows:
        assert set(row["people"]) == {entity for one in asking for entity in one}
        assert row["vqa"].keys() == {"retain", "realworld"} and set(row["description"]) == {
            "test",
            "retain",
            "stranger",
        }
    assert by_name["request 3"]["seconds"] > 0 and json.loads(json.dumps(rows)) == rows

    # A row that is asked for again finds its model.
    before = identify_base(requests.after(small, 3)).fingerprint
    monkeypatch.setattr(requests, "unlearn", lambda *_: pytest.fail("the model is there"))
    assert rows_of(small, "request 3")[0] == by_name["request 3"]
    assert identify_base(requests.after(small, 3)).fingerprint == before
    lines = requests.STUDY.table({"rows": rows})
    assert len(lines) == 4 + len(rows) and len({line.count("|") for line in lines[2:]}) == 1


def test_the_table_tells_earlier_people_from_new_ones_and_from_those_to_come() -> None:
    def person(request: int, accuracy: float) -> dict:
        return {"request": request, "accuracy": accuracy, "right": accuracy / 2, "misnamed": 0.1, "n": 4}

    row = {
        "seed": 0,
        "variant": "request 2",
        "asked": [1, 1],
        "people": {"b": person(2, 0.5), "a": person(1, 0.25), "c": person(3, 1.0)},
        "vqa": {"retain": 0.9},
        "retained": {"right": 0.8},
        "strangers": {"misnamed": 0.2},
        "description": {"test": 0.7, "retain": 0.6},
        "drift": 0.05,
        "step": 0.04,
        "seconds": 3.2,
    }
    (line,) = requests.STUDY.table({"rows": [row]})[-1:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("0", "request 2", "2", "50.0 / 25.0 / 10.0", "25.0 / 12.5 / 10.0", "25 50 (100)", "20.0"),
        *("90.0", "80.0", "", "70.0 /  / 60.0", "5.0 (4.0)", "3"),
    ]
    (line,) = requests.STUDY.table({"rows": [row | {"variant": "at once", "asked": [1, 1, 1]}]})[-1:]
    assert "| 58.3 / 29.2 / 10.0 | - | 25 50 100 |" in line


@pytest.mark.proof
def test_the_tiny_study_runs_from_the_command_line(tmp_path: Path) -> None:
    """Every row in a minute or two, on the demo's own tiny world, a gold model of its own included."""
    command = [sys.executable, "benchmarks/studies.py", "requests", "--size", "tiny", "--out", str(tmp_path / "out")]
    command += ["--json", str(tmp_path / "requests.json")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "requests.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(requests.VARIANTS)
    before, *others = rows
    assert before["drift"] == 0 and all(row["drift"] > 0 for row in others if row["variant"] != "gold")
    known = [one["accuracy"] for one in before["people"].values()]
    unknown = [one["accuracy"] for one in rows[-1]["people"].values()]
    assert sum(unknown) < sum(known)  # the gold model never saw them
    assert "| 0 | request 8 | 8 |" in (tmp_path / "requests.md").read_text()
