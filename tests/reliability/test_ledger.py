"""The ledger keeps every line, also those that two processes write at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ledger import note


def test_nothing_is_written_where_no_ledger_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVKD_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)
    note("kill", "at step 3", "resumed")
    assert not list(tmp_path.iterdir())


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    script = "import sys; from ledger import note\nfor i in range(500): note(sys.argv[1], str(i), 'x' * 100, i)"
    environment = os.environ | {"FASTVKD_LEDGER": str(file), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script]
    writers = [subprocess.Popen([*command, fault], env=environment) for fault in ("kill", "full disk")]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for fault in ("kill", "full disk"):
        mine = [(line["case"], line["outcome"], line["count"]) for line in lines if line["fault"] == fault]
        assert mine == [(str(i), "x" * 100, i) for i in range(500)]
