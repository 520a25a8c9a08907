"""`fastvkd data check PATH`: recognises the format, validates every row, and names each problem in one line.

The readers stop at the first row that they cannot use. This collects every problem.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fastvkd.data import tables
from fastvkd.data.hub import data_folder
from fastvkd.data.sources import recognise
from fastvkd.data.texts import marks_in
from fastvkd.errors import DataError, printable
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile, Questions

_TASKS = ("choice", "generation", "cloze", "truth", "description")
# Everything the readers never open: loading one runs code of whoever wrote it.
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")


@dataclass
class SplitCounts:
    """What one split holds; `images` counts distinct contents."""

    rows: int = 0
    entities: int = 0
    images: int = 0
    visual_choice: int = 0
    visual_generation: int = 0
    visual_cloze: int = 0
    text_choice: int = 0
    text_generation: int = 0
    text_cloze: int = 0
    visual_truth: int = 0
    text_truth: int = 0
    visual_description: int = 0
    text_description: int = 0


@dataclass
class CheckReport:
    """The result. `problems` make the data unusable or its figures wrong; `notes` do not."""

    path: str
    format: str
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"

    def lines(self) -> list[str]:
        """The report as text: format, a table of counts per split, problems, notes, verdict."""
        rows = [("split", ["rows", "entities", "images", *_TASKS])]
        for name, counts in self.splits.items():
            asked = [f"{getattr(counts, f'visual_{task}')}+{getattr(counts, f'text_{task}')}" for task in _TASKS]
            rows.append((printable(name), [str(counts.rows), str(counts.entities), str(counts.images), *asked]))
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  " + "  ".join(f"{entry:>13}" for entry in entries) for name, entries in rows]
        return [
            printable(f"{self.path}: {self.format}"),
            *table,
            "(questions: about the image + text only)",
            *(f"problem: {printable(problem)}" for problem in self.problems),
            *(f"note: {printable(note)}" for note in self.notes),
            f"verdict: {self.verdict}",
        ]


@dataclass
class _Contents:
    """What is compared between splits: the entities, and the images with the place where each was first seen."""

    entities: dict[str, str] = field(default_factory=dict)  # `person_key` -> the id as it is written
    images: dict[str, tuple[str, str]] = field(default_factory=dict)  # content hash -> (entity, place)


def check_data(
    path: str | os.PathLike[str],
    progress: Callable[[int, int, str], None] | None = None,
    *,
    model: str | None = None,
    max_pixels: int | None = None,
    forget_split: str | None = None,
    retain_split: str | None = None,
    local_files_only: bool = False,
) -> CheckReport:
    """Check a data folder (or hub id): "ok" means that training and evaluation start on it.

    Verified: every row has the schema. The options contain the answer. No question or answer is empty. Every image
    decodes. No entity is both forgotten and retained. No image belongs to two entities, or is in two splits that must
    be disjoint (see `_must_differ`). No shard of a split is missing. There is a forget split with a retain split, both
    with images, and a test split shows people of the former: asked of `forget_split` and `retain_split`, or of every
    pair that makes the whole. Pickles are reported and never loaded.

    With `model`, a model folder, every row's photo goes through its processor with the row's first question. The labels
    of training must then be the answer's tokens, all of them, and never an image placeholder. A note names the photo
    with the most visual tokens, on which memory depends; `max_pixels` limits it for Qwen-VL.

    Raises `DataError` only where there is nothing to check: no folder, no known format.
    """
    root = data_folder(str(path), local_files_only=local_files_only)
    labels = _Labels(model, max_pixels) if model is not None else None
    reader = recognise(root)
    names = reader.splits(root)
    report = CheckReport(str(root), reader.TITLE)
    if forget_split is None or retain_split is None:
        pairs = _pairs(reader.NAME, names)
    else:
        pairs = [(forget_split, retain_split)]
    report.problems += _missing(root, reader.NAME, names, pairs)
    parts = {name: reader.each_profile(root, name) for name in names}
    contents: dict[str, _Contents] = {}
    for place, (name, part) in enumerate(parts.items()):
        contents[name] = _check_split(report, name, part, labels)
        if progress is not None:
            progress(place + 1, len(parts), name)
    for one, other in itertools.combinations(contents, 2):
        rule = (True, True) if {one, other} in map(set, pairs) else _must_differ(one, other)
        _compare(report, one, contents[one], other, contents[other], *rule)
    report.problems += dict.fromkeys(_not_startable(root, contents, pairs))
    if pairs and reader.NAME != "jsonl" and ("5", "95") not in {_numbers(*pair) for pair in pairs}:
        report.notes.append(f"{root}: train and evaluate with forget_split={pairs[0][0]} retain_split={pairs[0][1]}")
    files = (file for file in root.rglob("*") if file.suffix in _PICKLES and not file.name.startswith("."))
    pickles = sorted(str(file.relative_to(root)) for file in files if not _is_written_by_us(root, file))
    if labels is not None:
        report.notes.append(f"{root}: labels of {labels.checked} rows checked with the processor of {model}")
        tokens, source = labels.most
        report.notes.append(f"{source}: of these photos the one with the most visual tokens, {tokens}")
    if pickles:
        report.notes.append(f"{root}: {len(pickles)} file(s) never loaded, since pickles run code: {pickles[0]} ...")
    return report


def _check_split(
    report: CheckReport, name: str, part: Iterator[Profile | DataError], labels: "_Labels | None"
) -> _Contents:
    counts: Counter[str] = Counter()
    contents = _Contents()
    for profile in part:
        counts["rows"] += 1
        if isinstance(profile, DataError):
            report.problems.append(str(profile))
            continue
        contents.entities.setdefault(tables.person_key(profile.entity), profile.entity)
        for side, questions in (("visual", profile.visual), ("text", profile.textual)):
            report.problems += _wrong_questions(profile.source, questions)
            counts.update({f"{side}_{task}": len(getattr(questions, task)) for task in _TASKS})
        if twice := _differing_pairs(profile):
            report.notes.append(f"{profile.source}: {twice}")
        if labels is not None and (marked := labels.texts(profile)):
            report.problems += marked
            continue
        for photo in profile.photos:
            readable = _check_photo(report, profile, photo, contents)
            if labels is not None and readable is not None:
                report.problems += labels.add(profile, readable)
    if labels is not None:
        report.problems += labels.flush()
    report.splits[name] = SplitCounts(entities=len(contents.entities), images=len(contents.images), **counts)
    if not counts:
        report.problems.append(f"{report.path}: split {name} is empty; add rows or remove it")
    return contents


def _wrong_questions(source: str, questions: Questions) -> Iterator[str]:
    for cloze in questions.cloze:
        # UMU-Bench pairs its questions, and its instruction does not speak of a blank
        if "__" not in cloze.question and not cloze.pair:
            yield f"{source}: cloze question {cloze.question!r} has no blank '__'"
    for choice in (*questions.choice, *questions.description):
        texts = list(choice.options.values())
        if len(set(texts)) != len(texts):
            yield f"{source}: two options of {choice.question!r} are the same: {texts}"
    for truth in questions.truth:
        if truth.answer in truth.perturbed or not truth.perturbed:
            what = "is among its own wrong answers" if truth.perturbed else "has no wrong answers to compare with"
            yield f"{source}: {truth.answer!r} {what}"


def _differing_pairs(profile: Profile) -> str | None:
    """Says how the two forms of a question (photo, text) disagree, for the first that does. None: all agree."""
    for task in ("choice", "generation", "cloze"):
        about_photo, about_text = (
            {question.pair: question for question in getattr(questions, task) if question.pair}
            for questions in (profile.visual, profile.textual)
        )
        if alone := sorted(about_photo.keys() ^ about_text.keys()):
            return f"{task} question {alone[0]!r} is asked about the photo or the text only; it has no joint figure"
        for pair, question in about_photo.items():
            one, other = (q.answer_text if task == "choice" else q.answer for q in (question, about_text[pair]))
            if task != "generation" and one.strip() != other.strip():
                return f"{task} question {pair!r} has the answer {one!r} about the photo and {other!r} about the text"
    return None


class _Labels:
    """Checks the labels that training makes of real rows, a few at a time."""

    _BATCH = 8

    def __init__(self, model: str, max_pixels: int | None) -> None:
        from fastvkd.models.families import image_token_id  # torch and transformers take seconds to import
        from fastvkd.models.loading import load_config, load_processor
        from fastvkd.models.processing import special_tokens

        self._processor = load_processor(model, max_pixels=max_pixels)
        self._placeholder = image_token_id(load_config(model))
        self._marks = special_tokens(self._processor)
        self.most = (0, "no photo")  # visual tokens, and the photo that has them
        self._pending: list[tuple[Profile, tuple[Image.Image, str, str]]] = []
        self.checked = 0

    def texts(self, profile: Profile) -> list[str]:
        """The first text of a row, about the photo or not, that the tokenizer takes for a mark of its own."""
        message = marks_in(profile, self._marks)
        return [message] if message else []

    def add(self, profile: Profile, image: Image.Image) -> list[str]:
        """Problems found so far, when a batch is full."""
        from fastvkd.data.wording import question_answer_pairs

        pairs = question_answer_pairs(profile.visual)
        if pairs:
            self._pending.append((profile, (image, *pairs[0])))
        return self.flush() if len(self._pending) >= self._BATCH else []

    def flush(self) -> list[str]:
        rows, self._pending = self._pending, []
        try:
            return self._checked(rows) if rows else []
        except DataError:  # of which row, shows each by itself
            return [problem for row in rows for problem in self._alone(row)]

    def _alone(self, row: tuple[Profile, tuple[Image.Image, str, str]]) -> list[str]:
        try:
            return self._checked([row])
        except DataError as error:
            return [str(error)]

    def _checked(self, rows: list[tuple[Profile, tuple[Image.Image, str, str]]]) -> list[str]:
        """What is wrong with the labels of some rows."""
        from fastvkd.models.answers import collate_answers

        pairs = [pair for _, pair in rows]
        batch = collate_answers(self._processor, pairs, range(len(rows)), [True] * len(rows))
        seen = (batch.inputs["input_ids"] == self._placeholder).sum(1).tolist()
        self.most = max([self.most, *zip(seen, (profile.source for profile, _ in rows), strict=True)])
        tokenizer = self._processor.tokenizer
        problems = []
        for (profile, (_, question, answer)), predicts in zip(rows, batch.predicts.tolist(), strict=True):
            labels = [token for token in predicts if token != -100]
            said = "".join(tokenizer.decode(labels, skip_special_tokens=True).split())
            place = f"{profile.source}: the labels of {question!r}"
            if self._placeholder in labels:
                problems.append(f"{place} hold {labels.count(self._placeholder)} image placeholders")
            elif tokenizer.unk_token_id in labels:
                problems.append(f"{place} hold the unknown token: the tokenizer cannot write {answer!r}")
            elif said != "".join(answer.split()):
                problems.append(f"{place} say {said!r}, but the answer is {answer!r}")
        self.checked += len(rows)
        return problems


def _check_photo(report: CheckReport, profile: Profile, photo: Photo, contents: _Contents) -> Image.Image | None:
    """The decoded photo, unless it was seen before or cannot be decoded."""
    key = photo.key
    if key in contents.images:
        entity, place = contents.images[key]
        if entity != profile.entity:
            report.problems.append(
                f"{photo.source}: the same image as {place}, but of entity {profile.entity!r}, not {entity!r}"
            )
        return None
    contents.images[key] = (profile.entity, photo.source)
    try:
        return decode_image(photo.data, photo.source)
    except DataError as error:
        report.problems.append(str(error))
        return None


def _role(split: str) -> str:
    """What a split is for, under any benchmark's name."""
    for role, pattern in (
        ("forget", r"forget(_?\d+)?(\+tofu|_perturbed)?"),
        ("retain", r"retain(_?\d+)?(\+tofu|_perturbed)?"),
        ("test", r"test|Test_Set"),
        ("realworld", r"realworld|Retain_Set|Real_Person_Set|real_(person|faces|world)"),
    ):
        if re.fullmatch(pattern, split):
            return role
    return "all"


