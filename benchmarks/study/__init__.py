"""What a study of the demo's data is. Each file of this folder is one; `python benchmarks/studies.py NAME` runs it.

A file holds `STUDY`, a `Study`, and nothing else is to be done: it is found by its name. A study may also lie anywhere
else; then its NAME is the path of the file.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
CELLS = {"forget": "forget", "test": "test", "retain": "retain", "real world": "realworld"}


@dataclass(frozen=True)
class Study:
    """Variants of a run on several seeds, and the table of what they gave.

    about: the title, a few words. variants: by name what is tried, in the order of the table. row(world, name): the
    figures of one run, as JSON holds them. columns: the table's head, and the text of a cell for a row of the table,
    `left` of them text. lines(rows): the rows of the table, where they are not the measured ones. note(report): prose
    before the table. protocol(): constants for the head of the results. by_seed: rows are sorted by seed, then variant;
    else the other way round. threads: of a process; None shares the cores between the jobs. fresh: each row is measured
    in a process of its own. size: of the demo, unless the command line has another. uses_recipe(name): whether a
    variant depends on configs/demo.yaml. depends(size, seed, name): what else, as JSON holds it, a row depends on; None
    where that is nothing.
    """

    about: str
    variants: Mapping[str, Any]
    row: Callable[[Any, str], Row]
    columns: Mapping[str, Callable[[Row], str]]
    left: int = 2
    lines: Callable[[list[Row]], Iterable[Row]] = list
    note: Callable[[dict[str, Any]], list[str]] = lambda report: []
    protocol: Callable[[], dict[str, Any]] = dict
    seeds: tuple[int, ...] = (0, 1, 2)
    by_seed: bool = True
    threads: int | None = None
    fresh: bool = False
    size: str = "default"
    uses_recipe: Callable[[str], bool] = lambda variant: True
    depends: Callable[[str, int, str], Any] = lambda size, seed, variant: None

    def key(self, size: str, seed: int, variant: str, overrides: Mapping[str, Any]) -> str:
        """What a finished row depends on."""
        from world import RECIPE

        from fastvkd.demo.run import SIZES
        from fastvkd.paths import shipped

        # Parsed: a comment in the recipe changes no figure.
        recipe = yaml.safe_load(shipped(RECIPE).read_text()) if self.uses_recipe(variant) else {}
        spec = SIZES[size]
        # Of the demo's own attacks a study takes when to measure, and nothing else.
        world = [repr(dataclasses.replace(spec, attacks=None)), spec.attacks.relearning_steps]
        facts = [world, seed, variant, repr(self.variants[variant]), recipe, self.protocol(), overrides]
        if (more := self.depends(size, seed, variant)) is not None:
            facts.append(more)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def order(self, row: Row) -> tuple[Any, ...]:
        place = list(self.variants).index(row["variant"]) if row["variant"] in self.variants else len(self.variants)
        return (row["size"], row["seed"], place) if self.by_seed else (row["size"], place, row["seed"])

    def table(self, report: dict[str, Any]) -> list[str]:
        """Markdown: the note and the table."""
        from tables import table

        rows = [[cell(row) for cell in self.columns.values()] for row in self.lines(report["rows"])]
        note = self.note(report) if rows else []
        return [*note, *([""] if note else []), *table(self.columns, rows, self.left)]


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))


def find(name: str) -> Study:
    """The study of a name or of a file. Raises ValueError for another name."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module.STUDY
    if name not in names():
        raise ValueError(f"no study {name!r}; there are {', '.join(names())}, and any file of yours")
    return importlib.import_module(f"study.{name}").STUDY


def percent(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else f"{100 * value:{form}}"


def share_columns(
    of: Callable[[Row], Mapping[str, float] | None] = lambda row: row, vqa: bool = False
) -> dict[str, Callable[[Row], str]]:
    """A column in % for each evaluation cell, whose accuracies `of` finds in a row; a dash where it finds None. `vqa`
    says so in the heads, beside columns of text."""

    def column(cell: str) -> Callable[[Row], str]:
        return lambda row: "-" if (found := of(row)) is None else percent(found[cell])

    return {f"{head.replace(' ', '-')} VQA" if vqa else head: column(cell) for head, cell in CELLS.items()}
