"""Logs of samples: separators within texts, damaged lines named, and nothing damaged taken for finished work."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_pairing import choice

from fastvkd.attacks.journal import Journal
from fastvkd.cli import main
from fastvkd.errors import DataError
from fastvkd.evaluation.pairing import paired_tests, read_samples
from fastvkd.evaluation.protocol import _Log
from fastvkd.evaluation.run import _reference
from fastvkd.files import json_lines
from fastvkd.reporting.collect import _lines

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
CLOSING = {"finished": "key", "cell": "forget", "kind": "vqa"}


def logged(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """As an evaluation writes them."""
    folder.mkdir()
    _Log(folder / "samples.jsonl", set()).add(samples, CLOSING)
    return folder


def odd(correct: bool) -> dict[str, Any]:
    return choice("ann", "1", correct) | {"question": SEPARATORS, "options": {"A": SEPARATORS, "B": "Oslo"}}


def test_separators_within_texts_do_not_end_a_line(tmp_path: Path, capsys) -> None:
    base, other = logged(tmp_path / "base", [odd(True)]), logged(tmp_path / "other", [odd(False)])
    assert SEPARATORS[1] in (base / "samples.jsonl").read_text()
    tests = paired_tests(("base", read_samples(base)), ("other", read_samples(other)))
    assert tests[0].difference == -1.0
    assert main(["compare", str(base), str(other), "--paired"]) == 0
    assert len(_reference("mllmu", "corrected", base)) == 2
    assert _lines(base / "samples.jsonl") == [odd(True), *json_lines_of(base)[1:]]


def json_lines_of(folder: Path) -> list[dict[str, Any]]:
    return [line for _, line in json_lines(folder / "samples.jsonl", DataError, "write it again")]


NO_LIKELIHOOD = {key: value for key, value in choice("ann", "2", True).items() if key != "log_likelihood"}
DAMAGED: dict[str, str] = {
    **{
        f"no {key}": json.dumps({k: v for k, v in choice("ann", "2", True).items() if k != key})
        for key in ("cell", "task", "kind", "entity", "question", "correct", "answer", "tokens")
    },
    "a number for a name": json.dumps(choice("ann", "2", True) | {"entity": 3}),
    "a list for a task": json.dumps(choice("ann", "2", True) | {"task": ["choice"]}),
    "a list for options": json.dumps(choice("ann", "2", True) | {"options": ["Rome"]}),
    "not a number": json.dumps(choice("ann", "2", True) | {"log_likelihood": {"A": float("nan"), "B": 0.0}}),
    "no end": json.dumps(choice("ann", "2", True) | {"log_likelihood": {"A": float("inf"), "B": 0.0}}),
    "a text for a number": json.dumps(choice("ann", "2", True) | {"log_likelihood": {"A": "1", "B": 0.0}}),
    "no tokens": json.dumps(choice("ann", "2", True) | {"tokens": {"A": 1, "B": 0}}),
    "an answer that is no option": json.dumps(choice("ann", "2", True) | {"answer": "Z"}),
    "right by a text": json.dumps(choice("ann", "2", True) | {"correct": "true"}),
    "a generation without figures": json.dumps(choice("ann", "2", True) | {"task": "generation"}),
    "a list": "[1]",
    "a text": '"x"',
    "cut off": json.dumps(choice("ann", "2", True))[:-9],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_sample_is_named_by_file_and_line(tmp_path: Path, capsys, kind: str) -> None:
    base, other = logged(tmp_path / "base", [choice("ann", "1", True)]), logged(tmp_path / "other", [])
    log = other / "samples.jsonl"
    log.write_text(json.dumps(choice("ann", "1", True)) + "\n" + DAMAGED[kind] + "\n")
    assert main(["compare", str(base), str(other), "--paired"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{log}:2: " in said and "\n" not in said and "Traceback" not in said


def test_samples_without_likelihoods_are_paired(tmp_path: Path) -> None:
    base = logged(tmp_path / "base", [NO_LIKELIHOOD])
    assert [test.figure for test in paired_tests(("a", read_samples(base)), ("b", read_samples(base)))] == [
        "forget VQA acc"
    ]


def test_a_damaged_line_of_a_log_is_not_finished_work(tmp_path: Path) -> None:
    log = logged(tmp_path / "x", [odd(True), choice("bob", "2", True)]) / "samples.jsonl"
    whole = log.read_bytes()
    assert list(_Log(log, {"key"}).finished) == ["key"] and log.read_bytes() == whole
    samples = whole.rindex(b'{"finished"')
    for place in range(0, samples, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        log.write_bytes(damaged)
        assert not _Log(log, {"key"}).finished and log.read_bytes() == b"", place
    log.write_bytes(b"\n".join(whole.split(b"\n")[1:]))  # a line is gone
    assert not _Log(log, {"key"}).finished


def test_a_cell_of_a_version_before_is_kept_unless_a_line_of_it_cannot_be_read(tmp_path: Path) -> None:
    log = tmp_path / "samples.jsonl"
    before = [json.dumps(line) for line in (odd(True), choice("bob", "2", True), CLOSING)]
    log.write_text("\n".join(before) + "\n")
    assert len(_Log(log, {"key"}).finished["key"]) == 2
    log.write_text("\n".join([before[0], before[1][:-1], before[2]]) + "\n")
    assert not _Log(log, {"key"}).finished


def test_a_damaged_line_of_a_journal_is_measured_again(tmp_path: Path) -> None:
    file, facts = tmp_path / "attacks.jsonl", {"kind": "plain"}
    assert Journal(file).kept(facts, lambda: {"accuracy": [0.25, 1e-9]}) == {"accuracy": [0.25, 1e-9]}
    whole = file.read_bytes()
    for place in range(len(whole) - 1):
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            again = Journal(file).kept(facts, lambda: "again")
            assert again in ("again", {"accuracy": [0.25, 1e-9]})
    file.write_bytes(whole.replace(b"0.25", b"0.75"))
    assert Journal(file).kept(facts, lambda: "again") == "again"
    row = json.loads(whole)
    del row["digest"]
    file.write_text(json.dumps(row) + "\n")  # of a version before
    assert Journal(file).kept(facts, lambda: "again") == {"accuracy": [0.25, 1e-9]}
