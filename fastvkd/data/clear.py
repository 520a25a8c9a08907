"""Reader of CLEAR (arXiv 2410.18057, data set `therem/CLEAR`): `<folder>/<split>/train-00000-of-00001.parquet`.

Splits, by the columns of the published data set card:
- `forgetNN`, `retainNN`, `full`, `data`: `image, caption, name`, a photo and its caption;
- the same with `+tofu`: `image, caption, question, answer`; where the image is null, a question about the text (TOFU);
- `forgetNN_perturbed`, `retain_perturbed`: also `paraphrased_caption, perturbed_captions[], perturbed_names[]`;
- `real_faces`, `real_world`: `image, [question], answer, options[]`, the options without the answer.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from fastvkd.data import tables
from fastvkd.data.tables import kind_of, text_of
from fastvkd.data.texts import refuse_placeholders
from fastvkd.errors import DataError
from fastvkd.records import Choice, Open, Perturbed, Photo, Profile, Questions

NAME, TITLE = "clear", "CLEAR"
COLUMNS = frozenset({"caption", "name", "paraphrased_caption", "perturbed_captions", "perturbed_names", "options"})

# The questions of the benchmark's own code (somvy/multimodal_unlearning, mm/dataset.py). It draws one anew every time.
CAPTION_QUESTIONS = (
    "What can you see in this picture?",
    "Tell me about the content of this image",
    "Can you give a description of the image?",
    "What is depicted in the image?",
    "Explain what you observe in the picture.",
    "Describe the image in detail.",
    "What is the main subject of this image?",
    "Can you describe the scene or objects in the image?",
    "What is happening in this image?",
)
FACE_QUESTION = "The name of the person on the image is"
# The name choice of MMUnlearner (arXiv 2502.11051), CLEAR_eval.py.
NAME_QUESTION = "What is the name of the person in the image?"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WANTED = ("name", "question", "paraphrased_caption", "perturbed_captions", "perturbed_names", "options", "image")

splits = tables.splits


def each_profile(folder: tables.Folder, split: str) -> Iterator[Profile | DataError]:
    """Every row of a split in file order, its image encoded. A row that cannot be used comes as its error."""
    return tables.each_profile(folder, split, profile_of_row, (("caption", "answer"), ("answer", "caption")), _WANTED)


def read_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows of a split. Raises `DataError` naming file, row and column."""
    return tables.strict(each_profile(folder, split))


def training_split(folder: tables.Folder, split: str) -> list[Profile]:
    """All rows of a split. Training and evaluation both ask for their captions and text questions."""
    return read_split(folder, split_name(folder, split))


def training_sets(folder: tables.Folder, forget_split: str, retain_split: str) -> tuple[list[Profile], list[Profile]]:
    """Both sides: photos with their captions, and the text questions of `<split>+tofu` if it is there."""
    forget, retain = (split_name(folder, split) for split in (forget_split, retain_split))
    return (
        read_split(folder, forget) + _text_questions(folder, forget),
        read_split(folder, retain) + _text_questions(folder, retain),
    )


def evaluation_cells(folder: tables.Folder, forget_split: str, retain_split: str) -> dict[str, list[Profile]]:
    """`forget` and `retain`: captions, the choice among names, and text questions; `forget_faces` and `retain_faces`:
    the name as a free answer; `real_faces` and `real_world`.

    Photos come from `<forget_split>_perturbed` and `retain_perturbed`. Where these are missing, photos come from the
    splits themselves, and questions that need perturbed answers are left out.
    """
    available = splits(folder)
    cells: dict[str, list[Profile]] = {}
    for side, split in (("forget", forget_split), ("retain", retain_split)):
        split = split_name(folder, split)
        perturbed = f"{split}_perturbed" if side == "forget" else "retain_perturbed"
        photos = read_split(folder, perturbed if perturbed in available else split)
        cells[side] = photos + _text_questions(folder, split)
        faces = [face for profile in photos if (face := _face(profile)) is not None]
        if faces:
            cells[f"{side}_faces"] = faces
    return cells | {name: read_split(folder, name) for name in ("real_faces", "real_world") if name in available}


