"""The command line as a user meets it: commands work on folders, and what cannot work is one line and exit code 2."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fastvkd.cli import _parser, main
from fastvkd.data.sources import evaluation_cells
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.loading import load_model, load_processor
from fastvkd.options import AttackOptions, Options


def train_arguments(world, output: Path) -> list[str]:
    settings = world.settings(output)
    keys = ("model_name_or_path", "data", "forget_split", "retain_split", "output_dir", "max_steps", "learning_rate")
    keys += ("per_device_train_batch_size", "device")
    return [f"{key}={getattr(settings, key)}" for key in keys]


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
    out = ["--out", str(tmp_path / "eval"), "--max-samples", "3"]
    assert main(["eval", "--model", str(tmp_path / "merged"), *data, *out]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["benchmark"] == "mllmu" and results["mode"] == "corrected"
    beside = {"stranger", "neighbour", "pair"}
    assert set(results["cells"]) == {"forget", "test", "retain", "realworld", *beside}
    assert set(results["by_person"]) and {"who", "description", "stranger_band", "retain_by_likeness"} <= set(results)
    assert results["cells"]["forget"]["vqa"]["n"] == 3

    live = load_model(world.model)
    live.load_state_dict(trained, strict=False)
    cells = evaluation_cells(str(world.data), world.forget_split, world.retain_split)
    processor = load_processor(world.model)
    log = tmp_path / "live.jsonl"
    figures = evaluate_cells(live, processor, cells, batch_size=32, seed=0, max_samples=3, log_path=log)
    assert json.loads(json.dumps(figures)) == results["cells"]
    samples = [
        [line for line in map(json.loads, file.read_text().splitlines()) if line["cell"] in cells and "entity" in line]
        for file in (log, tmp_path / "eval" / "samples.jsonl")
    ]
    assert samples[0] == samples[1]


def test_a_quantised_llm_is_only_looked_through(world, tmp_path: Path, avx512bf16) -> None:
    run = tmp_path / "run"
    assert main(["train", *train_arguments(world, run), "sites=llm:2", "quantize_llm=nf4"]) == 0
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged, base = load_model(tmp_path / "merged").state_dict(), load_model(world.model).state_dict()
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert moved == set(load_weights(find_latest(run)))
    assert not any("language_model" in name or "lm_head" in name for name in moved)


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


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"])
def test_every_recipe_is_planned_to_fit_the_card_it_names(name: str, capsys) -> None:
    config = Path(__file__).resolve().parent.parent / "configs" / f"{name}.yaml"
    assert main(["plan", "--config", str(config), "--gpu", "RTX 4090", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["llm_layers_loaded"] == 0  # training ends at the projector
    assert plan["memory_bytes"]["total"] < 24 * 2**30
    assert plan["search"]["memory_bytes"]["total"] < 24 * 2**30  # the whole LLM: of 13B in four bits
    assert plan["recommendation"]["deepspeed"] is None
    assert plan["recommendation"]["quantize_llm"] == ("nf4" if name == "llava-1.5-13b" else "none")


@pytest.mark.parametrize("name", ["unlearn", "evaluate", "load_settings", "EvalOptions"])
def test_the_library_offers_training_and_evaluation(name: str) -> None:
    import fastvkd

    assert callable(getattr(fastvkd, name))
    assert name in fastvkd.__all__


COMMANDS = ("demo", "train", "eval", "compare", "attack", "report", "steer", "plan", "export", "merge", "requests")
COMMANDS += ("ask", "purge", "data check", "env")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_its_help_with_an_example_that_can_be_parsed(command: str, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    example = capsys.readouterr().out.rstrip().splitlines()[-1].removeprefix("example: ")
    assert example.startswith(f"fastvkd {command}")
    given = vars(_parser().parse_args(shlex.split(example)[1:]))
    _, kind = given.pop("command")
    assert isinstance(kind(**given), Options)


def test_the_command_line_and_the_library_have_the_same_defaults() -> None:
    given = vars(_parser().parse_args(["attack", "--model", "m", "--data", "d"]))
    given.pop("command")
    assert AttackOptions(**given) == AttackOptions(model="m", data="d")
    given = vars(_parser().parse_args(["attack", "--model", "m", "--data", "d", "--shares", "1", "--steps", "3", "4"]))
    given.pop("command")
    options = AttackOptions(model="m", data="d", relearning_shares=[1.0], relearning_steps=[3, 4])
    assert AttackOptions(**given) == options and options.relearning_steps == (3, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("eval --modle x --model m --data d", "unrecognized arguments: --modle x; see fastvkd --help"),
        ("eval --data d", "the following arguments are required: --model; see fastvkd eval --help"),
        ("eval --model m --data d --mode papre", "mode='papre': allowed are corrected, paper"),
        ("eval --model m --data d --seed one", "argument --seed: invalid int value: 'one'; see fastvkd eval --help"),
        ("attack --model m --data d --shares 0.5 0", "shares=0.0: must lie above 0 and at most at 1"),
        ("attack --model m --data d --steps 0", "steps=0: at least one step is needed"),
        ("attack --model m --data d --learning-rates 1e-4 0", "learning_rates=0.0: must be above 0"),
        ("attack --model m --data d --relearn-models gold", "relearn-models=gold: unlearned must be among them"),
        ("attack --model m --data d --weights llm", "weights='llm': allowed are visual, all"),
        ("attack --model m --data d --seed -1", "seed=-1: must lie between 0 and 4294967295"),
        ("compare run --format csv", "format='csv': allowed are text, json, latex"),
        ("demo --size huge", "size='huge': allowed are default, tiny"),
        ("train learnin_rate=1 model_name_or_path=m data=d", "did you mean learning_rate?"),
        ("data chek", "invalid choice: 'chek'"),
        ("nothing", "invalid choice: 'nothing'"),
    ],
)
def test_a_wrong_option_is_one_line(wrong: str, message: str, capsys) -> None:
    assert main(wrong.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvkd: error: ") and message in line


@pytest.mark.parametrize(
    "words", [["purge", "a" * 300], ["nothing\nelse"], ["plan", "a\x1b[2Jb=1"], ["compare", "a\nb"]]
)
def test_odd_words_are_one_line(words: list[str], capsys) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvkd: error: ") and line.isprintable()


def test_a_machine_without_memory_is_said_in_one_line(monkeypatch, capsys) -> None:
    def full() -> str:
        return "x" * 2**62

    monkeypatch.setattr("fastvkd.environment.describe", full)
    assert main(["env"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvkd: error: the machine's memory is full: ")


@pytest.mark.parametrize("arguments", ["--help", "attack --help", "eval --modle x", "eval --model m --data d --mode x"])
def test_help_and_wrong_options_do_not_wait_for_torch(arguments: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fastvkd.cli", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if "--help" in arguments else 2)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported  # the names were read
    assert not imported & {"torch", "transformers", "numpy", "yaml", "tqdm", "bitsandbytes", "deepspeed"}
