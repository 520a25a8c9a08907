"""The documents: functions and files that they name exist, and condensed tables say what the full ones say."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RESULTS / "notebook.md"]
NAMED = re.compile(r"`((?:fastvkd|kernels|benchmarks)/[\w/]+\.py):(\w+(?:\.\w+)*)`")
NOTEBOOK = json.loads((RESULTS / "notebook.json").read_text())["tables"]


def defined(source: str, name: str) -> bool:
    """Whether a module defines `name` at its top; `A.b` is b in the class A."""
    body = ast.parse(source).body
    for part in name.split("."):
        found = None
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == part for target in targets):
                    found = node
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part:
                found = node
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_function_that_a_document_names_exists(path: Path) -> None:
    wrong = [
        f"{file}:{name}"
        for file, name in NAMED.findall(path.read_text())
        if not (ROOT / file).is_file() or not defined((ROOT / file).read_text(), name)
    ]
    assert not wrong, f"{path.name} names what is not there: {', '.join(wrong)}"


def test_architecture_names_functions_that_are_looked_up() -> None:
    assert len(NAMED.findall((ROOT / "docs" / "architecture.md").read_text())) >= 25
    assert defined("class A:\n    def b(self): ...\nC = 1", "A.b") and defined("C: int = 1", "C")
    assert not defined("class A: ...\ndef b(): ...", "A.b") and not defined("from x import y", "y")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file(path: Path) -> None:
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text())]
    wrong = [file for file, _, _ in links if file and not (path.parent / file).exists()]
    assert not wrong, f"{path.name} links to {', '.join(wrong)}"
    for file, _, part in links:
        if part:
            heads = re.findall(r"^#+ (.*)$", (path.parent / (file or path.name)).read_text(), re.MULTILINE)
            assert part in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


def full(name: str) -> list[dict[str, str]]:
    """The rows of results/closed-world/NAME.md by the columns' heads."""
    lines = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in (RESULTS / "closed-world" / f"{name}.md").read_text().replace("|  |", "| - |").splitlines()
        if line.startswith("| ")
    ]
    return [dict(zip(lines[0], row, strict=False)) for row in lines[1:] if set(row[0]) - set("-: ")]


def test_the_table_of_methods_has_the_figures_of_every_seed() -> None:
    seeds = [[row for row in full("methods") if row["seed"] == seed] for seed in ("0", "1", "2")]
    for told, *found in zip(NOTEBOOK["methods"]["rows"], *seeds, strict=True):
        by_seed = [
            [row[head] for head in list(row)[2:7]] + row["relearning AUC, visual / all"].split(" / ") for row in found
        ]
        assert told[1:] == [" / ".join(figures) for figures in zip(*by_seed, strict=True)], told[0]


def test_the_table_of_targets_has_the_figures_of_the_ablation() -> None:
    cells = {(row["target"], row["site"]): row for row in full("ablation")}
    head, rows = NOTEBOOK["targets"]["head"], NOTEBOOK["targets"]["rows"]
    told = {(row[0], site): cell for row in rows for site, cell in zip(head[1:], row[1:], strict=True) if cell}
    assert len(told) == len(cells) - 1  # but for the vanilla model
    for (target, site), cell in told.items():
        row = cells[target.strip("`"), site.strip("`")]
        measured = (float(row[key]) for key in ("test", "retain", "real world"))
        assert all(abs(int(a) - b) <= 0.55 for a, b in zip(cell.split(" / "), measured, strict=True)), (target, site)


def test_the_table_of_masks_has_the_figures_of_every_seed() -> None:
    rows: dict[str, list[dict[str, str]]] = {}
    for row in full("mask"):
        rows.setdefault(row["strength"], []).append(row)
    for column, strength in ((1, "lr 2e-4, lambda 1"), (3, "lr 4e-4, lambda 2")):
        told = [cell for row in NOTEBOOK["mask"]["rows"] for cell in row[column].split(" / ")]
        steps = [cell for row in NOTEBOOK["mask"]["rows"] for cell in row[column + 1].split(" / ")]
        assert told == [row["retain"] for row in rows[strength]]
        assert steps == [row["steps to the bar"] for row in rows[strength]]