def split_name(folder: tables.Folder, split: str) -> str:
    """CLEAR writes `forget05` where MLLMU-Bench, and the default settings, write `forget_5`."""
    match = re.fullmatch(r"(forget|retain)_(\d+)", split)
    if match is None or split in splits(folder):
        return split
    return f"{match[1]}{int(match[2]):02d}"


def profile_of_row(row: tables.Row, source: str) -> Profile:
    """One row (as Python objects) -> `Profile`; `source` ('file:row') opens every message."""
    photo = tables.photo(row.get("image"), source)
    if row.get("options") is not None:
        return _real(row, source, photo)
    if photo is None:
        question, answer = text_of(row, "question", source), text_of(row, "answer", source)
        # The rows name nobody. So the same question on both sides counts as the same entity on both sides.
        return Profile(question, (), textual=Questions(generation=(Open(question, answer),)), source=source)
    caption, digest = text_of(row, "caption", source), photo.key
    question = CAPTION_QUESTIONS[int(digest[:8], 16) % len(CAPTION_QUESTIONS)]
    truth: tuple[Perturbed, ...] = ()
    choice: tuple[Choice, ...] = ()
    if row.get("perturbed_captions") is not None:
        wrong = _texts(row, "perturbed_captions", source)
        truth = (Perturbed(question, caption, text_of(row, "paraphrased_caption", source), wrong),)
    if row.get("perturbed_names") is not None:
        names = _texts(row, "perturbed_names", source)
        choice = (_choice(NAME_QUESTION, text_of(row, "name", source), names, digest, source),)
    # `+tofu` splits do not name who is in a photo
    entity = tables.entity_of(row.get("name") or f"photo {digest[:16]}", f"{source}: column name")
    visual = Questions(choice=choice, generation=(Open(question, caption),), truth=truth)
    return Profile(entity, (photo,), visual, source=source)


def _real(row: tables.Row, source: str, photo: Photo | None) -> Profile:
    answer, question = text_of(row, "answer", source), row.get("question") or FACE_QUESTION
    wrong = tuple(option for option in _texts(row, "options", source) if option != answer)
    digest = photo.key if photo else hashlib.sha256(question.encode()).hexdigest()
    questions = Questions(
        choice=(_choice(row.get("question") or NAME_QUESTION, answer, wrong, digest, source),),
        generation=(Open(question, answer),),
        truth=(Perturbed(question, answer, answer, wrong),),
    )
    visual, textual = (questions, Questions()) if photo else (Questions(), questions)
    return Profile(answer, (photo,) if photo else (), visual, textual, source=source)


def _choice(question: str, answer: str, wrong: tuple[str, ...], digest: str, source: str) -> Choice:
    """The answer among the wrong ones, at a place drawn by the photo's hash: the same for every model and run."""
    if not 1 <= len(wrong) < len(_LETTERS):
        raise DataError(f"{source}: {len(wrong)} wrong options; 1 to {len(_LETTERS) - 1} are needed")
    place = int(digest[8:16], 16) % (len(wrong) + 1)
    options = [*wrong[:place], answer, *wrong[place:]]
    return Choice(question, dict(zip(_LETTERS, options, strict=False)), _LETTERS[place])


def _face(profile: Profile) -> Profile | None:
    if not profile.visual.choice:
        return None
    choice = profile.visual.choice[0]
    name = choice.answer_text
    wrong = tuple(option for letter, option in choice.options.items() if letter != choice.answer)
    questions = Questions(generation=(Open(FACE_QUESTION, name),), truth=(Perturbed(FACE_QUESTION, name, name, wrong),))
    return Profile(profile.entity, profile.photos, questions, source=profile.source)


def _text_questions(folder: tables.Folder, split: str) -> list[Profile]:
    name = f"{split}+tofu"
    if name not in splits(folder):
        return []
    # The images are not read, they have hundreds of megabytes: rows about a photo are those with a caption.
    return [
        refuse_placeholders(profile_of_row(row, source))
        for file in tables.split_files(folder, name)
        for source, row in tables.rows(file, ("question", "answer"), ("caption",))
        if not row.get("caption")
    ]


def _texts(row: tables.Row, key: str, source: str) -> tuple[str, ...]:
    values: Any = row[key]
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{source}: {key} is {kind_of(values)}; a list of texts is needed")
    return tuple(values)
