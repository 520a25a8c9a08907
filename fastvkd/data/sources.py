"""The one way into every data format: recognises it and reads the sets of a run or of an evaluation.

Data that would make the figures meaningless are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fastvkd.data import clear, jsonl, mllmu, tables, umu
from fastvkd.data.hub import data_folder
from fastvkd.data.strangers import read_strangers
from fastvkd.errors import DataError, SettingsError
from fastvkd.records import Photo, Profile


class Reader(Protocol):
    """What the module of each data format offers."""

    @property
    def NAME(self) -> str: ...
    @property
    def TITLE(self) -> str: ...
    def splits(self, folder: tables.Folder) -> list[str]: ...
    def each_profile(self, folder: tables.Folder, split: str) -> Iterator[Profile | DataError]: ...
    def training_split(self, folder: tables.Folder, split: str) -> list[Profile]: ...
    def training_sets(
        self, folder: tables.Folder, forget_split: str, retain_split: str
    ) -> tuple[list[Profile], list[Profile]]: ...
    def evaluation_cells(
        self, folder: tables.Folder, forget_split: str, retain_split: str
    ) -> dict[str, list[Profile]]: ...


_TABLES = (mllmu, umu, clear)
READERS: dict[str, Reader] = {"mllmu": mllmu, "clear": clear, "umu": umu, "jsonl": jsonl}


def recognise(folder: tables.Folder) -> Reader:
    """The reader of a local data folder: own data by its files' names, the benchmarks by their columns.

    Raises `DataError` where there is no folder or no known format.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the splits")
    if jsonl.splits(root):
        return READERS["jsonl"]
    # All splits are looked at: one damaged file or missing column must not hide what the folder is.
    found: set[str] = set().union(*(tables.columns(tables.first_file(root, split)) for split in tables.splits(root)))
    format = max(_TABLES, key=lambda one: len(one.COLUMNS & found))
    if not format.COLUMNS & found:
        raise DataError(_why_no_format(root, found))
    return READERS[format.NAME]


_SAVED = ("state.json", "dataset_dict.json")  # beside the .arrow files that `save_to_disk` writes
_ENDINGS = (".csv", ".tsv", ".xlsx", ".zip", ".tar", ".gz", ".arrow")


def _why_no_format(root: Path, columns: set[str]) -> str:
    """Why a folder is none that can be read: what was found there, and what to do with it."""
    names = [path.relative_to(root).as_posix() for path in sorted(root.glob("*")) + sorted(root.glob("*/*"))]
    names = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
    files = [name for name in names if (root / name).is_file()]
    wanted = (
        "expected the splits of MLLMU-Bench, CLEAR or UMU-Bench as <split>/*.parquet, or forget.jsonl and retain.jsonl"
    )
    if columns:
        return f"{root}: no known data format; {wanted}; columns found: {', '.join(sorted(columns))}; see docs/data.md"
    for split in tables.splits(root):
        for file in tables.split_files(root, split):
            try:
                next(tables.rows(file, (), ()), None)
            except DataError as error:
                return str(error)
    if any(Path(name).suffix == ".arrow" or Path(name).name in _SAVED for name in files):
        return (
            f"{root}: written by save_to_disk of the library datasets ({files[0]}); write each split as parquet: "
            "datasets.load_from_disk(FOLDER)[SPLIT].to_parquet('SPLIT/train.parquet'), or without [SPLIT] for one split"
        )
    flat = [name for name in files if "/" not in name and Path(name).suffix in (".parquet", ".json", ".jsonl")]
    if flat:
        split = Path(flat[0]).stem
        return (
            f"{root}: {flat[0]} lies in the folder itself; a split is a folder of its own: move it to "
            f"{split}/{flat[0]}. Own data are named forget.jsonl and retain.jsonl"
        )
    foreign = [name for name in files if Path(name).suffix in _ENDINGS]
    if foreign:
        return f"{root}: {foreign[0]} is of a kind that is not read; write parquet or JSON lines; {wanted}"
    listed = f"found {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "the folder is empty"
    return f"{root}: no known data format; {wanted}; {listed}; see docs/data.md"


def reader_of(folder: tables.Folder, benchmark: str | None = None) -> Reader:
    """The reader named by `benchmark`, or the recognised one.

    Raises `SettingsError` for an unknown name and for one that the data do not have.
    """
    if benchmark is not None and benchmark not in READERS:
        raise SettingsError(f"benchmark: unknown value {benchmark!r}; allowed: {', '.join(READERS)}")
    found = recognise(folder)
    if benchmark not in (None, found.NAME):
        raise SettingsError(f"benchmark: {benchmark!r}, but {folder} holds {found.TITLE} ({found.NAME}); name that")
    return found