def _numbers(forget: str, retain: str) -> tuple[str, str]:
    """The percentages in the names of two splits, "" where there is none."""
    one, other = (re.search(r"\d+", name) for name in (forget, retain))
    return ("" if one is None else str(int(one[0]))), ("" if other is None else str(int(other[0])))


def _pairs(format: str, names: Collection[str]) -> list[tuple[str, str]]:
    """The forget splits with their retain splits: those that together are the whole."""
    if format == "jsonl":
        return [("forget", "retain")]
    plain = [name for name in names if re.fullmatch(r"(forget|retain)(_?\d+)?", name)]
    found = []
    for forget, retain in itertools.product(plain, plain):
        if _role(forget) == "forget" and _role(retain) == "retain":
            one, other = _numbers(forget, retain)
            if (not one and not other) or (one and other and int(one) + int(other) == 100):
                found.append((forget, retain))
    return found


def _missing(root: Path, format: str, names: Collection[str], pairs: Collection[tuple[str, str]]) -> Iterator[str]:
    """Splits without which nothing can be unlearned."""
    if format == "jsonl":
        for needed in ("forget", "retain"):
            if needed not in names:
                yield f"{root}: {needed}.jsonl is missing; own data needs forget.jsonl and retain.jsonl"
        return
    for name in {name for pair in pairs for name in pair}.difference(names):
        try:
            tables.split_files(root, name)
        except DataError as error:
            yield str(error)
    if pairs:
        return
    others = sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.is_file()
        and re.match(r"(forget|retain)", file.relative_to(root).parts[0])
        and file.relative_to(root).parts[0] not in names
    )
    unread = f"; not read: {others[0]} (write it as parquet)" if others else ""
    yield (
        f"{root}: no forget split with a retain split (folders forget_5 and retain_95, or like them; others are named "
        f"with --forget-split and --retain-split), so nothing here "
        f"can be unlearned; found: {', '.join(names) or 'none'}{unread}"
    )


