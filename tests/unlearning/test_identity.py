"""A run is never taken for another: of other data, in the same folder, at the same time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.engines.checkpoints import RUN, find_latest, set_aside
from fastvkd.engines.exporting import export, read_record
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import SettingsError, TrainingError
from fastvkd.files import held
from fastvkd.models.folder import identify_base
from fastvkd.reporting.model_card import run_card
from fastvkd.settings import load_settings
from fastvkd.unlearning.identity import identify_run
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.start import begin
from fastvkd.unlearning.tasks import gather


@pytest.fixture(scope="module")
def second(world, tmp_path_factory) -> Path:
    """The world's data with one answer changed."""
    folder = tmp_path_factory.mktemp("second") / "data"
    shutil.copytree(world.data, folder)
    one, *others = mllmu.read_split(folder, world.forget_split)
    changed = replace(one.visual.generation[0], answer="Nobody knows.")
    one = replace(one, visual=replace(one.visual, generation=(changed, *one.visual.generation[1:])))
    mllmu.write_split(folder, world.forget_split, [one, *others])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def first(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first") / "out"
    unlearn(world.settings(out, max_steps=4, save_steps=2))
    return out


class TestASecondRunInTheSameFolder:
    @pytest.fixture
    def out(self, first, tmp_path: Path) -> Path:
        shutil.copytree(first, tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize("keep", [1, 2])
    def test_is_the_one_that_is_kept_and_exported(self, world, second, out, tmp_path, keep) -> None:
        before = contents(out)
        run = unlearn(world.settings(out, data=str(second), max_steps=2, save_steps=1, save_total_limit=keep))
        assert find_latest(out) == run.checkpoint and run.checkpoint.name == "checkpoint-2"
        assert len(list(out.glob("checkpoint-*"))) == keep
        export(out, tmp_path / "merged", model_card=run_card(out))
        record = read_record(tmp_path / "merged")
        assert record is not None and (record["settings"]["data"], record["updates"]) == (str(second), 2)
        # nothing of the first is lost, and it can still be exported
        aside = contents(out / "earlier-1")
        assert aside == {name: data for name, data in before.items() if not name.startswith("teacher_cache")}
        export(out / "earlier-1", tmp_path / "earlier", model_card="")
        record = read_record(tmp_path / "earlier")
        assert record is not None and record["updates"] == 4

    def test_takes_its_place_where_it_is_told_to(self, world, out) -> None:
        unlearn(world.settings(out, max_steps=1, overwrite_output_dir=True))
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
        assert not list(out.glob("earlier-*"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"data": None}, "is of a run with other data"),
            ({"lambda_forget": 2.0}, r"another objective \(lambda_forget=1.0\)"),
            ({"max_steps": 3}, "has 4 updates, more than max_steps=3"),
            ({"seed": 1}, r"another objective \(seed=0\)"),
        ],
    )
    @pytest.mark.parametrize("named", [False, True])
    def test_does_not_go_on_from_it(self, world, second, out, change, said, named) -> None:
        before = contents(out)
        change = {key: str(second) if value is None else value for key, value in change.items()}
        wanted = str(out / "checkpoint-4") if named else "auto"
        with pytest.raises(SettingsError, match=said) as caught:
            unlearn(world.settings(out, **{"max_steps": 6, **change, "resume_from_checkpoint": wanted}))
        assert "\n" not in str(caught.value) and contents(out) == before

    def test_replaces_by_word_what_it_cannot_resume(self, world, second, out) -> None:
        told = {"resume_from_checkpoint": "auto", "overwrite_output_dir": True, "max_steps": 5}
        assert unlearn(world.settings(out, **told)).images_seen == 6  # the same run: it goes on for one step
        unlearn(world.settings(out, **told | {"data": str(second), "max_steps": 1}))
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]

    def test_goes_on_from_an_earlier_checkpoint_without_mixing_branches(self, world, out) -> None:
        told = {"resume_from_checkpoint": str(out / "checkpoint-2"), "max_steps": 3, "save_total_limit": 1}
        run = unlearn(world.settings(out, **told))
        assert find_latest(out) == run.checkpoint and run.steps == 3
        assert find_latest(out / "earlier-1") == out / "earlier-1" / "checkpoint-4"

    def test_every_checkpoint_and_the_folder_say_which_run_it_is(self, world, out) -> None:
        noted = json.loads((out / RUN).read_text())["run"]
        assert noted == read_manifest(out / "checkpoint-2")["run"] == begin(world.settings(out)).identity


