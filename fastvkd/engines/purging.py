"""Removes from the output folder of a command what tells of the people it was about: `fastvkd purge RUN`.

What proves the work stays: the newest checkpoint, figures, certificates. No file outside the folder is touched, and no
link is followed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvkd.engines.checkpoints import find_latest
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import TrainingError
from fastvkd.files import DELETED, delete_folder

# Patterns in an output folder, and what they hold of the photos, questions or names.
REMOVED = (
    ("teacher_cache", "features of every photo, targets and maps made from them"),
    ("trials", "a checkpoint of trial steps on the photos"),
    ("best", "a checkpoint that was kept while training"),
    (".unfinished-*", "what a command left that was cut off"),
    (".*.tmp", "what a command left that was cut off"),
    ("*.partial", "what a command left that was cut off"),
    ("trace.json", "a trace of training steps"),
    ("samples*.jsonl", "every question with its answers and photos' hashes"),
    ("attacks.jsonl", "the attacks' journal, with questions"),
    ("lmms-eval.log", "what lmms-eval said when it failed, which may quote questions"),
    ("report.html", "a page that may show photos with answers"),
)
# What a command leaves in its output folder: a folder without any of these is not touched.
_TRACES = (
    *("metrics.jsonl", "results.json", "lmms-eval.log", "attacks.json", "attacks.jsonl", "report.json"),
    "checkpoint-*",
)


@dataclass(frozen=True)
class Remains:
    """One thing that `purge` found: why it goes, or stays."""

    path: Path
    why: str
    files: int = 1
    bytes: int = 0


@dataclass(frozen=True)
class Purged:
    """What `purge` removed (or would), and what it left with the reason."""

    removed: list[Remains]
    kept: list[Remains]


def purge(run: Path, *, cache: bool = False, dry_run: bool = False) -> Purged:
    """Remove what is left of the people in the output folder `run`: `REMOVED`, and every checkpoint but the newest.

    cache: also the run's teacher cache outside the folder, which other runs may share. dry_run: only list. Raises
    TrainingError where `run` is no output folder.
    """
    if not run.is_dir() or not any(next(run.glob(trace), None) for trace in _TRACES):
        raise TrainingError(f"{run}: no output of train, eval, attack or demo in it; name the folder of one of them")
    removed = [_remains(path, why) for pattern, why in REMOVED for path in sorted(run.glob(pattern))]
    newest = find_latest(run)
    older = (path for path in sorted(run.glob("checkpoint-*")) if newest is not None and path != newest)
    removed += [_remains(path, "an earlier state, nearer to the model before") for path in older]
    kept = [_remains(newest, "the newest weights; delete them once they are exported")] if newest else []
    for shared in _shared_cache(run, newest):
        target = removed if cache else kept
        target.append(_remains(shared, "a teacher cache that other runs may share" + ("" if cache else "; --cache")))
    kept += [
        _remains(run / name, "figures, by entity id where there are some")
        for name in ("results.json", "attacks.json", "report.json", "certificate.json", "metrics.jsonl", "tensorboard")
        if (run / name).exists()
    ]
    for one in [] if dry_run else removed:
        if one.path.is_dir():
            delete_folder(one.path)
        else:
            one.path.unlink(missing_ok=True)  # a folder takes along what is left of an earlier one of its name
    return Purged(removed, kept)


def _remains(path: Path, why: str) -> Remains:
    if path.is_symlink():
        return Remains(path, f"{why}; a link: what it leads to, {path.resolve()}, stays")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Remains(path, why, len(files), sum(file.lstat().st_size for file in files))


def _shared_cache(run: Path, newest: Path | None) -> Iterator[Path]:
    """The parts of a teacher cache outside the folder: those that say of themselves that they are one, and what is left
    of those that were being deleted."""
    if newest is None:
        return
    folder = read_manifest(newest)["settings"].get("cache_dir")
    if not isinstance(folder, str) or not Path(folder).is_dir() or Path(folder).resolve().is_relative_to(run.resolve()):
        return
    for path in sorted(Path(folder).iterdir()):
        is_cache = (path / "ingredients.json").is_file()
        ours = is_cache or path.name.startswith(DELETED) or path.match("stranger-*.safetensors")
        if not path.is_symlink() and ours:
            yield path


def described(purged: Purged, *, dry_run: bool) -> list[str]:
    """A line for each thing."""
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {one.path} ({one.files} files, {one.bytes:,} bytes): {one.why}" for one in purged.removed]
    lines += [f"kept {one.path}: {one.why}" for one in purged.kept]
    return lines or ["nothing to remove"]
