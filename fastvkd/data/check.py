"""`fastvkd data check PATH`: recognise the format, validate every row, and say in one line each what is wrong.

Unlike the readers, which stop at the first row they cannot use, this collects every problem.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastvkd.data import jsonl, mllmu
from fastvkd.data.images import content_hash, decode_image
from fastvkd.data.records import Photo, Profile
from fastvkd.errors import DataError

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


@dataclass
class CheckReport:
    """The result: `problems` make the data unusable or its figures wrong, `notes` do not."""

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
        if self.ok:
            return "ok"
        return f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"

    def lines(self) -> list[str]:
        """The report as text: format, a table of counts per split, problems, notes, verdict."""
        heads = ("rows", "entities", "images", "choice", "generation", "cloze")
        width = max([len("split"), *(len(name) for name in self.splits)])
        table = [f"{'split':<{width}}  " + "  ".join(f"{head:>13}" for head in heads)]
        for name, counts in self.splits.items():
            cells = (
                str(counts.rows),
                str(counts.entities),
                str(counts.images),
                f"{counts.visual_choice}+{counts.text_choice}",
                f"{counts.visual_generation}+{counts.text_generation}",
                f"{counts.visual_cloze}+{counts.text_cloze}",
            )
            table.append(f"{name:<{width}}  " + "  ".join(f"{cell:>13}" for cell in cells))
        return [
            f"{self.path}: {self.format}",
            *table,
            "(questions: about the image + text only)",
            *(f"problem: {problem}" for problem in self.problems),
            *(f"note: {note}" for note in self.notes),
            f"verdict: {self.verdict}",
        ]


@dataclass
class _Contents:
    """What has to be compared between splits: who is in it, and which images, with where each was first seen."""

    entities: set[str] = field(default_factory=set)
    images: dict[str, tuple[str, str]] = field(default_factory=dict)  # content hash -> (entity, place)


def check_data(path: str | os.PathLike[str], progress: Callable[[int, int, str], None] | None = None) -> CheckReport:
    """Check a data folder. Raises `DataError` only where there is nothing to check: no folder, no known format.

    Verified: the schema of every row, options that contain the answer, no empty question or answer, every image
    decodes, no entity both forgotten and retained, no image under two entities, and no image in two splits that must be
    disjoint (see `_must_differ`). Pickles are reported and never loaded.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the splits")
    if own := jsonl.splits(root):
        report = CheckReport(str(root), "own data (JSONL)")
        parts: dict[str, Iterator[Profile | DataError]] = {name: _jsonl_rows(root, name) for name in own}
        for needed in ("forget", "retain"):
            if needed not in own:
                report.problems.append(
                    f"{root}: {needed}.jsonl is missing; own data needs forget.jsonl and retain.jsonl"
                )
    elif public := mllmu.splits(root):
        report = CheckReport(str(root), "MLLMU-Bench schema")
        parts = {name: _mllmu_rows(root, name) for name in public}
        if not any(_role(name) == "forget" for name in public):
            report.notes.append(f"{root}: no forget_* split, so nothing here can be unlearned")
    else:
        raise DataError(
            f"{root}: no known data format; expected <split>/*.parquet (MLLMU-Bench schema) or forget.jsonl and "
            "retain.jsonl; see docs/data.md"
        )
    contents: dict[str, _Contents] = {}
    for place, (name, part) in enumerate(parts.items()):
        contents[name] = _check_split(report, name, part)
        if progress is not None:
            progress(place + 1, len(parts), name)
    for one, other in itertools.combinations(contents, 2):
        _compare(report, one, contents[one], other, contents[other])
    pickles = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.suffix in _PICKLES)
    if pickles:
        report.notes.append(f"{root}: {len(pickles)} file(s) never loaded, since pickles run code: {pickles[0]} ...")
    return report


