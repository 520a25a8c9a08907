"""Every recipe in configs/ can be used as it is, and so can every command that its comments give."""

import re
import shlex
from pathlib import Path

import pytest

from fastvkd.cli import _parser
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
    commands = re.findall(r"^#.*?(fastvkd (?:train|export|plan|eval) .*)$", path.read_text(), re.MULTILINE)
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


def test_the_readme_holds_commands_that_are_looked_at() -> None:
    starts = [start for start, _ in COMMAND.findall(TEXTS[0].read_text())]
    assert len(starts) >= 7 and any("train.py" in start for start in starts)


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.name)
def test_a_protocol_has_a_command_for_every_method(path: Path) -> None:
    named = set(re.findall(r"method=(\w+)", path.read_text()))
    assert named == {"finetune", "ga", "gd", "kl", "npo", "idk", "rmu", "mmunlearner", "manu"}
    assert re.search(r"fastvkd train --config configs/[\w.-]+\.yaml data=DATA", path.read_text())  # VKD's own recipe


def test_both_benchmarks_have_a_recipe_for_both_models() -> None:
    assert [path.stem for path in PROTOCOLS] == [
        "clear-llava-1.5-7b",
        "clear-qwen2.5-vl-7b",
        "mllmu-llava-1.5-7b",
        "mllmu-qwen2.5-vl-7b",
    ]
