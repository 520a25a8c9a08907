"""The parts of a job, from teacher features to the page, and what each must leave, whatever happened on the way."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked import Ended, Fault, Server

# Fields that say when or how fast, and not what was found.
_OF_THE_MOMENT = {"seconds", "created", "date", "time", "digest"}
_LEARNT = ("step", "loss", "loss_forget", "loss_retain", "grad_norm", "learning_rate")
_UNFINISHED = (".unfinished", ".partial", ".tmp", ".exporting", ".lock")
PARTS = ("train", "stranger", "export", "eval", "attack", "report", "steer", "purge", "demo-data")


@dataclass(frozen=True)
class Part:
    """A command that works in a folder: its arguments there, the folder's content before it, and what it must leave."""

    arguments: Callable[[Path], list[str | Path]]
    before: Callable[[Path], None]
    result: Callable[[Path], Any]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(folder: Path) -> list[str]:
    """What bears the mark of something unfinished. In a teacher cache, which other runs may be writing to at the same
    time, nobody may remove that."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if any(mark in path.name for mark in _UNFINISHED)]
    return [str(path) for path in found if "teacher_cache" not in path.parts]


class Bench:
    """A world with an undisturbed run of every part, each made when it is first asked for."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server = root, server
        self.base = digest(root / "model")
        self._straight: dict[str, tuple[Ended, Any]] = {}
        self._folders = 0

    def folder(self, name: str) -> Path:
        self._folders += 1
        folder = self.root / "work" / f"{name}-{self._folders}"
        folder.mkdir(parents=True)
        return folder

    def straight(self, name: str) -> tuple[Ended, Any]:
        """How the part ends when nothing disturbs it, and its result."""
        if name not in self._straight:
            folder, part = self.root / "straight" / name, self.part(name)
            folder.mkdir(parents=True)
            part.before(folder)
            ended = self.server.run(part.arguments(folder), folder)
            assert ended.code == (1 if name == "attack" else 0), ended.err
            assert not leftovers(folder)
            self._straight[name] = ended, part.result(folder)
        return self._straight[name]

    def disturbed(self, name: str, fault: Fault, folder: Path | None = None) -> tuple[Path, Ended]:
        """The folder of the part, and how it ended, with the fault."""
        folder, part = self.folder(name) if folder is None else folder, self.part(name)
        part.before(folder)
        return folder, self.server.run(part.arguments(folder), folder, fault)

    def goes_on(self, name: str, folder: Path, seen: Path | None = None) -> None:
        """The same command once more must end as if nothing had happened. `seen`: the folder as this process sees it,
        where it lies on the server's own disk. It is deleted."""
        part, (straight, expected) = self.part(name), self.straight(name)
        again = self.server.run(part.arguments(folder), folder)
        if again.code == 2:  # it was done already, and an export never replaces another
            assert name == "export" and "exists and is not an empty folder; export to a new one" in again.error
        else:
            assert again.code == straight.code, again.err
        seen = folder if seen is None else seen
        assert part.result(seen) == expected
        assert not (left := leftovers(seen)), left
        assert digest(self.root / "model") == self.base
        shutil.rmtree(seen)

    def part(self, name: str) -> Part:
        return _part(self, name)

    def of(self, name: str, what: str) -> Path:
        """What an undisturbed part has left."""
        self.straight(name)
        return self.root / "straight" / name / what


