"""Writing files so that a kill or a full disk never leaves half of one; keeping a folder to one process."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastvkd.errors import TrainingError, disk_is_full

log = logging.getLogger("fastvkd")
_LOCK = ".lock"


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


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` holds all of it or what it held before, never a part.

    Raises:
        TrainingError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if disk_is_full(error):
            mend = f"no space on disk for its {len(data):,} bytes; free some, or set another output_dir"
        else:
            mend = f"{error.strerror or error}; set an output_dir that can be written"
        raise TrainingError(f"{path}: cannot be written: {mend}") from error
    finally:
        # A path whose parent is a file has no temporary to remove, and asking would raise over the real error.
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
