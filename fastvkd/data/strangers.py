"""Photos of people whom the model does not know: a folder of images, those of one person in a subfolder."""

from pathlib import Path

from PIL import Image

from fastvkd.errors import DataError
from fastvkd.records import Photo


def read_strangers(folder: str | Path) -> list[list[Photo]]:
    """The photos of each stranger, in the order of their names. An image that lies in no subfolder is a stranger's only
    one. Raises DataError where there is no folder, or no image in it."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; strangers names one that holds their photos")
    endings = Image.registered_extensions()
    strangers: dict[Path, list[Photo]] = {}
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.suffix.lower() in endings and not hidden and file.is_file():
            whose = file if file.parent == root else file.parent
            strangers.setdefault(whose, []).append(Photo(file.read_bytes(), str(file)))
    if not strangers:
        raise DataError(f"{root}: holds no image; strangers names a folder of photos, one subfolder a person")
    return list(strangers.values())
