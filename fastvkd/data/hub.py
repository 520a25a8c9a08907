"""Where a data set lies: a local folder as it is, or a data set of the Hugging Face hub, downloaded once."""

import re
from pathlib import Path

from fastvkd.errors import DataError

# Only tables and images: no pickles, archives or scripts.
_PATTERNS = [f"*.{end}" for end in ("parquet", "json", "jsonl", "png", "jpg", "jpeg", "webp", "bmp", "gif")]


def data_folder(data: str | Path, *, local_files_only: bool = False) -> Path:
    """The folder of `data`: a path, or a hub id (`owner/name`) that is cached or can be downloaded.

    `local_files_only` (or HF_HUB_OFFLINE=1) takes a hub id from the cache and never asks the network. Raises
    `DataError` when there is no such folder and no such data set.
    """
    if Path(data).is_dir():
        return Path(data)
    if Path(data).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(data)):
        raise DataError(f"{data}: no such folder; give the folder that holds the data, or a hub id like owner/name")
    from huggingface_hub import snapshot_download  # takes half a second to import

    try:
        return Path(
            snapshot_download(
                str(data), repo_type="dataset", allow_patterns=_PATTERNS, local_files_only=local_files_only
            )
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{data}: neither a folder nor a data set of the hub that is cached or reachable "
            f"({' '.join(str(error).split())[:160]}); give the path of a data folder"
        ) from error
