"""Reader and writer of folders in the schema of MLLMU-Bench: `<folder>/<split>/train-00000-of-00001.parquet`.

One reader serves the public benchmark and the demo, which is written in exactly this schema. Pickles are never read.
`data.check` validates; this module refuses the first row that it cannot understand.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvkd.data import tables
from fastvkd.data.tables import kind_of, text_of
from fastvkd.data.texts import refuse_placeholders
from fastvkd.errors import DataError, one_line
from fastvkd.files import parse_json
from fastvkd.records import Choice, Open, Photo, Profile, Questions

NAME, TITLE = "mllmu", "MLLMU-Bench schema"
# The schema is recognised by these.
COLUMNS = frozenset({"Classification_Task", "Generation_Task", "Mask_Task", "metadata"})
TEST_SPLIT, REALWORLD_SPLIT = "Test_Set", "Retain_Set"
# Cells beside the benchmark's own, and their splits: people nobody taught the model; retained people beside a forgotten
# one in photos of two; and the forgotten ones there.
OTHER_SPLITS = {"stranger": "Stranger_Set", "neighbour": "Neighbour_Set", "pair": "Pair_Set"}
LETTERS = ("A", "B", "C", "D")
_DESCRIPTION_LETTERS = tuple("ABCDEFGH")  # a description's options are all values that there are

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _choice_type(letters: tuple[str, ...]) -> pa.StructType:
    options = pa.struct([(letter, pa.string()) for letter in letters])
    return pa.struct([("Question", pa.string()), ("Options", options), ("Correct_Answer", pa.string())])


_CHOICE = _choice_type(LETTERS)
_OPEN = pa.struct([("Type", pa.string()), ("Question", pa.string()), ("Ground_Truth", pa.string())])
_AFTER_IMAGE = [
    ("ID", pa.string()),
    ("biography", pa.string()),
    ("question", pa.string()),
    ("answer", pa.string()),
    (
        "Classification_Task",
        pa.struct([("Image_Textual_Questions", pa.list_(_CHOICE)), ("Pure_Text_Questions", pa.list_(_CHOICE))]),
    ),
    ("Generation_Task", pa.list_(_OPEN)),
    ("Mask_Task", pa.list_(_OPEN)),
]
# Not in the published benchmark: the person's name, and what a photo shows beside who it is.
_OWN = [("name", pa.string()), ("Description_Task", pa.list_(_choice_type(_DESCRIPTION_LETTERS)))]
MLLMU_SCHEMA = pa.schema([("image", _IMAGE), *_AFTER_IMAGE, *_OWN])
MLLMU_TEST_SCHEMA = pa.schema([("images", pa.list_(_IMAGE)), *_AFTER_IMAGE, *_OWN])

# `Directory` and `metadata` exist in some splits only, `question` and `answer` are not in all of them. A split with
# `metadata` may be for training alone and lack the questions of the evaluation.
_REQUIRED = (
    "ID",
    ("image", "images"),
    ("Classification_Task", "metadata"),
    ("Generation_Task", "metadata"),
    ("Mask_Task", "metadata"),
)
_WANTED = ("biography", "metadata", "name", "Description_Task")
_VISUAL, _TEXTUAL = "Image_Textual", "Pure_Text"


splits = tables.splits


def each_profile(folder: tables.Folder, split: str) -> Iterator[Profile | DataError]:
    """Every row of a split with the questions of the evaluation, in file order, its image encoded. A row that cannot be
    used comes as its error."""

    def parse(row: tables.Row, source: str) -> Profile:
        refuse_placeholders(training_profile(row, source))  # so that a check of the data covers what training reads
        return profile_of_row(row, source)

    return tables.each_profile(folder, split, parse, _REQUIRED, _WANTED)


def read_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows of a split with the questions of the evaluation, in file order, images encoded.

    Raises `DataError` naming file, row and column: unknown split, a file that is no parquet, a missing column, a
    question without text, an answer that is empty or no option, an image cell without bytes.
    """
    return tables.strict(tables.each_profile(folder, split, profile_of_row, _REQUIRED, _WANTED))