def read_forget_retain(data: str, forget_split: str, retain_split: str) -> tuple[list[Profile], list[Profile]]:
    """Profiles of both sides with the questions that are trained on. `data` is a folder or a hub id.

    Raises DataError: a side without images, or an entity or image that is in both.
    """
    folder = data_folder(data)
    forget, retain = recognise(folder).training_sets(folder, forget_split, retain_split)
    _refuse_overlap(folder, forget, retain, forget_split, retain_split)
    return forget, retain


def read_split(data: str, split: str) -> list[Profile]:
    """The profiles of one split of a folder or hub id, with the questions that are trained on.

    `ft_Data-forget_5`, two splits joined by a hyphen, is the first without the people of the second, told by entity or
    by photo. Raises DataError where there is no image, or nobody of the second is in the first.
    """
    folder = data_folder(data)
    reader = recognise(folder)
    whole, _, left_out = (split, "", "") if split in reader.splits(folder) else split.partition("-")
    profiles = reader.training_split(folder, whole)
    if left_out:
        profiles = _without(profiles, reader.training_split(folder, left_out), f"{folder}: finetune_split={split}")
    if not any(profile.photos for profile in profiles):
        raise DataError(f"{folder / split}: holds no image; name another split with finetune_split")
    return profiles


def profiles_of_splits(
    data: str, split: str | None = None, *, local_files_only: bool = False
) -> dict[str, list[Profile]]:
    """Every row of a folder or hub id by split, or of one `split` alone. Raises DataError for the first that cannot be
    used, and where there is no such split."""
    folder = data_folder(data, local_files_only=local_files_only)
    reader = recognise(folder)
    there = reader.splits(folder)
    if split is not None and reader is READERS["clear"]:
        split = clear.split_name(folder, split)
    if split is not None and split not in there:
        raise DataError(f"{folder}: no split {split!r}; there are {', '.join(there)}")
    return {name: tables.strict(reader.each_profile(folder, name)) for name in there if split in (None, name)}


def _without(profiles: list[Profile], others: list[Profile], place: str) -> list[Profile]:
    images = {photo.key for profile in others for photo in profile.photos}
    entities = {tables.person_key(profile.entity) for profile in others}
    # A photo of somebody tells who the entity is where the two splits number people differently.
    entities |= {tables.person_key(one.entity) for one in profiles if images & {photo.key for photo in one.photos}}
    kept = [profile for profile in profiles if tables.person_key(profile.entity) not in entities]
    if len(kept) == len(profiles):
        raise DataError(f"{place}: the two splits have nobody in common, neither by entity nor by photo")
    return kept


def evaluation_cells(
    data: str, forget_split: str, retain_split: str, benchmark: str | None = None
) -> dict[str, list[Profile]]:
    """The cells of an evaluation by name. forget and retain are always there, others depend on format and folder (see
    docs/evaluation.md). Raises as `read_forget_retain` and `reader_of`."""
    folder = data_folder(data)
    cells = reader_of(folder, benchmark).evaluation_cells(folder, forget_split, retain_split)
    _refuse_overlap(folder, cells["forget"], cells["retain"], forget_split, retain_split)
    return cells


def reference_strangers(data: str) -> list[Photo]:
    """A photo of each stranger in the folder `strangers` of the data, for an attacker to compare with; empty where
    there is no such folder. They are other people than those of the cell stranger."""
    folder = data_folder(data) / "strangers"
    return [photos[0] for photos in read_strangers(folder)] if folder.is_dir() else []


def _refuse_overlap(
    folder: Path, forget: list[Profile], retain: list[Profile], forget_split: str, retain_split: str
) -> None:
    if recognise(folder) is READERS["jsonl"]:
        forget_split, retain_split = "forget", "retain"
    for split, profiles in ((forget_split, forget), (retain_split, retain)):
        if not any(profile.photos for profile in profiles):
            raise DataError(f"{folder / split}: holds no image; name another split with forget_split/retain_split")
    kept = {tables.person_key(p.entity) for p in retain}
    shared = {p.entity for p in forget if tables.person_key(p.entity) in kept}
    if shared:
        raise DataError(
            f"{folder}: entity {sorted(shared)[0]!r} is in both {forget_split} and {retain_split} "
            f"({len(shared)} in all); remove it from one of them"
        )
    seen = {photo.key: photo.source for p in forget for photo in p.photos}
    for profile in retain:
        for photo in profile.photos:
            twin = seen.get(photo.key)
            if twin:
                raise DataError(
                    f"{photo.source}: the same image as {twin}, in {forget_split}; remove it from one of them"
                )