def test_what_makes_another_run(world, second, tmp_path: Path) -> None:
    base = identify_base(world.model)

    def parts(**changes) -> dict[str, str]:
        settings = world.settings(tmp_path, **changes)
        return identify_run(settings, gather(settings, base).sources)

    same = parts()
    shutil.copytree(world.data, tmp_path / "copy")
    free = {"data": str(tmp_path / "copy"), "learning_rate": 0.1, "max_steps": 9, "optim": "lion_8bit", "bf16": True}
    assert parts(**free) == same
    assert parts(data=str(second)) == same | {"data": parts(data=str(second))["data"]} != same
    swapped = {"forget_split": world.retain_split, "retain_split": world.forget_split}
    assert parts(**swapped)["data"] != same["data"]
    for change in (
        {"sites": "llm:1"},
        {"forget_target": "mean"},
        {"saliency.granularity": "none", "noise_images": "per_image"},
    ):
        assert parts(**change)["objective"] != same["objective"]
    assert load_settings(None, {"model_name_or_path": "m", "data": "d", "stranger.quantize": "nf4"})


HOLDER = """
import sys, time
from pathlib import Path
from fastvkd.files import held
with held(Path(sys.argv[1]), "output_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_belongs_to_one_process_until_that_ends(world, tmp_path: Path) -> None:
    """However it ends: the lock of a killed process holds nobody up."""
    out = tmp_path / "deep" / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=rf"another process writes here \(process {other.pid} on") as caught:
            unlearn(world.settings(out))
        assert "set another output_dir" in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(path.name for path in out.iterdir()) == [".lock"]
        os.kill(other.pid, signal.SIGKILL)
    assert unlearn(world.settings(out, max_steps=1)).steps == 1
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("verb", ["eval", "attack", "export"])
def test_other_commands_keep_their_folder_to_themselves_too(world, first, tmp_path: Path, capsys, verb: str) -> None:
    out = tmp_path / "out"
    if verb == "export":
        arguments, folder = ["--run", str(first), "--to", str(out)], tmp_path / ".exporting-out"
    else:
        arguments, folder = ["--model", str(world.model), "--data", str(world.data), "--out", str(out)], out
    with held(folder, "output_dir"):
        assert main([verb, *arguments]) == 2
    error = capsys.readouterr().err
    assert "another process writes here" in error and "set another --" in error and error.count("fastvkd: error") == 1
    assert not out.exists() and not folder.exists()


def test_a_folder_made_for_a_lock_goes_with_it(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), held(tmp_path / "a" / "b", "output_dir"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / "b", "output_dir"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_beginning_without_a_checkpoint_is_not_worth_keeping(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", RUN):
        (tmp_path / name).write_text("{}\n")
    assert set_aside(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("with_run", [False, True])
def test_what_no_run_has_written_stays(first, tmp_path: Path, delete: bool, with_run: bool) -> None:
    """An output folder may hold anything, also under the names that a run would use."""
    out = tmp_path / "out"
    if with_run:
        shutil.copytree(first, out)
    for folder in ("best", "trials", "checkpoint-900", "photos"):  # one like that of another trainer
        (out / folder).mkdir(parents=True)
        (out / folder / "mine.bin").write_bytes(b"mine")
    (out / "report.md").write_text("mine")
    set_aside(out, delete=delete)
    assert all((out / folder / "mine.bin").is_file() for folder in ("best", "trials", "checkpoint-900", "photos"))
    assert (out / "report.md").is_file() and find_latest(out) is None
    assert (out / "earlier-1").exists() == (with_run and not delete)


IMPOSSIBLE = [
    ({"warmup_steps": 4}, "warmup_steps=4: must be below max_steps=4"),
    ({"method": "gd", "num_train_epochs": 1, "warmup_steps": 400}, "warmup_steps=400"),
    ({"fused_frozen_ops": True}, "no decoder layer is loaded; set fused_frozen_ops=false"),
    ({"report_to": "wandb"}, "wandb is not installed"),
    ({"sites": "llm:99"}, "llm:99"),
    ({"sites": "vision:99"}, "vision:99"),
]


@pytest.mark.parametrize(("change", "said"), IMPOSSIBLE, ids=[str(change) for change, _ in IMPOSSIBLE])
def test_what_cannot_be_is_refused_before_any_work(world, tmp_path: Path, monkeypatch, change, said) -> None:
    """No weight is loaded, and what an earlier run wrote stays as it was."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("fastvkd.unlearning.tasks.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(Exception, match=said.replace("(", r"\(")) as caught:
        unlearn(world.settings(out, **change))
    assert type(caught.value).__module__ == "fastvkd.errors"
    assert contents(out) == {"metrics.jsonl": b'{"step": 1}\n'}