def _not_startable(root: Path, contents: Mapping[str, _Contents], pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What training or evaluation would refuse of splits that are sound by themselves."""
    for forget, retain in pairs:
        for name in (forget, retain):
            if name in contents and contents[name].entities and not contents[name].images:
                yield f"{root / name}: holds no image; name another split with forget_split/retain_split"
        for test in (name for name in contents if _role(name) == "test" and forget in contents):
            try:
                shown, forgotten = (set(contents[name].entities.values()) for name in (test, forget))
                tables.refuse_test_of_others(test, shown, forget, forgotten)
            except DataError as error:
                yield str(error)


def _is_written_by_us(root: Path, file: Path) -> bool:
    """Whether a file lies in the output of a run, below the data folder."""
    return any(tables.is_output(folder) for folder in file.parents if folder.is_relative_to(root) and folder != root)


def _must_differ(one: str, other: str) -> tuple[bool, bool]:
    """Whether two splits may share no entity, and whether they may share no image.

    `forget_5` is the complement of `retain_95` only: `forget_10` holds `forget_5`, and shares people with `retain_95`.
    The test split shows people of the other splits, in photos that those must not hold. `Full_Set`, `ft_Data` and
    CLEAR's `full` and `data` are the union of forget and retain. CLEAR's `retain_perturbed` shows people who are
    retained in every split. Celebrities have ids of their own in the benchmarks, so only their images can be compared.
    """
    roles = {_role(one): one, _role(other): other}
    if set(roles) == {"forget", "retain"}:
        forget, retain = (re.search(r"\d+", roles[role]) for role in ("forget", "retain"))
        complements = forget is None or retain is None or int(forget[0]) + int(retain[0]) == 100
        return complements, complements
    if "realworld" in roles and len(roles) == 2:
        return "realworld" in (one, other), True
    return False, "test" in roles and len(roles) == 2


def _compare(
    report: CheckReport, one: str, left: _Contents, other: str, right: _Contents, no_entity: bool, no_image: bool
) -> None:
    if no_entity and (shared := sorted(left.entities[key] for key in left.entities.keys() & right.entities.keys())):
        report.problems.append(
            f"{report.path}: {len(shared)} entit{'y is' if len(shared) == 1 else 'ies are'} in both {one} and {other}: "
            f"{', '.join(shared[:3])}{' ...' if len(shared) > 3 else ''}; keep each in one of them"
        )
    if no_image and (same := sorted(left.images.keys() & right.images.keys())):
        first, second = left.images[same[0]][1], right.images[same[0]][1]
        report.problems.append(
            f"{report.path}: {len(same)} image{'' if len(same) == 1 else 's'} in both {one} and {other}, the first at "
            f"{first} and {second}; remove {'it' if len(same) == 1 else 'them'} from one"
        )
