"""Two hundred ways in which a folder may be broken, each drawn from its number alone."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
Rng = random.Random
# Keys that may be left out or changed, and the file then says something else that is as good: what a user asked for,
# and of a question whether it has a photo, options or a name.
_NOBODY_CAN_TELL = {"settings", "image", "options", "name", "description", "entity", "lora_alpha"}


class DoesNotApply(Exception):
    """This kind of break is not one of this folder: it has no such file, or the system lets root read everything."""


@dataclass(frozen=True)
class Break:
    """What was done to a folder. `names`: one of them must stand in the error that it leads to."""

    kind: str
    names: tuple[str, ...]
    told: str


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _pick(rng: Rng, folder: Path, *endings: str) -> Path:
    """A file; each ending is as likely as another, so that hundreds of photos do not hide one manifest."""
    by_ending: dict[str, list[Path]] = {}
    for path in files_of(folder):
        if not endings or path.suffix in endings:
            by_ending.setdefault(path.name if path.suffix == ".json" else path.suffix, []).append(path)
    if not by_ending:
        raise DoesNotApply
    return rng.choice(by_ending[rng.choice(sorted(by_ending))])


def _done(kind: str, folder: Path, *paths: Path, told: str = "") -> Break:
    """A break of `paths`. A message may name the file, or the folder that it is in."""
    names = {path.name for path in paths} | {str(path.parent) for path in paths}
    where = ", ".join(path.relative_to(folder).as_posix() for path in paths)
    return Break(kind, tuple(sorted(names)), f"{kind}: {where}{' ' * bool(told)}{told}")


def truncated(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    size = file.stat().st_size
    keep = rng.randrange(size) if size else 0
    os.truncate(file, keep)
    return _done("truncated", folder, file, told=f"to {keep} of {size} bytes")


def appended(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder, ".json", ".jsonl", ".parquet", ".safetensors", ".pt")
    with file.open("ab") as opened:
        opened.write(rng.randbytes(rng.randrange(1, 100)))
    return _done("bytes behind the end", folder, file)


def flipped(rng: Rng, folder: Path) -> Break:
    """A byte of what is protected by digests, or of a header's beginning."""
    file = _pick(rng, folder, ".parquet", ".safetensors", ".pt", ".bin")
    content = bytearray(file.read_bytes())
    whole = "checkpoint" in str(file) or "teacher_cache" in str(file) or file.suffix == ".parquet"
    at = rng.randrange(len(content) if whole else min(16, len(content)))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return _done("a flipped bit", folder, file, told=f"of byte {at}")


