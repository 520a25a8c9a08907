"""Where the files that ship beside the code lie, configs/ above all: in the checkout, or in an installed package."""

import sys
from pathlib import Path

from fastvkd.errors import SettingsError


def shipped(relative: str) -> Path:
    """The path of a shipped file such as `configs/demo.yaml`. Raises SettingsError when it is not there."""
    roots = (Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "fastvkd")
    for root in roots:
        if (root / relative).exists():
            return root / relative
    raise SettingsError(
        f"{relative}: not found beside the code; run from a checkout of the repository or reinstall fastvkd"
    )
