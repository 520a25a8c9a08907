"""Folders broken in two hundred ways: each is refused in one line that names what is broken, or read as if whole.

A case is drawn from its number alone: which folder, which command reads it, and what is done to it.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from broken import break_folder, files_of
from ledger import note
from safetensors.torch import load_file, save_file

from fastvkd.cli import main
from fastvkd.data.dead_leaves import dead_leaves

CASES = 200
FAULT = "broken folder"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, and what its output holds but for times and places."""

    code: int
    out: str
    err: str
    left: str = ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("fastvkd: error: ")]


def run(*arguments: str) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return Ended(code, out.getvalue(), err.getvalue())


def weights_in(folder: Path) -> str:
    """A digest of every tensor in a folder's safetensors files."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Wholes:
    """Whole folders of every kind, made once."""

    root: Path
    forget_split: str
    retain_split: str

    def at(self, kind: str) -> Path:
        return self.root / kind

    def train(self, out: Path, *told: str, model: Path | None = None, data: Path | None = None) -> list[str]:
        values = {
            "model_name_or_path": model or self.at("model"),
            "data": data or self.at("parquet"),
            "forget_split": self.forget_split,
            "retain_split": self.retain_split,
            "output_dir": out,
            "max_steps": 2,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-3,
            "device": "cpu",
        }
        return ["train", *(f"{key}={value}" for key, value in values.items()), *told]

    def evaluation(self, out: Path, model: Path, data: Path) -> list[str]:
        splits = ["--forget-split", self.forget_split, "--retain-split", self.retain_split]
        told = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu"]
        return ["eval", *told, *splits, "--max-samples", "1"]


@pytest.fixture(scope="session")
def wholes(world, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    root = tmp_path_factory.mktemp("wholes")
    made = Wholes(root, world.forget_split, world.retain_split)
    shutil.copytree(world.model, root / "model")
    shutil.copytree(world.data, root / "parquet")
    own = root / "jsonl"
    own.mkdir()
    for split, count in (("forget", 2), ("retain", 6)):
        rows = []
        for i in range(count):
            dead_leaves((32, 32), (count, i)).save(own / f"{split}-{i}.png")
            asked = dict(question="Where was this person born?", answer="Oslo in Norway")
            rows.append(dict(image=f"{split}-{i}.png", entity=f"{split} {i}", **asked))
            rows.append(rows[-1] | dict(question="Which job?", answer="baker", options=["baker", "pilot"]))
        (own / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*made.train(root / "run", f"cache_dir={root / 'cache'}")).code == 0
    assert run("export", "--run", str(root / "run"), "--to", str(root / "exported")).code == 0
    assert run(*made.evaluation(root / "eval", root / "exported", root / "parquet")).code == 0
    assert run(*made.evaluation(root / "before", root / "model", root / "parquet")).code == 0
    key = next(key for key in load_file(root / "model/model.safetensors") if "layers.1.self_attn.q_proj.weight" in key)
    height, width = load_file(root / "model/model.safetensors")[key].shape
    adapter = root / "adapter"
    adapter.mkdir()
    import torch

    layer = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    halves = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(height, 2)}
    save_file(halves, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(root / "model"), "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    return made


# What a command makes of a folder: (whole folders, the folder, a place to write to) -> how it ended.
Verb = Callable[[Wholes, Path, Path], Ended]


def data_check(wholes: Wholes, folder: Path, to: Path) -> Ended:
    ended = run("data", "check", str(folder), "--json")
    if ended.code == 2 and not ended.errors:  # all problems at once, on paper
        (first, *_) = json.loads(ended.out)["problems"]
        return Ended(2, "", f"fastvkd: error: {first}")
    return ended


def dry_run_on_data(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return without_room(run(*wholes.train(to, "--dry-run", data=folder)))


def dry_run_of_model(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return without_room(run(*wholes.train(to, "--dry-run", model=folder)))


def without_room(ended: Ended) -> Ended:
    """Without the line about memory, which others use too."""
    kept = [line for line in ended.out.splitlines() if not line.startswith(("memory", "room", "disk"))]
    return Ended(ended.code, "\n".join(kept), ended.err)


def train_on_data(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return trained(to, run(*wholes.train(to, data=folder)))


def train_model(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return trained(to, run(*wholes.train(to, model=folder)))


def train_with_cache(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return trained(to, run(*wholes.train(to, f"cache_dir={folder}")))


def resume(wholes: Wholes, folder: Path, to: Path) -> Ended:
    told = ("resume_from_checkpoint=auto", "max_steps=3", f"cache_dir={wholes.at('cache')}")
    ended = run(*wholes.train(folder, *told))
    return Ended(ended.code, "", ended.err, weights_in(folder / "checkpoint-3") if ended.code == 0 else "")


def trained(to: Path, ended: Ended) -> Ended:
    return Ended(ended.code, "", ended.err, weights_in(to) if ended.code == 0 else "")


def evaluate_on_data(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return evaluated(to, run(*wholes.evaluation(to, wholes.at("exported"), folder)))


def evaluate_model(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return evaluated(to, run(*wholes.evaluation(to, folder, wholes.at("parquet"))))


def evaluated(to: Path, ended: Ended) -> Ended:
    cells = json.dumps(json.loads((to / "results.json").read_text())["cells"]) if ended.code == 0 else ""
    return Ended(ended.code, "", ended.err, cells)


def export(wholes: Wholes, folder: Path, to: Path) -> Ended:
    ended = run("export", "--run", str(folder), "--to", str(to))
    return Ended(ended.code, "", ended.err, weights_in(to) if ended.code == 0 else "")


def merge(wholes: Wholes, folder: Path, to: Path) -> Ended:
    ended = run("merge", str(folder), "--to", str(to))
    return Ended(ended.code, "", ended.err, weights_in(to) if ended.code == 0 else "")


def plan(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return run("plan", f"model_name_or_path={folder}", "--json")


def requests(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return run("requests", str(folder), "--data", str(wholes.at("parquet")), "--json")


def requests_of_data(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return run("requests", str(wholes.at("exported")), "--data", str(folder), "--json")


def report(wholes: Wholes, folder: Path, to: Path) -> Ended:
    ended = run("report", str(folder), "--out", str(to / "page.html"))
    page = (to / "page.html").read_text() if ended.code == 0 else ""
    return Ended(ended.code, ended.out, ended.err, page)


def compare(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return run("compare", str(folder), str(wholes.at("before")))


def compare_paired(wholes: Wholes, folder: Path, to: Path) -> Ended:
    return run("compare", "--paired", str(wholes.at("before")), str(folder))


def purge(wholes: Wholes, folder: Path, to: Path) -> Ended:
    ended = run("purge", str(folder))
    left = " ".join(path.relative_to(folder).as_posix() for path in files_of(folder)) if ended.code == 0 else ""
    return Ended(ended.code, "", ended.err, left)


READS: dict[str, tuple[Verb, ...]] = {
    "parquet": (data_check, dry_run_on_data, requests_of_data, evaluate_on_data),
    "jsonl": (data_check, dry_run_on_data, train_on_data),
    "model": (dry_run_of_model, plan, train_model, evaluate_model),
    "run": (export, report, resume, purge),
    "cache": (train_with_cache,),
    "eval": (compare, compare_paired, report, purge),
    "exported": (requests, evaluate_model, dry_run_of_model),
    "adapter": (merge,),
}
READERS = [(kind, verb) for kind, verbs in READS.items() for verb in verbs]


@pytest.fixture(scope="session")
def unbroken(wholes: Wholes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Verb], Ended]:
    """How a command ends on a whole folder."""
    known: dict[tuple[str, Verb], Ended] = {}

    def of(kind: str, verb: Verb) -> Ended:
        if (kind, verb) not in known:
            root = tmp_path_factory.mktemp("unbroken")
            shutil.copytree(wholes.at(kind), root / kind)
            known[kind, verb] = without_places(verb(wholes, root / kind, root / "to"), root)
        return known[kind, verb]

    return of


def without_places(ended: Ended, root: Path) -> Ended:
    """Without the path of the case, which is another one each time."""
    return Ended(ended.code, *(part.replace(str(root), "ROOT") for part in (ended.out, ended.err, ended.left)))


def judged(number: int, wholes: Wholes, unbroken: Callable[[str, Verb], Ended], root: Path) -> str:
    """The outcome of a case, "refused" or "read as if whole". Fails where it is neither."""
    kind, verb = READERS[number % len(READERS)]
    whole = unbroken(kind, verb)
    done = break_folder(number, wholes.at(kind), root / kind)
    what = f"case {number}: {verb.__name__} of {kind}, {done.told}"
    try:
        ended = verb(wholes, root / kind, root / "to")
    except BaseException as error:
        error.add_note(what)
        raise
    found = without_places(ended, root)
    assert found.err.isprintable() or all(line.isprintable() for line in found.err.splitlines()), what
    if ended.code == 0:
        assert (found.code, found.out, found.left) == (whole.code, whole.out, whole.left), what
        return "read as if whole"
    assert ended.code == 2 and len(ended.errors) == 1, f"{what}: {ended}"
    names = [*done.names, str(root / kind)]
    assert any(name in ended.errors[0] for name in names), f"{what}: names none of {names}: {ended.errors[0]}"
    return "refused"


def case(number: int, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(number, marks=marks)


@pytest.mark.parametrize("number", [case(i, *([] if i % 5 == 0 else [pytest.mark.proof])) for i in range(CASES)])
def test_a_broken_folder_is_refused_by_name_or_read_as_if_whole(
    wholes: Wholes, unbroken: Callable[[str, Verb], Ended], tmp_path: Path, number: int
) -> None:
    outcome = judged(number, wholes, unbroken, tmp_path)
    note(FAULT, str(number), outcome)
