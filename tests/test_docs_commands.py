"""Every command in README and docs is run by a test, read by the command line's own parser, or named here with the
reason why it is not run."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from fastvkd.cli import _parser, main

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
PROGRAMS = ("fastvkd", "python", "make", "deepspeed", "torchrun", "srun", "source")
# Programs of others, or minutes to hours of work: `tests/engines/test_launched_runs.py` launches both launchers,
# `tests/demo` runs what `make demo` does, and `tests/benchmarks` runs every script small.
NOT_RUN = {
    "deepspeed": "a launcher",
    "torchrun": "a launcher",
    "srun": "a cluster's own",
    "source": "the shell's own",
    "make": "targets of the Makefile, looked up below",
    "python": "scripts of benchmarks/, looked up below",
}
# So that the walk of the README fits a model of a few thousand weights and ends in seconds.
SMALL = "device=cpu bf16=false max_steps=2 learning_rate=1e-3 ends=max_steps watch_steps=0 warmup_steps=0 save_steps=0"
SMALL += " per_device_train_batch_size=6 auxiliary_images=2 auxiliary_share=0.2 forget_target=noise optim=adamw_torch"
SMALL += " elsewhere=0 beside=0"
MORE = {
    "train": SMALL,
    "eval": "--device cpu --max-samples 2",
    "attack": "--device cpu --kind paraphrase --max-samples 2",
}


def blocks(path: Path) -> list[str]:
    """The code of a document: fenced, or indented by four spaces."""
    text = path.read_text()
    return re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"(?:^    .*\n)+", text, re.M)


def commands(path: Path) -> list[str]:
    """Lines that begin with one of `PROGRAMS`, continued ones joined, without their comments."""
    found = []
    for block in blocks(path):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].split()
            if words and words[0] in PROGRAMS:
                found.append(" ".join(words))
    return found


def spelled(command: str) -> list[str]:
    """The words of a usage line as somebody would type it: options that may be left out are given, the first choice."""
    plain = re.sub(r"(\w+)\.\.\.", r"\1", command.replace("[", "").replace("]", ""))
    return shlex.split(re.sub(r"(?<=\w)\|[\w|]+", "", plain))[1:]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_command_is_one_that_is_understood(path: Path) -> None:
    for command in commands(path):
        program, *words = command.split()
        if program == "fastvkd":
            run, kind = vars(given := _parser().parse_args(spelled(command))).pop("command")
            assert callable(run) and kind.__name__.endswith("Options"), given
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        elif program == "python":
            assert (ROOT / words[0]).is_file(), command
        else:
            assert program in NOT_RUN, command


def test_commands_are_found_in_every_form() -> None:
    assert len([c for c in commands(ROOT / "README.md") if c.startswith("fastvkd")]) >= 7
    assert any(c.startswith("torchrun") and "--config" in c for c in commands(ROOT / "docs" / "distributed.md"))
    assert spelled("fastvkd compare RUN... [--format text|json]") == ["compare", "RUN", "--format", "text"]
    with pytest.raises(Exception, match="invalid choice"):
        _parser().parse_args(["untrain"])


@pytest.mark.slow
def test_the_readmes_walk(world, tmp_path: Path, capsys, monkeypatch) -> None:
    """The commands of the README, in their order, on a model of a few thousand weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    splits = f"forget_split={world.forget_split} retain_split={world.retain_split}"
    walked = []
    for command in commands(ROOT / "README.md"):
        words = spelled(command)
        if not command.startswith("fastvkd"):
            continue
        verb = words[0]
        words = [word.replace("MODEL", str(world.model)).replace("DATA", str(world.data)) for word in words]
        words += MORE.get(verb, "").split() + (splits.split() if verb == "train" else [])
        code = main(words)
        said = capsys.readouterr()
        assert code == 0 or (verb == "attack" and code == 1), (command, said.err)  # a certificate that says `failed`
        walked.append(verb)
    assert walked == ["data", "plan", "train", "export", "eval", "attack", "report"]
    assert (tmp_path / "report.html").is_file() and (tmp_path / "out" / "attack" / "certificate.json").is_file()


def test_plans_of_the_documents_can_be_made(capsys) -> None:
    for command in (c for path in TEXTS for c in commands(path) if c.startswith("fastvkd plan")):
        assert main(spelled(command)) == 0, command
        assert "GiB" in (said := capsys.readouterr().out) or "bytes" in said


def test_the_python_of_the_documents_runs(world) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "models.md").read_text(), re.M | re.S)
    images = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    names = {"path": str(world.model), "images": images}
    exec("import torch\n" + code.replace("llm:8", "llm:2"), names)  # noqa: S102 - the README's own lines
    assert names["features"]["llm:2"].hidden.shape[0] == 2
