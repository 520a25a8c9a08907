"""Every recipe in configs/ can be used as it is, and so can every command of the comments, documents and protocols."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastvkd.cli import _parser
from fastvkd.errors import SettingsError
from fastvkd.methods import METHODS
from fastvkd.settings import load_settings

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))
PROTOCOLS = [path for path in CONFIGS if path.name.startswith(("mllmu-", "clear-"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    settings = load_settings(path, {"model_name_or_path": "m", "data": "d"})
    assert settings.method in ("vkd", "gd")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_recipe_fuses_frozen_operations_where_its_site_is_in_the_llm(path: Path) -> None:
    settings = load_settings(path, {"model_name_or_path": "m", "data": "d"})
    in_llm = settings.method == "vkd" and any(site.startswith("llm:") for site in settings.sites)
    assert settings.fused_frozen_ops == in_llm


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_command_in_the_comments_is_one(path: Path) -> None:
    commands = re.findall(r"^#.*?(fastvkd (?:train|export|plan|eval|compare) .*)$", path.read_text(), re.MULTILINE)
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command)[1:])
        if "fastvkd train" in command:
            load_settings(path.parents[1] / arguments.config, arguments.overrides)


ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = "fastvkd (?=demo|train|eval|compare|attack|plan|export|data|env)", "(?:deepspeed|torchrun) .*fastvkd/train.py"
COMMAND = re.compile(rf"^ *({'|'.join(STARTS)})(.*?)(?: +#.*)?$", re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_in_the_documents_is_one(path: Path) -> None:
    for start, rest in COMMAND.findall(path.read_text()):
        rest = re.sub(r"[][]|\|\S+|\.\.\.", "", rest)  # what may be left out, the first choice, once
        words = [*(["train"] if "train.py" in start else []), *shlex.split(rest)]
        arguments = _parser().parse_args(words)
        if words[0] in ("train", "plan") and arguments.config is not None and arguments.config.parts[0] == "configs":
            load_settings(ROOT / arguments.config, {"model_name_or_path": "m", "data": "d"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=mmunlearner", "method: mmunlearner"),
        ("saliency.granularity=weight saliency.fraction=0.5", "saliency masks"),
        ("method=gd trainable=lora", "trainable: lora"),
        ("forget_target=reference reference_model=r", "forget_target: reference"),
        ("forget_target=repel", "repel"),
        ("forget_target=saturate", "saturate"),
        ("method=npo", "method: npo"),
        ("method=kl", "kl"),
        ("method=rmu", "rmu"),
        ("answer_loss=npo", "answer_loss: npo"),
        ("compile=true", "compile: true"),
        ("augment=true sites.llm:1=1.0", "augment: true"),
    ],
)
def test_what_zero3_refuses_is_documented(override: str, words: str) -> None:
    from fastvkd.unlearning.tasks import refuse_with_zero3

    settings = load_settings(None, ["model_name_or_path=m", "data=d", *override.split()])
    with pytest.raises(SettingsError, match="which ZeRO-3 splits"):
        refuse_with_zero3(settings)
    documented = (ROOT / "docs" / "distributed.md").read_text().split("**What ZeRO-3 cannot do.**")[1].split("\n\n")[0]
    assert words in documented


def test_the_readme_holds_commands_that_are_looked_at() -> None:
    starts = [start for start, _ in COMMAND.findall(TEXTS[0].read_text())]
    assert len(starts) >= 7 and any("train.py" in start for start in starts)


spec = importlib.util.spec_from_file_location("protocol", ROOT / "scripts" / "protocol.py")
assert spec is not None and spec.loader is not None
protocol = importlib.util.module_from_spec(spec)
sys.modules["protocol"] = protocol
spec.loader.exec_module(protocol)


@pytest.fixture(params=PROTOCOLS, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> tuple[Path, list[list[str]]]:
    """A recipe, and the words of its protocol's commands, in order."""
    found = protocol.commands(*request.param.stem.split("-", 1), "DATA")
    return request.param, [command.words for command in found]


def test_every_command_of_a_protocol_is_one(case: tuple[Path, list[list[str]]]) -> None:
    for words in case[1]:
        arguments = _parser().parse_args(words[1:])
        if words[1] == "train":
            load_settings(ROOT / arguments.config, arguments.overrides)


def test_a_protocol_has_a_command_for_every_method(case: tuple[Path, list[list[str]]]) -> None:
    path, found = case
    trained = [" ".join(words) for words in found if words[1] == "train"]
    named = [method for text in trained for method in re.findall(r"method=(\w+)", text)]
    assert set(named) == set(METHODS) - {"vkd"}
    own = f"configs/{path.stem.split('-', 1)[1]}.yaml"
    (vkd,) = [text for text in trained if own in text]
    assert load_settings(ROOT / own, vkd.split()[4:]).forget_split == load_settings(path, []).forget_split


