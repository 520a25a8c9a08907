"""Rows of a benchmark folder `<folder>/<split>/*.parquet` (or `*.json`, `*.jsonl`), the layout of public data sets.

Two layouts of the hub are read too: `<folder>/data/<split>-00000-of-00001.parquet`, `<folder>/<split>/data/*.parquet`.

The readers know what the columns mean. Pickles are never opened.
"""

import base64
import difflib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvkd.data.texts import refuse_placeholders
from fastvkd.errors import DataError, one_line
from fastvkd.files import is_special, lfs_pointer, parse_json, read_text, text_lines
from fastvkd.records import Photo, Profile

Row = dict[str, Any]
_ABOUT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# What pyarrow raises for damaged files: an ArrowInvalid is a ValueError, as is text that is no UTF-8.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
Folder = str | os.PathLike[str]
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.(\w+)")
# Of what fastvkd or a model hub writes: JSON files beside these are no rows.
_NOT_ROWS = (
    *("metrics.jsonl", "run.json", "samples.jsonl", "results.json", "attacks.jsonl", "attacks.json"),
    *("report.json", "certificate.json", "config.json"),
)


def splits(folder: Folder) -> list[str]:
    """The names of the splits that have parquet or JSON files, sorted."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds Full_Set/, forget_10/ ...")
    names = {child.name for child in visible(root) if child.is_dir() and _own_files(child)}
    shards = [_split_of_shard(file) for file in table_files(root / "data")]
    # A data set of one split has `train-...` alone, or names of its owner's; there the split is called as the folder.
    if "" not in shards and set(shards) - {"train"}:
        names = names - {"data"} | set(shards)
    return sorted(names)


def _own_files(folder: Path) -> list[Path]:
    return table_files(folder) or table_files(folder / "data")


def _split_of_shard(file: Path) -> str:
    """`forget_5` of `forget_5-00000-of-00001.parquet`, "" of other names."""
    match = _SHARD.fullmatch(file.name)
    return match[1] if match else ""


def _files_of(root: Path, split: str) -> list[Path]:
    """Raises `DataError` where two places hold the split."""
    own = _own_files(root / split)
    beside = [file for file in table_files(root / "data") if _split_of_shard(file) == split]
    if own and beside:
        raise DataError(f"{root}: split {split} is in both {own[0]} and {beside[0]}; keep one of them")
    return own or beside


def split_files(folder: Folder, split: str) -> list[Path]:
    """The data files of a split, sorted; `DataError` with the nearest name when there is none, and where one of several
    shards is missing."""
    files = _files_of(Path(folder), split)
    if not files:
        known = splits(folder)
        nearest = difflib.get_close_matches(split, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        here = Path(folder) / split
        others = sorted(file.name for file in here.iterdir() if file.is_file()) if here.is_dir() else []
        if others:
            hint = f"; {here} holds {others[0]}, which is not read: write it as parquet"
        raise DataError(
            f"{folder}: no split {split!r} with parquet or JSON files; found: {', '.join(known) or 'none'}{hint}"
        )
    _refuse_missing_shards(files)
    return files


def _refuse_missing_shards(files: list[Path]) -> None:
    """Names like `train-00000-of-00002.parquet` say how many files make the whole."""
    numbers: dict[tuple[str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            numbers[match[1], match[4]][int(match[3])].add(int(match[2]))
    for (name, ending), by_total in numbers.items():
        if len(by_total) > 1:
            totals = " and ".join(f"{name}-*-of-{total:05d}.{ending}" for total in sorted(by_total))
            raise DataError(f"{files[0].parent}: holds both {totals}, two downloads of one table; keep one of them")
        for total, found in by_total.items():
            missing = [f"{name}-{i:05d}-of-{total:05d}.{ending}" for i in range(total) if i not in found]
            if missing:
                more = " and others" if len(missing) > 1 else ""
                raise DataError(
                    f"{files[0].parent}: {len(missing)} of {total} shards missing: {missing[0]}{more}; "
                    "download the split whole"
                )


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without names that begin with a dot: systems and editors keep their own there."""
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def table_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or its JSON files where there are none, without what describes the others."""
    here = [file for file in visible(folder) if file.name not in _ABOUT_TABLES] if folder.is_dir() else []
    # A JSON file beside parquet files is something else: a list of ids, settings.
    for endings in ((".parquet",), (".json", ".jsonl")):
        if found := [file for file in here if file.suffix in endings]:
            return [] if ".json" in endings and is_output(folder) else found
    return []


def is_output(folder: Path) -> bool:
    """Whether a folder holds what a run, an evaluation or a model's export wrote, and not data."""
    return any((folder / name).is_file() for name in _NOT_ROWS)