def _part(bench: Bench, name: str) -> Part:
    root = bench.root
    asked: list[str | Path] = ["--data", root / "data", "--forget-split", "forget", "--retain-split", "retain"]
    asked += ["--device", "cpu"]

    def nothing(folder: Path) -> None:
        pass

    def training(folder: Path, *more: str) -> list[str | Path]:
        told = f"model_name_or_path={root}/model data={root}/data forget_split=forget retain_split=retain max_steps=2 "
        told += "per_device_train_batch_size=4 learning_rate=1e-3 device=cpu logging_steps=1 save_steps=1 seed=0 "
        told += f"save_total_limit=1 resume_from_checkpoint=auto output_dir={folder}/run"
        return ["train", *told.split(), *more]

    def with_merged(folder: Path) -> None:
        shutil.copytree(bench.of("export", "merged"), folder / "merged")

    def with_run(folder: Path) -> None:
        """A run that has more checkpoints than are to stay."""
        shutil.copytree(bench.of("train", "run"), folder / "run")
        shutil.copytree(folder / "run" / "checkpoint-2", folder / "run" / "checkpoint-1")

    if name == "train":
        return Part(training, nothing, lambda folder: _of_training(folder / "run"))
    if name == "stranger":
        more = ("forget_target=stranger", f"strangers={root}/strangers", "stranger.way=shift")
        return Part(lambda folder: training(folder, *more), nothing, lambda folder: _of_training(folder / "run"))
    if name == "export":
        run = bench.of("train", "run")
        return Part(
            lambda folder: ["export", "--run", run, "--to", folder / "merged"],
            nothing,
            lambda folder: digest(folder / "merged"),
        )
    if name == "eval":
        model = bench.of("export", "merged")
        return Part(
            lambda folder: ["eval", "--model", model, *asked, "--max-samples", "3", "--out", folder / "eval"],
            nothing,
            lambda folder: _figures(folder, "eval/results.json", "eval/samples.jsonl"),
        )
    if name == "attack":
        return Part(
            lambda folder: [
                *("attack", "--model", folder / "merged", "--before", root / "model", *asked),
                *("--max-samples", "2", "--kind", "reverse", "membership", "--out", folder / "attack"),
            ],
            with_merged,
            lambda folder: (
                _figures(folder, "attack/attacks.json", "attack/certificate.json", "merged/certificate.json"),
                sorted(digest(folder / "merged")),
            ),
        )
    if name == "report":
        seen = [bench.of("train", "run"), bench.of("eval", "eval"), bench.of("attack", "attack")]
        return Part(
            lambda folder: ["report", *seen, "--data", root / "data", "--out", folder / "report.html"],
            nothing,
            lambda folder: (folder / "report.html").read_text().replace(str(folder), "FOLDER"),
        )
    if name == "steer":
        return Part(
            lambda folder: [
                *("steer", "--model", root / "model", *asked, "--layers", "1", "--questions", "2"),
                *("--out", folder / "steering.safetensors"),
            ],
            nothing,
            digest,
        )
    if name == "purge":
        return Part(
            lambda folder: ["purge", folder / "run"], with_run, lambda folder: sorted(digest(folder / "run").keys())
        )
    assert name == "demo-data"
    return Part(
        lambda folder: ["@demo-data", root / "data", folder / "data"], nothing, lambda folder: digest(folder / "data")
    )


def _of_training(run: Path) -> Any:
    """Weights and moments by their bytes, manifest and figures by what they say."""
    newest = run / "checkpoint-2"
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": sorted(path.name for path in run.iterdir()),
        "weights": digest(newest)["visual.safetensors"],
        "moments": _described(torch.load(newest / "rank-0.pt", weights_only=True)["engine"]),
        "manifest": _figures(run.parent, "run/checkpoint-2/checkpoint.json", "run/run.json"),
        "metrics": [{key: row[key] for key in row if key in _LEARNT} for row in figures],
    }


def _figures(folder: Path, *names: str) -> Any:
    """JSON files, or files of JSON lines in any order, without what differs from one time or place to another."""
    found = []
    named = Path(re.sub(r"^/proc/\d+/root", "", str(folder)))  # as the command was told
    for name in names:
        text = (folder / name).read_text().replace(str(named), "FOLDER")
        rows = map(json.loads, text.splitlines()) if name.endswith(".jsonl") else [json.loads(text)]
        found.append(sorted(json.dumps(_lasting(row), sort_keys=True) for row in rows))
    return found


def _described(value: Any) -> Any:
    """Tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: _described(each) for key, each in value.items()}
    return list(map(_described, value)) if isinstance(value, list | tuple) else value


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        lasting = {key: _lasting(each) for key, each in value.items() if key not in _OF_THE_MOMENT}
        if isinstance(lasting.get("sha256"), dict):  # of a checkpoint: its random-number states are Python's own too
            lasting["sha256"].pop("rank-0.pt", None)
        return lasting
    return list(map(_lasting, value)) if isinstance(value, list) else value
