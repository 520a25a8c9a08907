"""A kill while a folder is being deleted leaves nothing that looks whole, and what it leaves goes at the next start."""

import re
import shutil
from pathlib import Path

import pytest

from fastvkd.engines.checkpoints import find_latest, go_back, set_aside
from fastvkd.engines.manifests import MANIFEST, WEIGHTS, rank_file, write_manifest
from fastvkd.engines.purging import purge
from fastvkd.files import delete_folder, delete_unfinished, new_folder
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