def deleted(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.unlink()
    return _done("a file deleted", folder, file)


def emptied(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.write_bytes(b"")
    return _done("a file of 0 bytes", folder, file)


def zeroed(rng: Rng, folder: Path) -> Break:
    """The right length and nothing in it: what some file systems leave after a power cut."""
    file = _pick(rng, folder, ".json", ".jsonl", ".parquet", ".pt")
    file.write_bytes(bytes(file.stat().st_size))
    return _done("a file of null bytes", folder, file)


def swapped(rng: Rng, folder: Path) -> Break:
    one, other = _pick(rng, folder), _pick(rng, folder)
    if one.name == other.name or one.suffix == other.suffix:
        raise DoesNotApply
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return _done("two files swapped", folder, one, other)


def directory(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.unlink()
    file.mkdir()
    return _done("a folder in place of a file", folder, file)


def pointer(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.write_bytes(LFS)
    return _done("a Git LFS pointer", folder, file)


def page(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.write_bytes(b"<!DOCTYPE html><html><head><title>404</title></head></html>")
    return _done("a web page in place of a file", folder, file)


def marked(rng: Rng, folder: Path) -> Break:
    """A byte-order mark, as an editor on Windows writes it."""
    file = _pick(rng, folder, ".json", ".jsonl")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return _done("a byte-order mark", folder, file)


def utf16(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder, ".json", ".jsonl")
    file.write_bytes(file.read_bytes().decode().encode("utf-16"))
    return _done("text in UTF-16", folder, file)


def link_out(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.unlink()
    file.symlink_to("/etc/hostname-that-is-not-there")
    return _done("a link to nothing", folder, file)


def link_loop(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    file.unlink()
    file.symlink_to(file.name)
    return _done("a link to itself", folder, file)


def pipe(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder, ".parquet", ".png", ".jpg")
    file.unlink()
    os.mkfifo(file)
    return _done("a pipe in place of a file", folder, file)


def forbidden(rng: Rng, folder: Path) -> Break:
    if os.geteuid() == 0:
        raise DoesNotApply
    file = _pick(rng, folder)
    file.chmod(0)
    return _done("a file that may not be read", folder, file)


def hidden(rng: Rng, folder: Path) -> Break:
    """What macOS and editors leave beside every file."""
    file = _pick(rng, folder)
    beside = file.with_name(f"._{file.name}")
    beside.write_bytes(b"\0\5\x16\7" + rng.randbytes(60))
    return _done("a hidden file beside", folder, beside, file)


def stray(rng: Rng, folder: Path) -> Break:
    """A name that is no UTF-8 text."""
    file = _pick(rng, folder)
    odd = os.path.join(os.fsencode(file.parent), b"caf\xe9.txt")
    with open(odd, "wb") as opened:
        opened.write(b"notes")
    return _done("a name that is no UTF-8", folder, file, Path(os.fsdecode(odd)))


def wrong_case(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder)
    other = file.with_name(file.name.upper() if file.name != file.name.upper() else file.name.lower())
    file.rename(other)
    return _done("a name in the wrong case", folder, file, other)


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if here:
        yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from paths_in(part, (*here, key))


def _edit(rng: Rng, folder: Path, kind: str, change: Callable[[Any, Any], None], *, deep: bool = True) -> Break:
    """Change the value at a random place of a JSON file, or of a random line of one of JSON lines."""
    file = _pick(rng, folder, ".json", ".jsonl")
    lines = file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
    number = rng.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
    try:
        value = json.loads(lines[number])
    except ValueError as error:
        raise DoesNotApply from error
    places = [place for place in paths_in(value) if (deep or len(place) == 1) and not _NOBODY_CAN_TELL & set(place)]
    if not places:
        raise DoesNotApply
    place = rng.choice(places)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    lines[number] = json.dumps(value, indent=None if file.suffix == ".jsonl" else 1)
    file.write_text("\n".join(lines))
    return _done(kind, folder, file, told=f"at {'.'.join(map(str, place))}, line {number + 1}")


def wrong_type(rng: Rng, folder: Path) -> Break:
    def change(inner: Any, key: Any) -> None:
        old = inner[key]
        inner[key] = [old] if not isinstance(old, list) else {"value": old}

    return _edit(rng, folder, "JSON of a wrong type", change)


def key_removed(rng: Rng, folder: Path) -> Break:
    return _edit(rng, folder, "a key or entry removed", lambda inner, key: inner.pop(key), deep=False)


def null(rng: Rng, folder: Path) -> Break:
    return _edit(rng, folder, "null in place of a value", lambda inner, key: inner.__setitem__(key, None), deep=False)


def huge(rng: Rng, folder: Path) -> Break:
    number = rng.choice([10**30, -(10**30), 1e308, 2**63])

    def change(inner: Any, key: Any) -> None:
        if isinstance(inner[key], bool) or not isinstance(inner[key], int | float):
            raise DoesNotApply
        inner[key] = number

    return _edit(rng, folder, "a huge number", change)


def not_a_number(rng: Rng, folder: Path) -> Break:
    def change(inner: Any, key: Any) -> None:
        if isinstance(inner[key], bool) or not isinstance(inner[key], int | float):
            raise DoesNotApply
        inner[key] = math.nan

    return _edit(rng, folder, "NaN in place of a number", change)


def separator(rng: Rng, folder: Path) -> Break:
    """A character within a text that some readers take for the end of a line."""

    def change(inner: Any, key: Any) -> None:
        if not isinstance(inner[key], str) or " " not in inner[key]:
            raise DoesNotApply
        inner[key] = inner[key].replace(" ", "\u2028", 1)

    return _edit(rng, folder, "U+2028 within a text", change)


def control(rng: Rng, folder: Path) -> Break:
    """A sequence that a terminal would obey, within a text that a message may quote."""

    def change(inner: Any, key: Any) -> None:
        if not isinstance(inner[key], str):
            raise DoesNotApply
        inner[key] = "\x1b[2J\r" + inner[key]

    return _edit(rng, folder, "terminal controls within a text", change)


def deep(rng: Rng, folder: Path) -> Break:
    file = _pick(rng, folder, ".json", ".jsonl")
    file.write_text("[" * 100_000)
    return _done("JSON nested without end", folder, file)


BREAKS: tuple[Callable[[Rng, Path], Break], ...] = (
    truncated, appended, flipped, deleted, emptied, zeroed, swapped, directory, pointer, page, marked, utf16, link_out,
    link_loop, pipe, forbidden, hidden, stray, wrong_case, wrong_type, key_removed, null, huge, not_a_number, separator,
    control, deep,
)  # fmt: skip


def break_folder(number: int, whole: Path, to: Path) -> Break:
    """A copy of the folder `whole` at `to`, broken in the way of this number."""
    rng = random.Random(number)
    ways = rng.sample(BREAKS, len(BREAKS))
    ways = ways[number % len(BREAKS) :] + ways[: number % len(BREAKS)]
    for way in ways:
        for _ in range(3):
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(whole, to, symlinks=True)
            try:
                return way(rng, to)
            except DoesNotApply:
                continue
    raise AssertionError(f"no way to break {whole}")
