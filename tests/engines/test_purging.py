"""`fastvkd purge`: what tells of people goes, what proves the work stays, and only the owner could read either."""

import json
from pathlib import Path

import pytest

from fastvkd.cli import main
from fastvkd.engines.checkpoints import find_latest
from fastvkd.engines.purging import purge
from fastvkd.errors import TrainingError


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def trained(world, out: Path, *more: str) -> Path:
    command = ["train", f"model_name_or_path={world.model}", f"data={world.data}", f"forget_split={world.forget_split}"]
    command += [f"retain_split={world.retain_split}", f"output_dir={out}", "max_steps=2", "save_steps=1", "device=cpu"]
    assert main([*command, "per_device_train_batch_size=6", *more]) == 0
    return out


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A run of two checkpoints, and an evaluation beside it."""
    root = tmp_path_factory.mktemp("purged")
    trained(world, root / "run", f"cache_dir={root / 'cache'}", "save_total_limit=2")
    trained(world, root / "own")
    splits = ["--forget-split", world.forget_split, "--retain-split", world.retain_split, "--max-samples", "2"]
    told = ["--model", str(world.model), "--data", str(world.data), "--out", str(root / "eval"), "--device", "cpu"]
    assert main(["eval", *told, *splits]) == 0
    return root


def test_only_the_owner_can_read_what_is_written(run: Path) -> None:
    for path in [*(run / "run").rglob("*"), *(run / "own").rglob("*"), *(run / "eval").rglob("*"), run / "cache"]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_dry_run_lists_and_removes_nothing(run: Path, capsys) -> None:
    before = listed(run)
    assert main(["purge", str(run / "run"), str(run / "own"), str(run / "eval"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("own/teacher_cache", "eval/samples.jsonl", "run/checkpoint-1 "):
        assert f"would remove {run / part}" in out
    assert f"kept {run / 'run' / 'checkpoint-2'}" in out and "other runs may share; --cache" in out
    assert listed(run) == before


def test_what_tells_of_people_goes_and_the_model_can_still_be_exported(
    world, run: Path, tmp_path: Path, capsys
) -> None:
    assert main(["purge", str(run / "run"), str(run / "own"), str(run / "eval")]) == 0
    assert "removed" in capsys.readouterr().out
    left = listed(run)
    assert not {path for path in left if path.startswith(("own/teacher_cache", "run/checkpoint-1/"))}
    assert {"run/metrics.jsonl", "eval/results.json"} <= left and "eval/samples.jsonl" not in left
    assert list((run / "cache").rglob("ingredients.json"))  # shared: only by word
    assert purge(run / "run", cache=True).removed and not list((run / "cache").rglob("*.bin"))
    assert find_latest(run / "run") == run / "run" / "checkpoint-2"
    assert main(["export", "--run", str(run / "run"), "--to", str(tmp_path / "merged")]) == 0
    question = "Which"  # no question of the data is left anywhere
    assert not [file for file in run.rglob("*.json*") if question in file.read_text()]


def test_what_was_cut_off_goes_and_is_listed(tmp_path: Path, capsys) -> None:
    (tmp_path / "results.json").write_text("{}")
    left = ["samples.jsonl.partial", "samples-gold.jsonl.partial", "x.partial", ".report.html.7.tmp"]
    for name in left:
        (tmp_path / name).write_text("Which person is this?")
    folders = [".unfinished-checkpoint-3", ".unfinished-deleted-best"]
    for name in folders:
        (tmp_path / name).mkdir()
    assert main(["purge", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"removed {tmp_path / name} " in out for name in [*left, *folders])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_links_are_not_followed_and_other_folders_not_touched(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for folder in (elsewhere, run):
        folder.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (run / "samples.jsonl").write_text("")
    with pytest.raises(TrainingError, match="no output of train, eval, attack or demo"):
        purge(run)
    (run / "results.json").write_text(json.dumps({}))
    (run / "teacher_cache").symlink_to(elsewhere)
    found = purge(run)
    assert not (run / "teacher_cache").exists() and (elsewhere / "mine.txt").exists()
    assert any("a link: what it leads to" in one.why for one in found.removed)
