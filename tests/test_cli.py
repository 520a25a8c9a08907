"""The command line as a user meets it: commands work on folders, and what cannot work is one line and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fastvkd.cli import main
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.models.loading import load_model, load_processor


def train_arguments(world, output: Path) -> list[str]:
    settings = world.settings(output)
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "max_steps", "learning_rate")
    keys += ("per_device_train_batch_size", "device")
    return [f"{key}={getattr(settings, key)}" for key in keys]


def refused(capsys, *arguments: str) -> str:
    """The one-line error of a command that must exit with 2."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("fastvkd: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in "".join(error)
    return lines[0]


def test_train_then_export_then_evaluate(world, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["train", *train_arguments(world, run)]) == 0
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged = load_model(tmp_path / "merged").state_dict()
    trained, base = load_weights(find_latest(run)), load_model(world.model).state_dict()
    for name, value in merged.items():
        assert torch.equal(value, trained.get(name, base[name])), name
    load_processor(tmp_path / "merged")
    assert "Nobody has evaluated" in (tmp_path / "merged" / "README.md").read_text()
    data = ["--data", str(world.data), "--forget-split", world.forget_split, "--retain-split", world.retain_split]
    evaluate = [
        "eval",
        "--model",
        str(tmp_path / "merged"),
        *data,
        "--out",
        str(tmp_path / "eval"),
        "--max-samples",
        "8",
    ]
    assert main(evaluate) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["benchmark"] == "mllmu" and results["mode"] == "corrected"
    assert set(results["cells"]) == {"forget", "test", "retain", "realworld"}
    assert results["cells"]["forget"]["vqa"]["n"] == 8


def test_the_launchers_entry_point_runs_without_the_package_folder_on_the_path(world, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "fastvkd" / "train.py"
    command = [sys.executable, str(script), "--local_rank", "0", *train_arguments(world, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert find_latest(tmp_path / "run") is not None


def test_env_names_versions(capsys) -> None:
    assert main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_data_check_gives_a_verdict(world, tmp_path: Path, capsys) -> None:
    assert main(["data", "check", str(world.data)]) == 0
    assert "verdict: ok" in capsys.readouterr().out
    broken = tmp_path / "data"
    shutil.copytree(world.data, broken)
    file = next((broken / world.forget_split).glob("*.parquet"))
    pq.write_table(pq.read_table(file).drop_columns(["Classification_Task"]), file)
    assert main(["data", "check", str(broken)]) == 2
    assert "Classification_Task" in capsys.readouterr().out


def test_plan_needs_no_weights(tmp_path: Path, capsys) -> None:
    arguments = ["model_name_or_path=llava-1.5-13b", "data=none", "sites=llm:8", "bf16=true", "optim=adamw_8bit"]
    assert main(["plan", *arguments, "--memory", "24GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["llm_layers_loaded"] == 8


class TestBadInput:
    """Each is one line that names the place and the mend."""

    def test_an_unknown_key(self, world, tmp_path: Path, capsys) -> None:
        message = refused(capsys, "train", *train_arguments(world, tmp_path), "learnin_rate=1")
        assert "did you mean learning_rate" in message

    def test_an_unknown_model_family(self, world, tmp_path: Path, capsys) -> None:
        model = tmp_path / "model"
        shutil.copytree(world.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": "blip"}))
        message = refused(capsys, "train", *train_arguments(world, tmp_path / "o"), f"model_name_or_path={model}")
        assert "blip" in message

    def test_a_missing_column(self, world, tmp_path: Path, capsys) -> None:
        data = tmp_path / "data"
        shutil.copytree(world.data, data)
        file = next((data / world.forget_split).glob("*.parquet"))
        pq.write_table(pq.read_table(file).drop_columns(["image"]), file)
        message = refused(capsys, "train", *train_arguments(world, tmp_path / "o"), f"data={data}")
        assert "image" in message
        assert world.forget_split in message

    def test_a_split_that_is_not_there(self, world, tmp_path: Path, capsys) -> None:
        message = refused(capsys, "train", *train_arguments(world, tmp_path), "forget_split=forget_99")
        assert "forget_99" in message

    def test_a_site_deeper_than_the_model(self, world, tmp_path: Path, capsys) -> None:
        assert "llm:40" in refused(capsys, "train", *train_arguments(world, tmp_path), "sites=llm:40")

    def test_deepspeed_without_its_launcher(self, world, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        message = refused(capsys, "train", *train_arguments(world, tmp_path), "engine=deepspeed")
        assert "deepspeed fastvkd/train.py" in message

    def test_no_run_to_export(self, tmp_path: Path, capsys) -> None:
        assert "checkpoint" in refused(capsys, "export", "--run", str(tmp_path), "--to", str(tmp_path / "m"))

    def test_an_unknown_demo_size(self, tmp_path: Path, capsys) -> None:
        assert "default, tiny" in refused(capsys, "demo", "--size", "huge", "--out", str(tmp_path))


@pytest.mark.parametrize("name", ["unlearn", "evaluate", "load_settings"])
def test_the_library_offers_three_functions(name: str) -> None:
    import fastvkd

    assert callable(getattr(fastvkd, name))
    assert name in fastvkd.__all__