def first_file(folder: Folder, split: str) -> Path:
    """A file of a split, by which the split is recognised."""
    return _files_of(Path(folder), split)[0]


def columns(file: Path) -> set[str]:
    """Names of the columns, empty for a file that cannot be read (`rows` says why)."""
    if is_special(file):
        return set()
    try:
        if file.suffix == ".parquet":
            return set(pq.read_schema(file).names)
        return set(next((row for _, row in _json_rows(file)), {}))
    except (*_PARQUET_ERRORS, DataError):
        return set()


def rows(file: Path, required: Collection[str | tuple[str, ...]], wanted: Collection[str]) -> Iterator[tuple[str, Row]]:
    """`('file:row', row)` of every row, with the columns in `required` and `wanted`.

    A tuple in `required` names alternatives, one of which must be there. Images are large, so a few rows are read at a
    time. Raises `DataError` for a missing column and for a file that cannot be read.
    """
    choices = [one if isinstance(one, tuple) else (one,) for one in required]
    read = {*wanted, *(name for names in choices for name in names)}
    if is_special(file):
        raise DataError(f"{file}: is a pipe or a device and no file; put the table itself there")
    if file.suffix != ".parquet":
        for source, row in _json_rows(file):
            _require(source, row, choices)
            yield source, {name: row[name] for name in read & row.keys()}
        return
    try:
        with file.open("rb") as opened:
            pointer = lfs_pointer(opened.read(64))
        if pointer:
            raise DataError(f"{file}: {pointer}")
        parquet = pq.ParquetFile(file, page_checksum_verification=True)  # of files that have checksums
    except _PARQUET_ERRORS as error:
        raise DataError(f"{file}: not a readable parquet file ({one_line(error)}); download it again") from error
    with parquet:
        present = parquet.schema_arrow.names
        _require(str(file), present, choices)
        index = 0
        try:
            for batch in parquet.iter_batches(batch_size=64, columns=[name for name in present if name in read]):
                for row in batch.to_pylist():
                    yield f"{file}:{index}", row
                    index += 1
        except _PARQUET_ERRORS as error:
            raise DataError(f"{file}:{index}: damaged parquet data ({one_line(error)}); download it again") from error