def training_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows of a split with the questions of training: see `training_profile`."""
    return tables.strict(tables.each_profile(folder, split, training_profile, _REQUIRED, _WANTED))


def training_sets(folder: tables.Folder, forget_split: str, retain_split: str) -> tuple[list[Profile], list[Profile]]:
    """Both sides with the questions of training. As published these are the splits' own questions: only `ft_Data` has
    `metadata`."""
    return training_split(folder, forget_split), training_split(folder, retain_split)


def evaluation_cells(folder: tables.Folder, forget_split: str, retain_split: str) -> dict[str, list[Profile]]:
    """forget, test (unseen photos of the same entities), retain, realworld and those of `OTHER_SPLITS`, as far as the
    folder has them."""
    return tables.four_cells(
        splits(folder),
        lambda split: read_split(folder, split),
        *(forget_split, TEST_SPLIT, retain_split, REALWORLD_SPLIT),
        **OTHER_SPLITS,
    )


def training_profile(row: tables.Row, source: str) -> Profile:
    """One row -> a profile with its training questions. These are the ones of `metadata`, all about the photo, as in
    the published training code. A row without `metadata` has those of the evaluation."""
    metadata = row.get("metadata")
    if metadata is None:
        return profile_of_row(row, source)
    visual = Questions(generation=_metadata_questions(metadata, source))
    return _profile(row, source, _photos(row, source), visual, Questions())


def _metadata_questions(metadata: Any, source: str) -> tuple[Open, ...]:
    if isinstance(metadata, str):
        metadata = parse_json(metadata, f"{source}: column metadata", DataError, "a list of questions is needed")
    asked = [(cell.get("Question"), cell.get("Answer")) for _, cell in _entries(metadata, source, "metadata")]
    for position, texts in enumerate(asked):
        if wrong := [text for text in texts if not isinstance(text, str | None)]:
            raise DataError(f"{source}: metadata[{position}]: {kind_of(wrong[0])}; Question and Answer are texts")
    # The published training code skips entries without a question or an answer.
    return tuple(Open(question, answer) for question, answer in asked if question and answer)


def profile_of_row(row: tables.Row, source: str) -> Profile:
    """One row (as Python objects) -> a profile with its evaluation questions. `source` ('file:row') opens every
    message. A column that is missing holds no question."""
    photos = _photos(row, source)
    tasks = row.get("Classification_Task", {})
    if not isinstance(tasks, dict):
        raise DataError(
            f"{source}: column Classification_Task is {kind_of(tasks)}; expected a struct with "
            "Image_Textual_Questions and Pure_Text_Questions"
        )
    opens = {column: _open_questions(row.get(column), source, column) for column in ("Generation_Task", "Mask_Task")}
    described = _choice_questions(row.get("Description_Task"), source, "Description_Task", _DESCRIPTION_LETTERS)
    visual, textual = (
        Questions(
            choice=_choice_questions(tasks.get(key), source, f"Classification_Task.{key}"),
            generation=tuple(question for kind, question in opens["Generation_Task"] if kind == wanted),
            cloze=tuple(question for kind, question in opens["Mask_Task"] if kind == wanted),
            description=described if wanted == _VISUAL else (),
        )
        for wanted, key in ((_VISUAL, "Image_Textual_Questions"), (_TEXTUAL, "Pure_Text_Questions"))
    )
    return _profile(row, source, photos, visual, textual)


def _profile(row: tables.Row, source: str, photos: tuple[Photo, ...], visual: Questions, textual: Questions) -> Profile:
    entity = tables.entity_of(row["ID"], f"{source}: column ID")
    if not photos and (visual.choice or visual.generation or visual.cloze or visual.description):
        raise DataError(f"{source}: questions about the image, but the row has no image; add it or drop the questions")
    name = row.get("name")
    if not isinstance(name, str | None):
        raise DataError(f"{source}: column name is {kind_of(name)}; expected the person's name as text")
    return Profile(
        entity=entity,
        photos=photos,
        visual=visual,
        textual=textual,
        biography=row.get("biography") or "",
        source=source,
        name=name or "",
    )


def _photos(row: dict[str, Any], source: str) -> tuple[Photo, ...]:
    """The photos of a row: of `images`, and of `image` where that is not among them."""
    single = tables.photo(row.get("image"), source)
    if row.get("images") is None:
        return () if single is None else (single,)
    if not isinstance(row["images"], list):
        raise DataError(f"{source}: column images is {kind_of(row['images'])}; expected a list of images")
    photos = []
    for position, cell in enumerate(row["images"]):
        photo = tables.photo(cell, source, position)
        if photo is None:
            raise DataError(f"{source}:{position}: column images holds null; expected encoded image bytes")
        photos.append(photo)
    if single is not None and single.key not in {photo.key for photo in photos}:
        photos.insert(0, single)
    return tuple(photos)


def _choice_questions(cells: Any, source: str, column: str, letters: tuple[str, ...] = LETTERS) -> tuple[Choice, ...]:
    questions = []
    for position, cell in _entries(cells, source, column):
        place = f"{source}: {column}[{position}]"
        question = text_of(cell, "Question", place)
        given = cell.get("Options")
        if not isinstance(given, dict):
            raise DataError(f"{place}: Options is {kind_of(given)}; expected a struct of letters {', '.join(letters)}")
        # A struct column has every letter on every row; unused ones are null.
        options = {letter: str(text) for letter, text in sorted(given.items()) if text is not None}
        empty = [letter for letter, text in options.items() if not text.strip()]
        if empty or len(options) < 2:
            what = f"option {empty[0]} is empty" if empty else f"{len(options)} option(s)"
            raise DataError(f"{place}: {what}; at least two options, each with a text, are needed")
        answer = text_of(cell, "Correct_Answer", place).strip()
        if answer not in options:
            # Some releases give the option's text in place of its letter.
            same = [letter for letter, text in options.items() if text.strip() == answer]
            if len(same) != 1:
                raise DataError(f"{place}: Correct_Answer {answer!r} is no option; options: {options}")
            answer = same[0]
        questions.append(Choice(question, options, answer))
    return tuple(questions)


def _open_questions(cells: Any, source: str, column: str) -> list[tuple[str, Open]]:
    questions = []
    for position, cell in _entries(cells, source, column):
        place = f"{source}: {column}[{position}]"
        kind = cell.get("Type")
        if kind not in (_VISUAL, _TEXTUAL):
            raise DataError(f"{place}: Type is {kind!r}; allowed: {_VISUAL}, {_TEXTUAL}")
        questions.append((kind, Open(text_of(cell, "Question", place), text_of(cell, "Ground_Truth", place))))
    return questions


def _entries(cells: Any, source: str, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if cells is None:
        return
    if not isinstance(cells, list):
        raise DataError(f"{source}: column {column} is {kind_of(cells)}; expected a list of structs")
    for position, cell in enumerate(cells):
        if not isinstance(cell, dict):
            raise DataError(f"{source}: {column}[{position}] is {kind_of(cell)}; expected a struct")
        yield position, cell


def write_split(folder: str | os.PathLike[str], split: str, profiles: Sequence[Profile]) -> Path:
    """Write profiles as `<folder>/<split>/train-00000-of-00001.parquet` in `MLLMU_SCHEMA` (`Test_Set`: in
    `MLLMU_TEST_SCHEMA`, several photos a row) and return the file's path.

    The columns `question` and `answer` repeat the row's first generation question, as a caption-style sample; the
    reader does not use them. The file appears whole or not at all. Raises `DataError` where a profile does not fit the
    schema (other letters than A-D, an answer that is no option, not exactly one photo outside `Test_Set`) and when the
    disk refuses.
    """
    test = split == TEST_SPLIT
    schema = MLLMU_TEST_SCHEMA if test else MLLMU_SCHEMA
    table = pa.Table.from_pylist([_row_of_profile(profile, test) for profile in profiles], schema=schema)
    target = Path(folder) / split / "train-00000-of-00001.parquet"
    partial = target.with_suffix(".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Small row groups: a reader then never holds more than a few dozen images at once. Checksums: of bits that are
        # flipped in a photo nothing else would tell.
        pq.write_table(table, partial, compression="zstd", row_group_size=256, write_page_checksum=True)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{target}: cannot be written ({one_line(error)}); free space or choose another folder"
        ) from error
    return target


def _row_of_profile(profile: Profile, test: bool) -> dict[str, Any]:
    place = f"entity {profile.entity!r}"
    images = [{"bytes": photo.data, "path": None} for photo in profile.photos]
    if not test and len(images) != 1:
        raise DataError(f"{place}: {len(images)} photos in one row; only {TEST_SPLIT} holds several: one row per photo")
    generation = [*profile.visual.generation, *profile.textual.generation]
    return {
        **({"images": images} if test else {"image": images[0]}),
        "ID": profile.entity,
        "biography": profile.biography,
        "question": generation[0].question if generation else "",
        "answer": generation[0].answer if generation else "",
        "Classification_Task": {
            "Image_Textual_Questions": [_choice_row(question, place) for question in profile.visual.choice],
            "Pure_Text_Questions": [_choice_row(question, place) for question in profile.textual.choice],
        },
        "Generation_Task": _open_rows(profile.visual.generation, profile.textual.generation),
        "Mask_Task": _open_rows(profile.visual.cloze, profile.textual.cloze),
        "name": profile.name or None,
        "Description_Task": [
            _choice_row(question, place, _DESCRIPTION_LETTERS) for question in profile.visual.description
        ],
    }


def _choice_row(question: Choice, place: str, letters: tuple[str, ...] = LETTERS) -> dict[str, Any]:
    if not set(question.options) <= set(letters) or question.answer not in question.options:
        raise DataError(
            f"{place}: question {question.question!r} has options {list(question.options)} and answer "
            f"{question.answer!r}; letters {letters[0]} to {letters[-1]} are allowed and the answer is one of them"
        )
    return {"Question": question.question, "Options": question.options, "Correct_Answer": question.answer}


def _open_rows(visual: Iterable[Open], textual: Iterable[Open]) -> list[dict[str, str]]:
    return [
        {"Type": kind, "Question": question.question, "Ground_Truth": question.answer}
        for kind, questions in ((_VISUAL, visual), (_TEXTUAL, textual))
        for question in questions
    ]
