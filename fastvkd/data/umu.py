"""Reader of UMU-Bench (data set `linbojunzi/UMU-bench`, code QDRhhhh/UMU-bench): `<folder>/<split>/*.parquet`.

Every question exists twice, about the photo and about the text alone. Columns with questions hold Python literals. They
are read by `ast.literal_eval`, which executes nothing.

- `Classify`, `Cloze`, `Generation`: {'unimodal': {key: item}, 'muitimodal': {key: item}}; the misspelt key is the
  published one.
- `MM_QA`, `UM_QA`, for training: {'question': {key: text}, 'answer': {key: text}}.
"""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from fastvkd.data import tables
from fastvkd.data.tables import kind_of, text_of
from fastvkd.data.texts import refuse_placeholders
from fastvkd.errors import DataError, one_line
from fastvkd.records import Choice, Open, Profile, Questions

NAME, TITLE = "umu", "UMU-Bench"
COLUMNS = frozenset({"MM_QA", "UM_QA", "Classify", "Cloze", "Generation"})
REALWORLD_SPLITS = ("Real_Person_Set", "real_person")  # on the hub, and in the benchmark's code
_VISUAL, _TEXTUAL = ("muitimodal", "multimodal"), ("unimodal",)
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)

splits = tables.splits


def each_profile(folder: tables.Folder, split: str) -> Iterator[Profile | DataError]:
    """Every row of a split with the questions of the evaluation. A row that cannot be used comes as its error."""

    def parse(row: tables.Row, source: str) -> Profile:
        refuse_placeholders(training_profile(row, source))  # so that a check of the data covers what training reads
        return profile_of_row(row, source)

    return _each(folder, split, parse)


def read_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows with the questions of the evaluation: `Classify`, `Cloze`, `Generation`."""
    return tables.strict(_each(folder, split, profile_of_row))


def training_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows with the questions of training, `MM_QA` and `UM_QA`, as generation questions."""
    return tables.strict(_each(folder, split, training_profile))


def training_sets(folder: tables.Folder, forget_split: str, retain_split: str) -> tuple[list[Profile], list[Profile]]:
    """Both sides with the questions of training."""
    return training_split(folder, forget_split), training_split(folder, retain_split)


def evaluation_cells(folder: tables.Folder, forget_split: str, retain_split: str) -> dict[str, list[Profile]]:
    """forget, retain and, where the split is there, realworld (the celebrities)."""
    cells = {"forget": read_split(folder, forget_split), "retain": read_split(folder, retain_split)}
    real = [name for name in REALWORLD_SPLITS if name in splits(folder)]
    return cells | ({"realworld": read_split(folder, real[0])} if real else {})


def _each(
    folder: tables.Folder, split: str, parse: Callable[[tables.Row, str], Profile]
) -> Iterator[Profile | DataError]:
    return tables.each_profile(folder, split, parse, ("ID", "image", *sorted(COLUMNS)), ("Biography",))


def profile_of_row(row: tables.Row, source: str) -> Profile:
    """One row -> a profile with its evaluation questions; the two forms of a question share their `pair`."""
    columns = {name: _literal(row, name, source) for name in ("Classify", "Cloze", "Generation")}

    def questions(keys: tuple[str, ...]) -> Questions:
        return Questions(
            choice=tuple(_choice(*item) for item in _items(columns, "Classify", keys, source)),
            generation=tuple(_open(*item) for item in _items(columns, "Generation", keys, source)),
            cloze=tuple(_open(*item) for item in _items(columns, "Cloze", keys, source)),
        )

    return _profile(row, source, questions(_VISUAL), questions(_TEXTUAL))


def training_profile(row: tables.Row, source: str) -> Profile:
    """One row -> a profile with its training questions."""

    def questions(column: str) -> Questions:
        cell = _literal(row, column, source)
        asked, answers = cell.get("question"), cell.get("answer")
        if not isinstance(asked, dict) or not isinstance(answers, dict) or asked.keys() != answers.keys():
            raise DataError(f"{source}: column {column}: 'question' and 'answer' need to be dicts with the same keys")
        place = f"{source}: {column}"
        return Questions(generation=tuple(Open(text_of(asked, k, place), text_of(answers, k, place)) for k in asked))

    return _profile(row, source, questions("MM_QA"), questions("UM_QA"))


def _profile(row: tables.Row, source: str, visual: Questions, textual: Questions) -> Profile:
    entity = tables.entity_of(row["ID"], f"{source}: column ID")
    photo = tables.photo(row["image"], source)
    if photo is None:
        raise DataError(f"{source}: column image is null; every row needs a photo")
    return Profile(entity, (photo,), visual, textual, str(row.get("Biography") or ""), source)


def _literal(row: tables.Row, column: str, source: str) -> dict[Any, Any]:
    value = row[column]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except _LITERAL_ERRORS as error:
            raise DataError(f"{source}: column {column} is no Python literal ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise DataError(f"{source}: column {column} is {kind_of(value)}; expected a Python dict written as text")
    return value


def _items(
    columns: dict[str, dict[Any, Any]], column: str, keys: tuple[str, ...], source: str
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(item, its key, place) of one column and modality."""
    cell = columns[column]
    name = next((key for key in keys if key in cell), None)
    if name is None:
        raise DataError(f"{source}: column {column} has no key {keys[0]!r}; found: {', '.join(map(str, cell))}")
    if not isinstance(cell[name], dict):
        raise DataError(f"{source}: {column}[{name!r}] is {kind_of(cell[name])}; expected a dict of questions")
    for key, item in cell[name].items():
        place = f"{source}: {column}[{name!r}][{key!r}]"
        if not isinstance(item, dict):
            raise DataError(f"{place}: {kind_of(item)}; expected a dict with question and answer")
        yield item, str(key), place


def _choice(item: dict[str, Any], pair: str, place: str) -> Choice:
    question, answer, given = (
        text_of(item, "question", place),
        text_of(item, "answer", place).strip(),
        item.get("options"),
    )
    if not isinstance(given, dict) or len(given) < 2:
        raise DataError(f"{place}: options is {kind_of(given)}; expected a dict of two or more letters")
    options = {str(letter): text_of(given, letter, place) for letter in sorted(given)}
    letter = answer
    if letter not in options:
        named = [key for key, option in options.items() if option.strip() == answer]
        # An option's text comes before 'B.' or 'B. Rome': D. H. Lawrence is not the fourth option.
        letter = named[0] if named else answer.split(".")[0].strip()
        if letter not in options or len(named) > 1:
            raise DataError(f"{place}: answer {answer!r} is no option, or several; options: {options}")
    return Choice(question, options, letter, pair)


def _open(item: dict[str, Any], pair: str, place: str) -> Open:
    return Open(text_of(item, "question", place), text_of(item, "answer", place), pair)