def command(world, out: Path, *more: str) -> list[str]:
    settings = world.settings(out)
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "device")
    return ["train", *(f"{key}={getattr(settings, key)}" for key in keys), "per_device_train_batch_size=6", *more]


class TestDryRun:
    def test_says_what_would_be_done_and_does_nothing(self, world, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.setattr("fastvkd.unlearning.tasks.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        assert main([*command(world, tmp_path / "deep" / "out"), "--dry-run"]) == 0
        said = capsys.readouterr().out
        for part in ("to forget: ", "to keep: ", "visual tokens", "fingerprint", "memory: ", "disk: ", "500 updates"):
            assert part in said
        assert not (tmp_path / "deep").exists()

    def test_tells_of_an_earlier_run(self, world, first, tmp_path, capsys) -> None:
        shutil.copytree(first, tmp_path / "out")
        before = contents(tmp_path / "out")
        for more, said in (
            ([], "will be put aside in it"),
            (["overwrite_output_dir=true"], "will be deleted"),
            (["resume_from_checkpoint=auto"], "checkpoint-4, 4 of 500 updates done"),
        ):
            assert main([*command(world, tmp_path / "out", *more), "--dry-run"]) == 0
            assert said in capsys.readouterr().out
        assert contents(tmp_path / "out") == before

    @pytest.fixture
    def broken(self, world, tmp_path) -> Path:
        shutil.copytree(world.model, tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("fault", ["shard", "data", "processor", "disk", "busy", "settings"])
    def test_finds_what_would_stop_a_run(self, world, broken, tmp_path, capsys, monkeypatch, fault) -> None:
        more, said = [f"model_name_or_path={broken}"], ""
        with contextlib.ExitStack() as during:
            if fault == "shard":
                weights = broken / "model.safetensors"
                weights.write_bytes(weights.read_bytes()[:-7])
                said = "model.safetensors: truncated"
            elif fault == "data":
                more, said = ["forget_split=forget_5"], "no split 'forget_5'"
            elif fault == "processor":
                config = json.loads((broken / "config.json").read_text())
                (broken / "config.json").write_text(json.dumps(config | {"image_token_index": 1, "image_token_id": 1}))
                said = "tokenizer and config.json disagree on the image token"
            elif fault == "disk":
                monkeypatch.setattr(
                    "fastvkd.planning.room.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
                )
                said = "disk: checkpoints and teacher cache are planned at"
            elif fault == "busy":
                during.enter_context(held(tmp_path / "out", "output_dir"))
                said = "another process writes here"
            else:
                more, said = ["warmup_steps=500"], "must be below max_steps=500"
            assert main([*command(world, tmp_path / "out", *more), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_takes_the_projector_as_its_site(world, tmp_path, recipe) -> None:
    """Also through the checks before the model is loaded, on a model and data of one's own."""
    mine = {"model_name_or_path": str(world.model), "data": str(world.data), "forget_split": world.forget_split}
    mine |= {"retain_split": world.retain_split, "output_dir": str(tmp_path), "strangers": None}
    settings = load_settings(recipe, {**mine, "sites": "projector"})
    assert settings.sites == {"projector": 1.0} and begin(settings).resume_from is None
