"""Files of others read with the place named where one is damaged; own files written whole or not at all, and a folder
kept to one process."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from fastvkd.errors import FastVKDError, TrainingError, disk_is_full, one_line

# How a file begins that git has left in place of a large one.
_LFS = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape for half a character, which JSON allows and UTF-8 does not


def lfs_pointer(content: bytes) -> str:
    """What to say of a file's first bytes if they are a Git LFS pointer in place of its content; else empty."""
    if not content.startswith(_LFS):
        return ""
    return "is a Git LFS pointer and not the file itself; run `git lfs pull` there, or download it again"


def is_special(path: Path) -> bool:
    """Whether a path is there and is neither file nor folder: a pipe is waited for, and a device may have no end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read_text(path: Path, kind: type[FastVKDError], mend: str) -> str:
    """The text of a UTF-8 file, without the byte-order mark that editors on Windows write.

    Raises `kind`, naming file and `mend`, where the file cannot be read, is no UTF-8 or is a Git LFS pointer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error}); {mend}") from error
    if pointer := lfs_pointer(content):
        raise kind(f"{path}: {pointer}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise kind(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def text_lines(text: str) -> Iterator[tuple[int, str]]:
    """Every line that is not blank with its number from 1, as editors count: other separators stand within texts."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield number, line


def parse_json(text: str, place: str, kind: type[FastVKDError], mend: str, *, strict: bool = False) -> Any:
    """The value that `text` says in JSON. `place` (file, or file and line) opens the message.

    Raises `kind` for text that is no JSON, says a key twice in one object, is nested deeper than Python follows, has a
    number of thousands of digits, or half a character (a lone surrogate), which nothing can write out again; where it
    is `strict` also for NaN and infinities, which Python reads and others do not.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant if strict else None)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except _KeyTwice as error:
        raise kind(f"{place}: says {error.args[0]!r} twice in one object; keep one of them") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise kind(f"{place}: not JSON ({error.msg} at {where}); {mend}") from error
    except RecursionError as error:
        raise kind(f"{place}: JSON nested too deeply; {mend}") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise kind(f"{place}: {half!a} is half a character (a lone surrogate); write the whole one") from error
    except ValueError as error:
        raise kind(f"{place}: not JSON that can be read ({one_line(error, 80)}); {mend}") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class _KeyTwice(Exception):
    """A key stands twice in an object; readers of JSON take the last one without a word."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwice(next(key for key in keys if keys.count(key) > 1))
    return found


def json_sha256(content: Any) -> str:
    """SHA-256, in hex, of what a JSON value says, in whatever order its keys stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def json_lines(path: Path, kind: type[FastVKDError], mend: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a file of JSON lines with its place, file and line; raises `kind` as `read_text` and `parse_json`
    do, and for a line that is no object."""
    for number, line in text_lines(read_text(path, kind, mend)):
        place = f"{path}:{number}"
        value = parse_json(line, place, kind, mend)
        if not isinstance(value, dict):
            raise kind(f"{place}: holds a {type(value).__name__} and not an object; {mend}")
        yield place, value


def read_json(path: Path, kind: type[FastVKDError], mend: str) -> Any:
    """The value in a JSON file; raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path, kind, mend), str(path), kind, mend)


def read_json_object(path: Path, kind: type[FastVKDError], mend: str) -> dict[str, Any]:
    """As `read_json`, of a file that must hold an object."""
    value = read_json(path, kind, mend)
    if not isinstance(value, dict):
        raise kind(f"{path}: holds a {type(value).__name__} and not an object; {mend}")
    return value


log = logging.getLogger("fastvkd")
_LOCK = ".lock"
UNFINISHED = ".unfinished-"  # how the name of a folder begins that is being filled or deleted
DELETED = f"{UNFINISHED}deleted-"  # and that is being deleted
_EXPORTING = ".exporting-"


