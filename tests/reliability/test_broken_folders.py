"""Folders broken in two hundred ways: each is refused in one line that names what is broken, or read as if whole.

A case is drawn from its number alone: which folder, which command reads it, and what is done to it.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from broken import break_folder
from ledger import note
from wholes import Ended, Wholes, run, weights_in

CASES = 200
FAULT = "broken folder"


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
    return evaluated(to, run(*wholes.evaluation(to, folder, wholes.at("jsonl"))))


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
    return run("requests", str(folder), "--data", str(wholes.at("jsonl")), "--json")


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
    there = set(folder.rglob("*"))
    ended = run("purge", str(folder))
    gone = sorted(path.relative_to(folder).as_posix() for path in there - set(folder.rglob("*")))
    return Ended(ended.code, "", ended.err, " ".join(gone))


READS: dict[str, tuple[Verb, ...]] = {
    "parquet": (data_check, dry_run_on_data, requests_of_data, train_on_data),
    "jsonl": (data_check, dry_run_on_data, train_on_data, evaluate_on_data, requests_of_data),
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
    """Without the path of the case, which is another one each time, and by whose length columns are set."""
    parts = (part.replace(str(root), "ROOT") for part in (ended.out, ended.err, ended.left))
    return Ended(ended.code, *(re.sub(" +", " ", part) for part in parts))


def judged(number: int, wholes: Wholes, unbroken: Callable[[str, Verb], Ended], root: Path) -> str:
    """The outcome of a case: "refused", "read as if whole", or "read, and said what is missing". Fails for others."""
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
        new = set(found.out.splitlines()) - set(whole.out.splitlines())
        if any(name in line for name in done.names for line in new):
            return "read, and said what is missing"
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
