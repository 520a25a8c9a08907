"""The table of faults counts what tests have noted, and nothing where one fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reliability
import tables

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
from ledger import note

def test_two() -> None:
    note("kill", "a", "resumed", 3)
    note("kill", "b", "refused")

@pytest.mark.fault("full disk")
class TestDisk:
    @pytest.mark.parametrize("size", ["1::[2]", "3"])
    def test_size(self, size: str) -> None:
        assert size != {bad!r}

    def test_skipped(self) -> None:
        pytest.skip("no disk here")
"""


def suite(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: str = "") -> None:
    """A repository with tests that note, as ours do."""
    for name in ("tests/conftest.py", "tests/launching.py", "tests/reliability/ledger.py", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "tests" / "test_some.py").write_text(TESTS.format(bad=bad))
    (folder / "tests" / "test_other.py").write_text("def test_that_is_not_run(): assert False\n")
    monkeypatch.setattr(reliability, "ROOT", folder)


def test_cases_are_counted_by_fault_and_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite(tmp_path, monkeypatch)
    rows = reliability.measure([])
    assert [row[:3] for row in rows] == [
        ["full disk", "as wanted", 2],
        ["full disk", "skipped", 1],
        ["kill", "refused", 1],
        ["kill", "resumed", 3],
    ]


def test_nothing_is_counted_where_a_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite(tmp_path, monkeypatch, bad="3")
    with pytest.raises(SystemExit, match="nothing is counted where a test fails"):
        reliability.measure([])


def test_seconds_are_those_of_the_tests_that_noted() -> None:
    report = (
        '<testsuites><testsuite><testcase classname="tests.a.test_b" name="test_c[x::y]" time="2.5"/>'
        '<testcase classname="tests.a.test_b.TestD" name="test_e" time="1.0"/></testsuite></testsuites>'
    )
    lines = [
        {"fault": "kill", "outcome": "resumed", "count": 1, "test": "tests/a/test_b.py::test_c[x::y] (call)"},
        {"fault": "kill", "outcome": "resumed", "count": 1, "test": "tests/a/test_b.py::TestD::test_e (call)"},
    ]
    assert reliability.counted(lines, reliability.seconds_by_test(report)) == [["kill", "resumed", 2, 3.5]]


def test_the_document_names_every_fault_of_the_table() -> None:
    report = json.loads((tables.RESULTS / "reliability.json").read_text())
    text = (ROOT / "docs" / "reliability.md").read_text()
    told = text.partition("<!-- table:")[0]
    faults = {row[0] for row in report["tables"]["faults"]["rows"]}
    assert faults and all(f"*{fault[0].upper()}{fault[1:]}*" in told for fault in faults), faults
    assert all(row[1] != "failed" for row in report["tables"]["faults"]["rows"])


def test_the_files_that_note_are_found() -> None:
    found = {file.name for file in reliability.noting_files(ROOT / "tests")}
    assert {"test_broken_folders.py", "test_fuzz.py", "test_bad_input.py", "test_damaged_data.py"} <= found
    done = subprocess.run(
        [sys.executable, "benchmarks/reliability.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--proofs" in done.stdout
