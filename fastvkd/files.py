"""Writing files so that a kill or a full disk never leaves half of one."""

import os
from pathlib import Path

from fastvkd.errors import TrainingError, disk_is_full


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
