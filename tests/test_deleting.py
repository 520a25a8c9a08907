"""A kill while a folder is being deleted leaves nothing that looks whole, and what it leaves goes at the next start."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvkd.engines.checkpoints import find_latest, go_back, set_aside
from fastvkd.engines.manifests import MANIFEST, WEIGHTS, rank_file, write_manifest
from fastvkd.engines.purging import purge
from fastvkd.files import delete_folder, delete_unfinished, new_folder, write_atomically
from fastvkd.unlearning.start import begin
from fastvkd.unlearning.vkd.teacher import FeatureCache


class Killed(BaseException):
    """As SIGKILL: nothing of ours is run after it but what a test wants."""


@pytest.fixture
def killed_halfway(monkeypatch):
    """`shutil.rmtree` deletes one file, not the manifest, and is killed; as directories are read in any order."""

    def halfway(folder, *_, **__):
        next(path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != MANIFEST).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", halfway)


def checkpoint(output: Path, updates: int) -> Path:
    folder = output / f"checkpoint-{updates}"
    folder.mkdir(parents=True)
    files = (WEIGHTS, rank_file(0))
    for name in files:
        (folder / name).write_text("{}")
    nothing = {"sampler": {}, "settings": {}, "base_model": {"path": "", "fingerprint": ""}}
    write_manifest(folder, {"updates": updates, "world_size": 1, **nothing, "sha256": dict.fromkeys(files, "")})
    return folder


def looks_whole(root: Path) -> set[str]:
    """Checkpoints under `root` that are not of an unfinished folder but lack a file."""
    manifests = (path.parent for path in root.rglob(MANIFEST))
    named = (folder for folder in manifests if not any(part.startswith(".unfinished-") for part in folder.parts))
    return {folder.name for folder in named if len(list(folder.iterdir())) < 3}


DELETIONS = {
    "go_back": lambda run: go_back(run, 3, 2, run / "best"),
    "set_aside": lambda run: set_aside(run, delete=True),
    "purge": lambda run: purge(run),
    "delete_folder": lambda run: delete_folder(run / "best"),
}


@pytest.mark.parametrize("deletion", DELETIONS)
def test_a_kill_while_deleting_leaves_no_half_of_a_checkpoint(tmp_path, killed_halfway, deletion):
    for updates in (1, 2, 3):
        checkpoint(tmp_path, updates)
    checkpoint(tmp_path / "best", 2)
    with pytest.raises(Killed):
        DELETIONS[deletion](tmp_path)
    assert not looks_whole(tmp_path) and list(tmp_path.glob(".unfinished-*"))


def test_what_a_killed_deletion_left_goes_at_the_next_start(tmp_path, monkeypatch, killed_halfway):
    checkpoint(tmp_path, 1)
    with pytest.raises(Killed):
        delete_folder(tmp_path / "checkpoint-1")
    checkpoint(tmp_path, 1)  # written again, and to be deleted again
    monkeypatch.undo()
    delete_folder(tmp_path / "checkpoint-1")
    delete_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_link_is_removed_and_not_followed(tmp_path):
    kept = checkpoint(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoint-1").symlink_to(kept)
    delete_folder(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").is_symlink() and find_latest(tmp_path / "elsewhere") == kept
    (tmp_path / ".unfinished-checkpoint-1").symlink_to(kept)
    delete_unfinished(tmp_path)
    assert not list(tmp_path.glob(".unfinished-*")) and find_latest(tmp_path / "elsewhere") == kept


def test_an_export_under_way_is_not_taken_for_what_a_killed_one_left(tmp_path):
    """A run's folder may be exported into while the run goes on and clears it up."""
    for name in (".unfinished-whole", ".exporting-killed", ".unfinished-killed"):
        (tmp_path / name).mkdir()
    (tmp_path / ".exporting-killed" / ".lock").write_text("1")  # its process is gone, and so is the lock
    with new_folder(tmp_path / "model", "--to", "room") as folder:
        delete_unfinished(tmp_path)
        assert [path.name for path in tmp_path.glob(".unfinished-*")] == [folder.name]
    assert (tmp_path / "model").is_dir()


def test_an_export_clears_up_after_one_that_was_killed(tmp_path):
    left = tmp_path / ".unfinished-model"
    left.mkdir()
    (left / "model-1.safetensors").write_text("half")
    with new_folder(tmp_path / "model", "--to", "room") as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_a_file_under_way_is_not_taken_for_what_a_killed_write_left(tmp_path, monkeypatch):
    """The two may be of containers that share the folder, where the number of the one is nobody's to the other."""
    file, sync = tmp_path / "report.json", os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.undo()
        sync(descriptor)
        write_atomically(file, b"the other's")

    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # which no process has
    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(file, b"the one's")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"the one's"


def test_a_file_that_is_taken_for_a_rest_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    file, lock = tmp_path / "report.json", fcntl.flock

    def late(*told: Any) -> None:
        monkeypatch.undo()
        for rest in tmp_path.iterdir():
            rest.unlink()
        lock(*told)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomically(file, b"whole")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"whole"


def test_what_a_killed_write_left_goes_at_the_next_one_whosever_its_number_is_by_now(tmp_path):
    file = tmp_path / "report.json"
    killed = f"""
import os, signal
from fastvkd.files import write_atomically
os.getpid = lambda: 1
os.fsync = lambda _: signal.raise_signal(signal.SIGKILL)
write_atomically({str(file)!r}, b"half")
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    write_atomically(file, b"whole")
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_clears_up_after_a_purge_that_was_killed(tmp_path, monkeypatch, killed_halfway):
    def cache() -> FeatureCache:
        return FeatureCache(tmp_path, site="projector", dtype="float32", ingredients={})

    with pytest.raises(Killed):
        delete_folder(cache().folder)
    monkeypatch.undo()
    folder = cache().folder
    assert list(tmp_path.iterdir()) == [folder]


def test_a_run_clears_up_in_its_folders(tmp_path, world):
    for folder in ("", "best", "trials"):
        (tmp_path / "run" / folder / ".unfinished-checkpoint-2").mkdir(parents=True)
    begin(world.settings(tmp_path / "run")).take_over()
    assert not list((tmp_path / "run").rglob(".unfinished-*"))


def test_folders_are_deleted_in_one_place():
    """Every other one would have to remember that a kill may come in the middle."""
    sources = Path(__file__).parents[1] / "fastvkd"
    found = {path.relative_to(sources).as_posix() for path in sources.rglob("*.py") if "rmtree" in path.read_text()}
    assert found == {"files.py"}
    assert len(re.findall(r"rmtree\(", (sources / "files.py").read_text())) == 1
