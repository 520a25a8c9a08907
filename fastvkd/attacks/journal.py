"""Finished figures, kept line by line, so that an attack that was interrupted goes on where it stopped."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvkd.errors import TrainingError, disk_is_full
from fastvkd.files import json_sha256, text_lines, write_atomically


class Journal:
    """Figures by all that they depend on: in memory, and where a `path` is given as one JSON line each.

    Args:
        path: lines that are there are used again where `common` and the figure's own facts are the same. Others stay:
            they may be wanted again. A line that was cut off, or whose digest differs, is dropped.
        common: what every figure depends on, as JSON, such as the data and the code.
    """

    def __init__(self, path: Path | None = None, common: Any = None) -> None:
        self._path, self._common = path, common
        self._found: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        lines = [row for _, line in text_lines(path.read_text("utf-8", errors="replace")) if (row := _read(line))]
        self._found = {line["key"]: line["found"] for line in lines}
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def kept(self, facts: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The figure that belongs to `facts`, measured now unless it is there. `facts` is JSON, and so is the figure.

        Raises TrainingError where the file cannot be written.
        """
        key = json_sha256([self._common, facts])
        if key not in self._found:
            row = json.loads(json.dumps({"key": key, **facts, "found": measure()}))
            self._append(json.dumps({**row, "digest": json_sha256(row)}))
            self._found[key] = row["found"]  # the same whether measured now or read
        return self._found[key]

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            full = disk_is_full(error)
            mend = "no space left on disk; free some or write elsewhere" if full else error.strerror or error
            raise TrainingError(f"{self._path}: cannot be written: {mend}") from error


def _read(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"key", "found"} <= set(row) or not isinstance(row["key"], str):
        return None
    said = {name: value for name, value in row.items() if name != "digest"}
    digest = json_sha256(said)
    return row if row.get("digest", digest) == digest else None  # versions before wrote none
