"""Every recipe in configs/ can be used as it is, and so can every command that its comments give."""

import re
import shlex
from pathlib import Path

import pytest

from fastvkd.cli import _parser
from fastvkd.errors import SettingsError
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
    from fastvkd.unlearning.tasks import _refuse_with_zero3

    settings = load_settings(None, ["model_name_or_path=m", "data=d", *override.split()])
    with pytest.raises(SettingsError, match="which ZeRO-3 splits"):
        _refuse_with_zero3(settings)
    documented = (ROOT / "docs" / "distributed.md").read_text().split("**What ZeRO-3 cannot do.**")[1].split("\n\n")[0]
    assert words in documented


def test_the_readme_holds_commands_that_are_looked_at() -> None:
    starts = [start for start, _ in COMMAND.findall(TEXTS[0].read_text())]
    assert len(starts) >= 7 and any("train.py" in start for start in starts)


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.name)
def test_a_protocol_has_a_command_for_every_method(path: Path) -> None:
    named = set(re.findall(r"method=(\w+)", path.read_text()))
    assert named == {"finetune", "ga", "gd", "kl", "npo", "idk", "rmu", "mmunlearner", "manu"}
    assert re.search(r"fastvkd train --config configs/[\w.-]+\.yaml data=DATA", path.read_text())  # VKD's own recipe


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.name)
def test_a_protocol_leads_from_training_to_the_table(path: Path) -> None:
    """Vanilla, gold and an unlearned model are each trained, exported and evaluated, on the recipe's own splits."""
    text, out = path.read_text(), f"out/{path.stem}"
    settings = load_settings(path, [])
    parsed = [_parser().parse_args(shlex.split(c)[1:]) for c in re.findall(r"^#.*?(fastvkd eval .*)$", text, re.M)]
    assert all((a.forget_split, a.retain_split) == (settings.forget_split, settings.retain_split) for a in parsed)
    for model in ("vanilla", "gold", "gd"):
        assert f"output_dir={out}/{model}" in text and f"--run {out}/{model} --to {out}/{model}-model" in text
        assert [a.out for a in parsed if a.model == f"{out}/{model}-model"] == [Path(out, f"{model}-eval")]
    if path.name.startswith("clear-"):
        assert parsed[-1].reference_eval == Path(out, "gold-eval")


def test_both_benchmarks_have_a_recipe_for_both_models() -> None:
    assert [path.stem for path in PROTOCOLS] == [
        "clear-llava-1.5-7b",
        "clear-qwen2.5-vl-7b",
        "mllmu-llava-1.5-7b",
        "mllmu-qwen2.5-vl-7b",
    ]
