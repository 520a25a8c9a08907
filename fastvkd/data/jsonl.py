"""Reader of people's own data: `<folder>/<split>.jsonl`, one image-question (or text question) per line.

    {"image": "photos/ann-1.jpg", "entity": "ann", "question": "Where was she born?", "answer": "Rome",
     "options": ["Oslo", "Rome"]}

`image` is relative to the folder; a line without it is a text question. A line with `options` is a multiple-choice
question, one with `__` in the question a cloze question, any other a generation question. `name` may say the entity's
name. A line with `"description": true` asks what the photo shows beside who it is; its `options` are all values that
there are.
"""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvkd.data.tables import entity_of, four_cells, path_inside, strict
from fastvkd.data.texts import refuse_placeholders
from fastvkd.errors import DataError
from fastvkd.files import is_special, parse_json, read_text, text_lines
from fastvkd.records import Choice, Open, Photo, Profile, Questions

NAME, TITLE = "jsonl", "own data (JSONL)"
_OTHER_SPLITS = {"stranger": "strangers", "neighbour": "neighbours", "pair": "pairs"}  # as `mllmu.OTHER_SPLITS`
SPLITS = ("forget", "test", "retain", "realworld", *_OTHER_SPLITS.values())
_KEYS = ("image", "entity", "question", "answer", "options", "name", "description")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def splits(folder: str | os.PathLike[str]) -> list[str]:
    """The names of `SPLITS` whose file exists."""
    return [name for name in SPLITS if (Path(folder) / f"{name}.jsonl").is_file()]


def each_profile(folder: str | os.PathLike[str], split: str) -> Iterator[Profile | DataError]:
    """One profile a line, in file order. A line that cannot be used comes as its error."""
    try:
        for source, line in lines(split_file(folder, split)):
            try:
                yield refuse_placeholders(parse_line(line, source, Path(folder)))
            except DataError as error:
                yield error
    except DataError as error:  # the file as a whole
        yield error


def read_split(folder: str | os.PathLike[str], split: str) -> list[Profile]:
    """One `Profile` per (entity, image), and one without photos per entity that has text questions, in file order.

    Raises `DataError` naming file and line: no such split, a line that is no JSON object, an unknown or missing key, an
    answer that is no option, an image outside the folder or unreadable as a file.
    """
    return group(strict(each_profile(folder, split)))


training_split = read_split  # own data are trained on with the questions that they are evaluated with


def training_sets(
    folder: str | os.PathLike[str], forget_split: str, retain_split: str
) -> tuple[list[Profile], list[Profile]]:
    """Both sides. Own data name their splits themselves: the arguments are for the other formats."""
    return read_split(folder, "forget"), read_split(folder, "retain")


def evaluation_cells(folder: str | os.PathLike[str], forget_split: str, retain_split: str) -> dict[str, list[Profile]]:
    """forget, test, retain, realworld, stranger, neighbour and pair, as far as the folder has them."""
    return four_cells(splits(folder), lambda split: read_split(folder, split), *SPLITS[:4], **_OTHER_SPLITS)


def split_file(folder: str | os.PathLike[str], split: str) -> Path:
    file = Path(folder) / f"{split}.jsonl"
    if not file.is_file():
        raise DataError(
            f"{file}: no such file; own data is forget.jsonl, retain.jsonl, and optionally test.jsonl, realworld.jsonl"
        )
    return file


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """`('file:line', text)` of every line that is not blank, counted from 1 as editors do."""
    for number, line in text_lines(read_text(file, DataError, "own data are JSON lines in UTF-8")):
        yield f"{file}:{number}", line


def parse_line(line: str, source: str, folder: Path) -> Profile:
    """One line -> a profile with one question."""
    row = parse_json(line, source, DataError, "one object per line")
    if not isinstance(row, dict):
        raise DataError(f"{source}: a {type(row).__name__}; expected an object with the keys {', '.join(_KEYS)}")
    for key in row:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"{source}: unknown key {key!r}; allowed: {', '.join(_KEYS)}{hint}")
    entity, question, answer = (_text(row, key, source) for key in ("entity", "question", "answer"))
    entity = entity_of(entity, f"{source}: entity")
    photos = (_photo(row["image"], source, folder),) if row.get("image") is not None else ()
    if _is_description(row, source):
        questions = Questions(description=(_choice(question, answer, row["options"], source),))
    elif row.get("options") is not None:
        questions = Questions(choice=(_choice(question, answer, row["options"], source),))
    elif "__" in question:
        questions = Questions(cloze=(Open(question, answer),))
    else:
        questions = Questions(generation=(Open(question, answer),))
    visual, textual = (questions, Questions()) if photos else (Questions(), questions)
    name = _text(row, "name", source) if row.get("name") is not None else ""
    return Profile(entity, photos, visual, textual, source=source, name=name)


def group(single: Iterator[Profile] | list[Profile]) -> list[Profile]:
    """Profiles of one question each -> one per (entity, photo), so a photo is encoded once for all its questions."""
    grouped: dict[tuple[str, bytes | None], Profile] = {}
    for profile in single:
        key = (profile.entity, profile.photos[0].data if profile.photos else None)
        known = grouped.get(key)
        grouped[key] = (
            profile
            if known is None
            else Profile(
                known.entity,
                known.photos,
                _joined(known.visual, profile.visual),
                _joined(known.textual, profile.textual),
                source=known.source,
                name=known.name or profile.name,
            )
        )
    return list(grouped.values())


def _joined(one: Questions, other: Questions) -> Questions:
    return Questions(
        one.choice + other.choice,
        one.generation + other.generation,
        one.cloze + other.cloze,
        description=one.description + other.description,
    )


def _is_description(row: dict[str, Any], source: str) -> bool:
    if row.get("description") in (None, False):
        return False
    if row["description"] is not True:
        raise DataError(f"{source}: description is {row['description']!r}; true or false is expected")
    missing = [key for key in ("image", "options") if row.get(key) is None]
    if missing:
        raise DataError(f"{source}: a description without {missing[0]}; it asks about a photo and lists all values")
    return True


def _text(row: dict[str, Any], key: str, source: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = repr(value) if key in row else "missing"
        raise DataError(f"{source}: {key} is {found}; a text is needed")
    return value


def _choice(question: str, answer: str, options: Any, source: str) -> Choice:
    if not isinstance(options, list) or not all(isinstance(text, str) and text.strip() for text in options):
        raise DataError(f"{source}: options is {options!r}; expected a list of texts")
    if not 2 <= len(options) <= len(_LETTERS) or len(set(options)) != len(options):
        raise DataError(f"{source}: {len(options)} options {options!r}; 2 to {len(_LETTERS)} different ones are needed")
    if answer not in options:
        raise DataError(f"{source}: answer {answer!r} is no option; options: {options}")
    return Choice(question, dict(zip(_LETTERS, options, strict=False)), _LETTERS[options.index(answer)])


def _photo(name: Any, source: str, folder: Path) -> Photo:
    if not isinstance(name, str):
        raise DataError(f"{source}: image is {name!r}; expected a path relative to {folder}")
    path = path_inside(folder, folder / name, source)
    try:
        if is_special(path):
            raise DataError(f"{source}: image {name!r} is a pipe or a device and no file; put the photo itself there")
        return Photo(path.read_bytes(), f"{source} ({name})")
    except OSError as error:
        raise DataError(f"{source}: image {name!r} cannot be read ({error.strerror}); check the path") from error
