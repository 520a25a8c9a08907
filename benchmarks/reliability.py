"""What becomes of faults: runs the tests that note each case in a ledger, and counts the cases by how they ended.

    python benchmarks/reliability.py             # what `make test` has of them
    python benchmarks/reliability.py --proofs    # and what `make proofs` has: all of it

Writes benchmarks/results/reliability.json, from which `tables.py` makes the table of docs/reliability.md. Nothing is
written where a test fails. Seconds are those of the tests, without what they share.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tables

ROOT = Path(__file__).resolve().parents[1]
HEAD = ["fault", "how it ended", "cases", "seconds"]
Ledger = Iterable[Mapping[str, Any]]


def noting_files(tests: Path) -> list[Path]:
    """The test files that have a line for the ledger: by `note`, or by the marker `fault`. Those of benchmarks look at
    what is written here, and have none."""
    words = ("from ledger import note", "pytest.mark.fault(")
    files = sorted(file for file in tests.rglob("test_*.py") if "benchmarks" not in file.relative_to(tests).parts)
    return [file for file in files if any(word in file.read_text() for word in words)]


def seconds_by_test(report: str) -> dict[str, float]:
    """Of a JUnit report, by `tests.folder.test_file.Class.name`."""
    root = ElementTree.fromstring(report)  # noqa: S314 - pytest has just written it for us
    return {f"{case.get('classname')}.{case.get('name')}": float(case.get("time", 0)) for case in root.iter("testcase")}


def in_report(test: str) -> str:
    """The name that a JUnit report gives to the test that pytest's PYTEST_CURRENT_TEST names."""
    path, brackets, parameters = test.rpartition(" (")[0].partition("[")
    file, *names = path.split("::")
    return ".".join([file.removesuffix(".py").replace("/", "."), *names]) + brackets + parameters


def counted(ledger: Ledger, seconds: Mapping[str, float]) -> list[list[Any]]:
    """A row for each fault and outcome: how many cases, and their share of the seconds of the tests that noted them."""
    lines = list(ledger)
    noted = Counter(line["test"] for line in lines)
    cases: dict[tuple[str, str], int] = defaultdict(int)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for line in lines:
        key = line["fault"], line["outcome"]
        cases[key] += line["count"]
        spent[key] += seconds.get(in_report(line["test"]), 0.0) / noted[line["test"]]
    return [[*key, cases[key], round(spent[key], 1)] for key in sorted(cases)]


def measure(selected: list[str]) -> list[list[Any]]:
    """Run the tests and count. Exits where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        ledger, report = Path(folder) / "ledger.jsonl", Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *selected, f"--junitxml={report}"]
        command += ["-o", "junit_duration_report=call", *map(str, noting_files(ROOT / "tests"))]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTVKD_LEDGER": str(ledger)})
        if done.returncode != 0:
            sys.exit(f"pytest ended with {done.returncode}: nothing is counted where a test fails")
        lines = [json.loads(line) for line in ledger.read_text().split("\n") if line]
        return counted(lines, seconds_by_test(report.read_text()))


def main() -> None:
    from fastvkd.environment import measured_on  # late: it asks torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--proofs", action="store_true", help="also the further cases of `make proofs`")
    parser.add_argument("--json", type=Path, default=tables.RESULTS / "reliability.json", help="where to write")
    arguments = parser.parse_args()
    rows = measure([] if arguments.proofs else ["-m", "not proof"])
    told = shlex.join(["python", "benchmarks/reliability.py", *sys.argv[1:]])
    table = {"head": HEAD, "rows": rows, "left": 2}
    result = measured_on("cpu") | {"command": told, "tables": {"faults": table}}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
