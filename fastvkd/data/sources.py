"""The forget and retain sets of a run, from any supported folder, with what would make the run meaningless refused."""

from collections.abc import Callable
from pathlib import Path

from fastvkd.data import jsonl, mllmu
from fastvkd.data.images import content_hash
from fastvkd.data.records import Profile
from fastvkd.errors import DataError


def read_forget_retain(folder: str, forget_split: str, retain_split: str) -> tuple[list[Profile], list[Profile]]:
    """Profiles with images of both sides.

    Raises DataError: an empty side, or an entity or image that is in both.
    """
    if jsonl.splits(folder):  # own data names its splits itself
        forget_split, retain_split = "forget", "retain"
    read = _reader(folder)
    forget, retain = read(folder, forget_split), read(folder, retain_split)
    for split, profiles in ((forget_split, forget), (retain_split, retain)):
        if not any(profile.photos for profile in profiles):
            raise DataError(
                f"{Path(folder) / split}: holds no image; name another split with forget_split/retain_split"
            )
    shared = {p.entity for p in forget} & {p.entity for p in retain}
    if shared:
        raise DataError(
            f"{folder}: entity {sorted(shared)[0]!r} is in both {forget_split} and {retain_split} "
            f"({len(shared)} in all); remove it from one of them"
        )
    seen = {content_hash(photo.data): photo.source for p in forget for photo in p.photos}
    for profile in retain:
        for photo in profile.photos:
            twin = seen.get(content_hash(photo.data))
            if twin:
                raise DataError(
                    f"{photo.source}: the same image as {twin}, in {forget_split}; remove it from one of them"
                )
    return forget, retain


def read_split(folder: str, split: str) -> list[Profile]:
    """The profiles of one split. Raises DataError where it has no image."""
    profiles = _reader(folder)(folder, split)
    if not any(profile.photos for profile in profiles):
        raise DataError(f"{Path(folder) / split}: holds no image; name another split with finetune_split")
    return profiles


def evaluation_cells(folder: str, forget_split: str, retain_split: str) -> dict[str, list[Profile]]:
    """The four sets of an evaluation: forget, test (unseen photos of the same entities), retain and realworld.

    Test_Set and Retain_Set (own data: test and realworld) may be missing; then so are their cells.
    """
    forget, retain = read_forget_retain(folder, forget_split, retain_split)
    cells = {"forget": forget}
    own = bool(jsonl.splits(folder))
    available, read = (jsonl if own else mllmu).splits(folder), _reader(folder)
    test, realworld = ("test", "realworld") if own else ("Test_Set", "Retain_Set")
    if test in available:
        entities = {profile.entity for profile in forget}
        cells["test"] = [profile for profile in read(folder, test) if profile.entity in entities]
    cells["retain"] = retain
    if realworld in available:
        cells["realworld"] = read(folder, realworld)
    return cells


def _reader(folder: str) -> Callable[[str, str], list[Profile]]:
    return jsonl.read_split if jsonl.splits(folder) else mllmu.read_split