def _mllmu_rows(root: Path, split: str) -> Iterator[Profile | DataError]:
    for file in mllmu.split_files(root, split):
        try:
            for source, row in mllmu.rows(file):
                try:
                    yield mllmu.profile_of_row(row, source)
                except DataError as error:
                    yield error
        except DataError as error:  # the file as a whole: unreadable, or a column missing
            yield error


def _jsonl_rows(root: Path, split: str) -> Iterator[Profile | DataError]:
    try:
        for source, line in jsonl.lines(jsonl.split_file(root, split)):
            try:
                yield jsonl.parse_line(line, source, root)
            except DataError as error:
                yield error
    except DataError as error:
        yield error


def _check_split(report: CheckReport, name: str, part: Iterator[Profile | DataError]) -> _Contents:
    counts, contents = SplitCounts(), _Contents()
    report.splits[name] = counts
    for profile in part:
        counts.rows += 1
        if isinstance(profile, DataError):
            report.problems.append(str(profile))
            continue
        contents.entities.add(profile.entity)
        counts.visual_choice += len(profile.visual.choice)
        counts.visual_generation += len(profile.visual.generation)
        counts.visual_cloze += len(profile.visual.cloze)
        counts.text_choice += len(profile.textual.choice)
        counts.text_generation += len(profile.textual.generation)
        counts.text_cloze += len(profile.textual.cloze)
        for cloze in (*profile.visual.cloze, *profile.textual.cloze):
            if "__" not in cloze.question:
                report.problems.append(f"{profile.source}: cloze question {cloze.question!r} has no blank '__'")
        for choice in (*profile.visual.choice, *profile.textual.choice):
            texts = list(choice.options.values())
            if len(set(texts)) != len(texts):
                report.problems.append(f"{profile.source}: two options of {choice.question!r} are the same: {texts}")
        for photo in profile.photos:
            _check_photo(report, profile, photo, contents)
    counts.entities, counts.images = len(contents.entities), len(contents.images)
    if counts.rows == 0:
        report.problems.append(f"{report.path}: split {name} is empty; add rows or remove it")
    return contents


def _check_photo(report: CheckReport, profile: Profile, photo: Photo, contents: _Contents) -> None:
    key = content_hash(photo.data)
    if key in contents.images:
        entity, place = contents.images[key]
        if entity != profile.entity:
            report.problems.append(
                f"{photo.source}: the same image as {place}, but of entity {profile.entity!r}, not {entity!r}"
            )
        return
    contents.images[key] = (profile.entity, photo.source)
    try:
        decode_image(photo.data, photo.source)
    except DataError as error:
        report.problems.append(str(error))


def _role(split: str) -> str:
    for role, pattern in (
        ("forget", r"forget(_\d+)?"),
        ("retain", r"retain(_\d+)?"),
        ("test", r"test|Test_Set"),
        ("realworld", r"realworld|Retain_Set"),
    ):
        if re.fullmatch(pattern, split):
            return role
    return "all"


def _must_differ(one: str, other: str) -> tuple[bool, bool]:
    """Whether two splits may share no entity, and whether they may share no image.

    `forget_5` is the complement of `retain_95` only: `forget_10` holds `forget_5`, and shares people with `retain_95`.
    The test split shows people of the other splits in photos that those must not hold. `Full_Set` and `ft_Data` are the
    union of forget and retain. The celebrities of `Retain_Set` are numbered on their own, so only images tell.
    """
    roles = {_role(one): one, _role(other): other}
    if set(roles) == {"forget", "retain"}:
        forget, retain = (re.search(r"\d+", roles[role]) for role in ("forget", "retain"))
        complements = forget is None or retain is None or int(forget[0]) + int(retain[0]) == 100
        return complements, complements
    if "realworld" in roles and len(roles) == 2:
        return "Retain_Set" not in (one, other), True
    return False, "test" in roles and len(roles) == 2


def _compare(report: CheckReport, one: str, left: _Contents, other: str, right: _Contents) -> None:
    no_entity, no_image = _must_differ(one, other)
    if no_entity and (shared := sorted(left.entities & right.entities)):
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
