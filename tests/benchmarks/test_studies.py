"""A study is one file: it is run, resumed, told of its failures and made into a table by one command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import study

ROOT = Path(__file__).parents[2]
DUMMY = '''
"""Whether more people are to be forgotten on some seeds."""

from study import Study


def measure(world, variant):
    if variant == "broken" and not (world.out.parents[2] / "mended").exists():
        raise RuntimeError("a wheel came off")
    return {"people": len(world.cells[variant.replace("broken", "test")]), "rate": world.overrides.get("learning_rate")}


STUDY = Study(
    about="A dummy",
    variants={"forget": {}, "retain": {}, "broken": {}},
    row=measure,
    columns={
        "seed": lambda row: row["seed"],
        "set": lambda row: row["variant"],
        "people": lambda row: row["people"],
    },
)
'''


@pytest.fixture
def dummy(tmp_path: Path):
    """Runs the dummy study with more arguments; returns the process and the JSON."""
    file = tmp_path / "dummy.py"
    file.write_text(DUMMY)

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
        command = [sys.executable, "benchmarks/studies.py", str(file), "--size", "tiny", "--out", str(tmp_path / "out")]
        command += ["--json", str(tmp_path / "dummy.json"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        return done, json.loads((tmp_path / "dummy.json").read_text())

    return run


@pytest.mark.slow
def test_a_new_study_is_one_file(dummy, tmp_path: Path) -> None:
    """Three seeds, rows as they are measured, one that fails, and what a second run does with all that."""
    done, report = dummy("--seeds", "0", "1", "2", "--jobs", "2", "--override", "learning_rate=0.5")
    assert done.returncode == 1 and "a wheel came off" in done.stderr
    assert [(row["seed"], row["variant"]) for row in report["rows"]] == [
        (seed, variant) for seed in (0, 1, 2) for variant in ("forget", "retain")
    ]
    assert [(one["seed"], one["variant"]) for one in sorted(report["failed"], key=lambda one: one["seed"])] == [
        (seed, "broken") for seed in (0, 1, 2)
    ]
    assert report["device"] and report["versions"] and report["jobs"] == 2 and "dummy.py" in report["command"]
    assert {row["rate"] for row in report["rows"]} == {0.5} and all(row["people"] > 0 for row in report["rows"])
    text = (tmp_path / "dummy.md").read_text()
    assert text.startswith("# A dummy\n") and report["command"] in text and "| 2 | retain |" in text
    assert not (tmp_path / "out" / "processes").exists()

    (tmp_path / "out" / "mended").touch()
    done, again = dummy("--seeds", "0", "--only", "bro*", "for*", "--override", "learning_rate=0.5")
    assert done.returncode == 0 and "forget" not in done.stdout  # that row was there
    assert [row["variant"] for row in again["rows"]] == ["forget", "retain", "broken", *["forget", "retain"] * 2]
    assert [row for row in again["rows"] if row["variant"] != "broken"] == report["rows"] and again["failed"] == []
    assert "| 0 | broken |" in (tmp_path / "dummy.md").read_text()


def test_the_studies_are_those_of_the_folder() -> None:
    assert study.names() == [
        *("ablation", "cache_dtype", "end_to_end", "families", "mask", "methods", "metrics", "removal", "requests"),
        *("robustness", "seeds"),
    ]
    for name in study.names():
        found = study.find(name)
        assert found.about and found.variants and len(found.columns) > found.left
        for variant in found.variants:
            assert len(found.key("tiny", 0, variant, {})) == 16
    with pytest.raises(ValueError, match="no study 'other'; there are ablation, "):
        study.find("other")


def results_of(name: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{name.replace('_', '-')}.json"


@pytest.mark.parametrize("name", sorted({"methods", *(name for name in study.names() if results_of(name).exists())}))
def test_committed_rows_are_those_of_todays_recipe(name: str) -> None:
    """So that running the study again measures nothing twice."""
    report = json.loads(results_of(name).read_text())
    found = study.find(name)
    assert all(row["key"] == found.key(row["size"], row["seed"], row["variant"], {}) for row in report["rows"])


def test_no_script_is_named_like_a_package_that_libraries_probe_for() -> None:
    """A script's folder comes first in its import path."""
    names = {path.stem for path in (ROOT / "benchmarks").iterdir() if path.suffix == ".py" or path.is_dir()}
    probed = {"kernels", "methods", "mask", "profile", "queue", "requests", "typing", "types", "logging", "tokenize"}
    probed |= {"triton"}
    assert not names & (probed | set(sys.stdlib_module_names))
