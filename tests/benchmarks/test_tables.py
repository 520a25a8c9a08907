"""Every table in a document is what the JSON files in benchmarks/results say."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import study
import tables

ROOT = Path(__file__).parents[2]
PLAIN = {"tables": {"mine": {"head": ["a", "b", "c"], "rows": [["x", "y", 1.5]], "left": 2}}}


def test_every_document_is_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_is_seen_and_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "some.md"
    document.write_text("Before.\n" + tables.empty_block("step-tiny-cpu.json", "step") + "After.\n")
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    text = document.read_text()
    assert text.startswith("Before.\n") and text.endswith("<!-- end -->\nAfter.\n")
    assert "| 112.88 |" in text and "It need not equal the ratio of the medians" in text
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()
    document.write_text(text.replace("112.88", "112.89"))
    with pytest.raises(SystemExit, match=r"docs/some.md: not what benchmarks/results say"):
        tables.main()
    assert "112.89" in document.read_text()


def test_a_table_of_plain_data_fills_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text(json.dumps(PLAIN))
    block = "<!-- table: note.json mine -->\n{}<!-- end -->\n"
    made = "| a | b | c |\n| --- | --- | ---: |\n| x | y | 1.5 |\n"
    shown = "    <!-- table: note.json shown as an example -->\n"
    text = shown + block.format("old\n\n| lines |\n") + "between\n" + block.format("")
    assert tables.fill(text, tmp_path) == shown + block.format(made) + "between\n" + block.format(made)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table: note.json mine -->\nnever closed\n", "not closed"),
        ("<!-- table: note.json mine -->\n<!-- table: note.json mine -->\n<!-- end -->\n", "not closed"),
        ("<!-- table: other.json mine -->\n<!-- end -->\n", "other.json is not there"),
        (
            "<!-- table: note.json yours -->\n<!-- end -->\n",
            "no table 'yours': in the file are .'mine'.*'step'",
        ),
    ],
)
def test_a_block_that_cannot_be_filled_says_why(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "note.json").write_text(json.dumps(PLAIN))
    with pytest.raises(tables.TableError, match=problem):
        tables.fill(text, tmp_path)


@pytest.mark.parametrize("file", sorted(tables.RESULTS.rglob("*.json")), ids=lambda file: file.name)
def test_all_results_are_shown_somewhere(file: Path) -> None:
    name = file.relative_to(tables.RESULTS)
    shown = [path for path in tables.documents() if f"<!-- table: {name} " in path.read_text()]
    assert shown, f"no document has a table of {name}"


def test_studies_have_a_document_with_their_origin_that_the_readme_links() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    for name in study.names():
        file = name.replace("_", "-")
        measured = [f for f in (file, f"closed-world/{file}") if (tables.RESULTS / f"{f}.json").exists()]
        assert measured, f"{name} was never measured"
        for place in measured:
            report = json.loads((tables.RESULTS / f"{place}.json").read_text())
            text = (tables.RESULTS / f"{place}.md").read_text()
            assert report["device"] in text and report["date"] in text and report["command"] in text
            assert shlex.split(report["command"])[:3] == ["python", "benchmarks/studies.py", name]
            assert f"(results/{place}.md)" in readme


def test_a_documents_own_copy_of_a_studys_table_is_the_whole_and_current_one() -> None:
    """Also where it stands outside a block."""

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if not re.fullmatch(r"[| :-]*-[| :-]*", line)]

    for name in study.names():
        file = tables.RESULTS / f"{name.replace('_', '-')}.json"
        if not file.exists():
            continue  # not yet measured in today's world
        report = json.loads(file.read_text())
        last = "\n".join(study.find(name).table(report)).rpartition("\n\n")[2]  # behind a note, which may hold tables
        head, *rows = [line for line in lines(last) if line.startswith("|")]
        for path in tables.documents():
            text = lines(path.read_text())
            for number in (n for n, line in enumerate(text) if line == head):
                assert text[number + 1 : number + 1 + len(rows)] == rows, f"{path.name}: not the table of {name}"