def delete_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder, or the link in its place, so that a kill in the middle leaves no half of it under its name.

    What is left then has the name of an unfinished one: `delete_unfinished` removes it. Raises OSError, unless
    told to leave what cannot be deleted.
    """
    with contextlib.suppress(OSError) if ignore_errors else contextlib.nullcontext():
        if folder.is_symlink():
            folder.unlink()
            return
        if not folder.name.startswith(UNFINISHED):
            doomed = folder.with_name(f"{DELETED}{folder.name}")
            if doomed.exists():  # of a deletion that was killed
                delete_folder(doomed)
            folder = folder.rename(doomed)
            sync(folder.parent)  # else the disk may lose the name later than the content
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def delete_unfinished(parent: Path, beginning: str = UNFINISHED) -> None:
    """Remove what commands that were killed left in `parent`, but for an export that another one fills right now.

    Where others may be at work there, `beginning` is `DELETED`: what is being deleted nobody wants.
    """
    for leftover in parent.glob(f"{beginning}*"):
        if not _is_locked(parent / f"{_EXPORTING}{leftover.name.removeprefix(UNFINISHED)}" / _LOCK):
            delete_folder(leftover, ignore_errors=True)  # ranks may do so together


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_locked(file: Path) -> bool:
    """Whether a process, this one included, has locked the file, or nobody can tell."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # somebody else's
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: then nobody can tell
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def held(folder: Path, key: str) -> Iterator[None]:
    """Keep `folder`, made if need be, to this process until the end; the lock goes with the process, however it ends.

    Nothing is left of a folder that was made here and stayed empty. `key` names the setting or option that says which
    folder. Raises TrainingError where another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _LOCK
    descriptor = _lock(file, folder, key)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is let go: whoever opens it now finds that it is gone
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def new_folder(to: Path, key: str, needed: str) -> Iterator[Path]:
    """A folder to be filled, which becomes `to` (not there, or empty) once that is done; else nothing is left of it.

    key: as in `held`. needed: how much room, for the message of a full disk. Raises TrainingError for that, and where
    another process writes to `to`.
    """
    with _beside(to, key):
        yield from _filled(to, needed)


def refuse_filled(to: Path, key: str, mend: str) -> None:
    """Raise TrainingError where `to` is there and no empty folder; what a killed `new_folder` left beside it goes."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        if to.with_name(f"{_EXPORTING}{to.name}").exists():
            with _beside(to, key):
                delete_folder(to.with_name(f"{UNFINISHED}{to.name}"), ignore_errors=True)
        raise TrainingError(f"{to}: exists and is not an empty folder; {mend}")


@contextlib.contextmanager
def _beside(to: Path, key: str) -> Iterator[None]:
    """The name `to` is kept to this process by a folder beside it."""
    lock = to.with_name(f"{_EXPORTING}{to.name}")
    try:
        with held(lock, key):
            yield
    finally:
        with contextlib.suppress(OSError):  # left by a command that was killed, or held by another one
            lock.rmdir()


def _filled(to: Path, needed: str) -> Iterator[Path]:
    unfinished = to.with_name(f"{UNFINISHED}{to.name}")
    delete_folder(unfinished, ignore_errors=True)  # of a command that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if to.exists():
            to.rmdir()
        unfinished.rename(to)
    except OSError as error:
        if disk_is_full(error):
            raise TrainingError(f"{to}: no space left on the device; {needed}") from error
        raise
    finally:
        delete_folder(unfinished, ignore_errors=True)


def _lock(file: Path, folder: Path, key: str) -> int:
    """The descriptor of a lock file that this process has locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise TrainingError(
                f"{folder}: another process writes here (process {holder}); wait for its end, or set another {key}"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(descriptor)
                raise
            log.warning("%s: this file system has no locks, so make sure that nothing else writes here", folder)
            return descriptor
        os.close(descriptor)  # its holder took it away between our opening and locking it


def _remove_rests(folder: Path, beginning: str) -> None:
    """Remove what processes of this machine that were killed in `write_atomically` have left of a file."""
    for rest in folder.glob(f"{glob.escape(beginning)}*.tmp"):
        if not _is_locked(rest):
            rest.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(folder: Path, beginning: str) -> Iterator[BinaryIO]:
    """A new file to write to, which nobody takes for a rest as long as it is open; nothing is left of its name.

    The lock says who is at work: a process number may be another one's in a container that sees the same folder.
    """
    while True:
        temporary = folder / f"{beginning}{secrets.token_hex(4)}.tmp"
        with open(temporary, "xb") as file:
            try:
                with contextlib.suppress(OSError):  # a file system without locks: rests stay there
                    fcntl.flock(file, fcntl.LOCK_EX)
                if temporary.exists():  # and was not taken for a rest before it was locked
                    yield file
                    return
            finally:
                temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` holds all of it or what it held before, never a part.

    Raises:
        TrainingError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    here = f".{path.name}.{socket.gethostname()}-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_rests(path.parent, here)
        with _temporary(path.parent, here) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    except OSError as error:
        if disk_is_full(error):
            mend = f"no space on disk for its {len(data):,} bytes; free some, or set another output_dir"
        else:
            mend = f"{error.strerror or error}; set an output_dir that can be written"
        raise TrainingError(f"{path}: cannot be written: {mend}") from error