def test_a_protocol_leads_from_training_to_the_table(case: tuple[Path, list[list[str]]]) -> None:
    """Vanilla, gold and every unlearned model are each trained, exported and evaluated, on the recipe's own splits."""
    path, found = case
    settings, out = load_settings(path, []), f"out/{path.stem}"
    parsed = {
        command: [_parser().parse_args(w[1:]) for w in found if w[1] == command] for command in ("eval", "attack")
    }
    for a in (*parsed["eval"], *parsed["attack"]):
        assert (a.forget_split, a.retain_split) == (settings.forget_split, settings.retain_split)
    assert {a.mode for a in parsed["eval"]} == {"paper"}
    where = {tuple(words[:6]): number for number, words in enumerate(found)}
    for model in ("vanilla", "gold", *protocol.METHODS):
        (train,) = [n for n, words in enumerate(found) if words[1] == "train" and f"output_dir={out}/{model}" in words]
        export = where["fastvkd", "export", "--run", f"{out}/{model}", "--to", f"{out}/{model}-model"]
        assert export == train + 1
        (asked,) = [n for n, w in enumerate(found) if w[1] == "eval" and f"{out}/{model}-model" in w]
        assert asked > export and found[asked][-1] == f"{out}/{model}-eval" and f"{out}/{model}-eval" in found[-1]
    assert [a.model for a in parsed["attack"]] == [f"{out}/{method}-model" for method in protocol.METHODS]
    assert {a.gold for a in parsed["attack"]} == {f"{out}/gold-model"}
    if path.name.startswith("clear-"):
        assert parsed["eval"][-1].reference_eval == Path(out, "gold-eval")


def test_a_dry_run_prints_the_commands_and_runs_none() -> None:
    options = [
        "--data",
        "some folder",
        "--train-data",
        "other",
        "--methods",
        "gd",
        "--mode",
        "corrected",
        "--no-attack",
    ]
    script = [sys.executable, "scripts/protocol.py", "mllmu", "llava-1.5-7b", *options, "--dry-run"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    wanted = protocol.commands(
        "mllmu", "llava-1.5-7b", "some folder", methods=["gd"], mode="corrected", train_data="other", attack=False
    )
    assert printed == [command.words for command in wanted] and len(printed) == 10
    assert "data=other" in printed[6] and "attack" not in {words[1] for words in printed}


def test_an_interrupted_protocol_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(protocol, "ROOT", tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["protocol.py", "clear", "llava-1.5-7b", "--data", "D", "--methods", "gd"])

    def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
        ran.append(words)
        return subprocess.CompletedProcess(words, 1 if words[1] in ("eval", "attack") else 0)

    monkeypatch.setattr(protocol.subprocess, "run", run)
    with pytest.raises(SystemExit, match="1"):
        protocol.main()
    assert [words[1] for words in ran] == ["train", "export", "train", "export", "eval"]  # which failed
    models, evaluations = ("vanilla", "gold"), ("vanilla", "gold", "gd")
    for name in (*(f"{m}-model/config.json" for m in models), *(f"{m}-eval/results.json" for m in evaluations)):
        (tmp_path / "out/clear-llava-1.5-7b" / name).parent.mkdir(parents=True)
        (tmp_path / "out/clear-llava-1.5-7b" / name).touch()
    ran.clear()
    protocol.main()
    assert [words[1] for words in ran] == ["train", "export", "attack", "compare"]  # a refused certificate is a result


def test_both_benchmarks_have_a_recipe_for_both_models() -> None:
    assert [path.stem for path in PROTOCOLS] == [
        "clear-llava-1.5-7b",
        "clear-qwen2.5-vl-7b",
        "mllmu-llava-1.5-7b",
        "mllmu-qwen2.5-vl-7b",
    ]


OURS = [path for path in CONFIGS if path not in PROTOCOLS]
OF_THE_MODEL = {"output_dir", "optim", "bf16", "gradient_checkpointing", "attn_implementation", "quantize_llm"}
OF_THE_RUN = {"model_name_or_path", "data", "forget_split", "retain_split", "engine", "deepspeed", "save_steps"}


def test_one_method_with_the_same_settings_is_in_every_recipe() -> None:
    found = [vars(load_settings(path, {"model_name_or_path": "m", "data": "d"})) for path in OURS]
    assert len(found) == 4 and {settings["forget_target"] for settings in found} == {"stranger"}
    for settings in found[1:]:
        differ = {key for key, value in settings.items() if value != found[0][key]}
        assert differ <= OF_THE_MODEL | OF_THE_RUN
    assert all("strangers:" in path.read_text() for path in OURS)