def _require(place: str, present: Collection[str], choices: Iterable[tuple[str, ...]]) -> None:
    missing = [names for names in choices if not any(name in present for name in names)]
    if missing:
        listed = ", ".join(f"{names[0]} (or {names[1]})" if names[1:] else names[0] for names in missing)
        raise DataError(
            f"{place}: missing column {listed}; found: {', '.join(present)}; the columns are listed in docs/data.md"
        )


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a JSON array (numbered from 0, as in parquet) or of JSON lines (numbered from 1, as editors do)."""
    mend = "a .json file holds a list of rows, a .jsonl file one row a line"
    text = read_text(file, DataError, mend)
    if file.suffix == ".json":
        value = parse_json(text, str(file), DataError, mend)
        if not isinstance(value, list):
            raise DataError(f"{file}: holds {kind_of(value)}; {mend}")
        found: Iterable[tuple[int, Any]] = enumerate(value)
    else:
        found = ((n, parse_json(line, f"{file}:{n}", DataError, mend)) for n, line in text_lines(text))
    for number, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: {kind_of(row)}; expected an object with a key for every column")
        yield f"{file}:{number}", row


def photo(cell: Any, source: str, position: int | None = None) -> Photo | None:
    """An image cell of the row at `source` ('file:row') -> a `Photo`; None for a null cell.

    `position` counts within the column `images`; without it the column is `image`.

    A cell is a struct of `bytes` and `path`, or bytes; in JSON a path, or a struct with base64 text. Paths are relative
    to the split's folder or to the data folder and must lie inside the latter.
    """
    column, place = ("image", source) if position is None else ("images", f"{source}:{position}")
    data, path = cell, None
    if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, str):
            try:
                data = base64.b64decode(data, validate=True)
            except ValueError as error:
                raise DataError(f"{place}: column {column}: bytes are no base64 ({one_line(error)})") from error
    elif isinstance(cell, str):
        data, path = None, cell
    if data is None:
        if not isinstance(path, str | None):
            raise DataError(f"{place}: column {column} has {kind_of(path)} for a path; expected a text")
        return None if path is None else Photo(_read_image(path, source, place), place)
    if not isinstance(data, bytes):
        raise DataError(f"{place}: column {column} holds {kind_of(data)}; expected encoded image bytes")
    return Photo(data, place)


def _read_image(name: str, source: str, place: str) -> bytes:
    split = Path(source.rpartition(":")[0]).parent
    for base in (split, split.parent):
        path = path_inside(split.parent, base / name, place)
        try:
            if path.is_file():
                return path.read_bytes()
        except OSError as error:  # a name that is too long, a file that nobody may read
            raise DataError(
                f"{place}: image {name[:80]!r} cannot be read ({error.strerror}); check the path"
            ) from error
    raise DataError(f"{place}: image {name!r} is neither in {split} nor in {split.parent}; check the path")


def path_inside(root: Path, path: Path, place: str) -> Path:
    """`path` without its `..`, if that lies inside `root`; else `DataError`. Links are not followed: the hub's cache
    consists of links to files elsewhere."""
    if "\0" in str(path):
        raise DataError(
            f"{place}: image {str(path)!r} has a null character in its name; give a path relative to {root}"
        )
    path = Path(os.path.abspath(path))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(f"{place}: image {path} is outside the data folder; put it there and give a relative path")
    return path


def each_profile(
    folder: Folder,
    split: str,
    parse: Callable[[Row, str], Profile],
    required: Collection[str | tuple[str, ...]],
    wanted: Collection[str],
) -> Iterator[Profile | DataError]:
    """`parse(row, source)` of every row of a split in file order. A row or file that cannot be used comes as its
    `DataError`, so that a check can go on."""
    try:
        files = split_files(folder, split)
    except DataError as error:
        yield error
        return
    for file in files:
        try:
            for source, row in rows(file, required, wanted):
                try:
                    yield refuse_placeholders(parse(row, source))
                except DataError as error:
                    yield error
        except DataError as error:  # the file as a whole: unreadable, or a column missing
            yield error


def strict(profiles: Iterable[Profile | DataError]) -> list[Profile]:
    """The profiles; raises the first `DataError` among them."""
    found = []
    for profile in profiles:
        if isinstance(profile, DataError):
            raise profile
        found.append(profile)
    return found


def four_cells(
    available: Collection[str],
    read: Callable[[str], list[Profile]],
    forget: str,
    test: str,
    retain: str,
    realworld: str,
    **others: str,
) -> dict[str, list[Profile]]:
    """The cells forget, test (forgotten entities only), retain and realworld, from the splits of these names, and
    `others` by cell. Only the splits of forget and retain must be there. Raises `DataError` where the test split shows
    nobody who is forgotten: its cell would be empty, and nothing said of unseen photos."""
    cells = {"forget": read(forget)}
    if test in available:
        known = {person_key(profile.entity): profile.entity for profile in cells["forget"]}
        shown = read(test)
        same = [(profile, known.get(person_key(profile.entity))) for profile in shown]
        cells["test"] = [replace(profile, entity=entity) for profile, entity in same if entity is not None]
        refuse_test_of_others(test, {profile.entity for profile in shown}, forget, set(known.values()))
    cells["retain"] = read(retain)
    if realworld in available:
        cells["realworld"] = read(realworld)
    return cells | {cell: read(split) for cell, split in others.items() if split in available}


def refuse_test_of_others(test: str, shown: set[str], forget: str, forgotten: set[str]) -> None:
    """Raises `DataError` where the entities `shown` in the test split are all others than those `forgotten`."""
    if shown and forgotten and not set(map(person_key, shown)) & set(map(person_key, forgotten)):
        raise DataError(
            f"{test}: shows nobody of {forget} (ids there like {min(forgotten)!r}, here like {min(shown)!r}), so "
            "nothing would be said of unseen photos; give both the same ids, or take the split away"
        )


def entity_of(value: Any, place: str) -> str:
    """The id of an entity, written in one way: whole numbers without a fraction (pandas makes 1.0 of 1 where a column
    has gaps), texts composed (NFC) and without stray space. Raises `DataError` where there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value or not (text := " ".join(str(value).split())):
        raise DataError(f"{place} is empty; every row needs the id of its entity")
    number = re.fullmatch(r"(\d+)\.0+", text)
    return number[1] if number else unicodedata.normalize("NFC", text)


def person_key(entity: str) -> str:
    """By what entities of two splits are the same: `001` and `1` are."""
    return entity.lstrip("0") or "0" if entity.isdecimal() else entity


def text_of(cell: Row, key: str, place: str) -> str:
    """The text under `key`. Raises `DataError` if it is no text, or blank."""
    value = cell.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {key} is {kind_of(value)}; a text is needed")
    return value


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "null"
    return repr(value) if value == "" else f"a {type(value).__name__}"
