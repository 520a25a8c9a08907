"""Requests that keep coming: eight of one or two people each, one after the other, beside all at once and beside gold.

Each request has photos of its own people alone. Those of earlier ones are gone, as they had to be deleted, so the
frozen original of a request is the model after the one before it. Kept is everybody who has not asked yet. A row is the
model after one request, and is measured on all people who ask sooner or later; `--only 'request *' 'at once'` does
without the gold model, which is trained for this study. The models stand in --out, so that a row that is missing
takes up the chain where it ends.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from world import World

from fastvkd.data import mllmu
from fastvkd.demo.data import CHANCE
from fastvkd.demo.run import trained_model
from fastvkd.engines.exporting import export
from fastvkd.evaluation.people import verdict
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.loading import VISUAL_KEY, load_model
from fastvkd.records import Profile
from fastvkd.reporting.model_card import run_card
from fastvkd.unlearning.loop import unlearn
from study import Row, Study, percent

# How many people each request is about, by the demo's size.
REQUESTS = {"default": (1, 2) * 4, "small": (1,) * 8, "tiny": (1,) * 8}
# What makes the tiny study a matter of a minute or two: its figures show that it runs, and nothing else.
SHORT: dict[str, dict[str, Any]] = {"tiny": {"max_steps": 30, "stranger.way": "shift", "auxiliary_images": 32}}
SAMPLES = 1008  # questions a set and kind
FORGET, RETAIN = "forget_now", "retain_now"
ANSWERS = ("right", "misnamed")
VARIANTS: dict[str, Any] = {
    "before": 0,
    **{f"request {number}": number for number in range(1, 9)},
    "at once": None,
    "gold": None,
}


def measure(world: World, variant: str) -> Row:
    """One row: the model after a request, and everybody who asks sooner or later in unseen photos.

    people: by entity, the number of the request that it is in, accuracy, and the shares of answers with the right and
    with another name. drift, step: of the visual weights, from the first model and from the one before.
    """
    requests = asking(world)
    everybody = [entity for request in requests for entity in request]
    seconds: float | None = None
    previous = world.vanilla
    if variant == "gold":
        folder = gold(world, everybody)
    elif variant == "at once":
        folder = kept(world, "at-once", world.vanilla, everybody, [])
    else:
        number = VARIANTS[variant]
        previous, folder = after(world, max(0, number - 1)), after(world, number)
    if (noted := folder.with_suffix(".json")).exists():
        seconds = json.loads(noted.read_text())["seconds"]
    done = VARIANTS[variant] if VARIANTS[variant] is not None else len(requests)
    changed = {} if variant == "gold" else {"drift": drift(world.vanilla, folder), "step": drift(previous, folder)}
    return {"asked": [len(request) for request in requests[:done]], **known(world, folder, requests), **changed} | {
        "seconds": seconds
    }


def asking(world: World) -> list[list[str]]:
    """Who asks in which request: the people whom the demo forgets, then others by lot."""
    everybody = list(dict.fromkeys(profile.entity for profile in mllmu.read_split(world.folder, "Full_Set")))
    first = list(dict.fromkeys(profile.entity for profile in world.cells["forget"]))
    others = np.random.default_rng([world.seed, 61]).permutation([one for one in everybody if one not in first])
    waiting = iter([*first, *map(str, others)])
    return [[next(waiting) for _ in range(count)] for count in REQUESTS[world.size]]


def after(world: World, number: int) -> Path:
    """The folder of the model after so many requests, found or made now; after none that of the vanilla model."""
    if number == 0:
        return world.vanilla
    requests = asking(world)
    earlier = [entity for request in requests[: number - 1] for entity in request]
    return kept(world, f"request-{number}", after(world, number - 1), requests[number - 1], earlier)


def models(world: World) -> Path:
    """Where the models of this study lie: others of another recipe, other requests or another first model."""
    return world.shared / f"{world.vanilla.name}-{STUDY.key(world.size, world.seed, 'before', world.overrides)}"


def kept(world: World, name: str, base: Path, now: Sequence[str], earlier: Sequence[str]) -> Path:
    """The folder of `base` made to forget `now`, found or made; beside it the seconds that this took."""
    folder = models(world) / name
    with only_one(folder):
        if not folder.exists():
            forget(world, folder, base, now, earlier)
    return folder


def forget(world: World, folder: Path, base: Path, now: Sequence[str], earlier: Sequence[str]) -> None:
    """A whole request as anybody would do it: data without the earlier people, a run, an export."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        data, run = Path(work) / "data", Path(work) / "run"
        everybody = mllmu.read_split(world.folder, "Full_Set")
        mllmu.write_split(data, FORGET, [one for one in everybody if one.entity in now])
        mllmu.write_split(data, RETAIN, [one for one in everybody if one.entity not in {*now, *earlier}])
        own = {"model_name_or_path": str(base), "data": str(data), "forget_split": FORGET, "retain_split": RETAIN}
        own["cache_dir"] = str(run / "teacher_cache")  # maps and features of the earlier people are gone too
        done = unlearn(world.settings(run, {**world.spec.overrides, **SHORT.get(world.size, {}), **own}))
        if not done.finished:
            raise RuntimeError(f"{folder.name}: ended early; run the study again")
        folder.with_suffix(".json").write_text(json.dumps({"seconds": sum(done.seconds.values())}))
        export(run, folder, model_card=run_card(run))


def gold(world: World, everybody: Sequence[str]) -> Path:
    """The model that never saw anybody who asks, in a cache of its own: the demo's gold model knows most of them."""
    unseen = [one for one in world.data.splits["Full_Set"] if one.entity in everybody]
    data = dataclasses.replace(world.data, splits=world.data.splits | {FORGET: unseen}, forget_split=FORGET)
    cache = models(world) / "gold"
    cache.mkdir(parents=True, exist_ok=True)
    with only_one(cache):
        for sight in world.vanilla.parent.glob("demo-sight-*"):  # all models of a seed share it
            if not (cache / sight.name).exists():
                shutil.copy(sight, cache)
        return trained_model(world.spec, data, world.seed, cache, {}, gold=True, blueprint=world.blueprint)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Another process that is about to make the same waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def known(world: World, folder: Path, requests: Sequence[Sequence[str]]) -> Row:
    """What a model knows of everybody who asks, in unseen photos, and of the rest."""
    number_of = {entity: number for number, request in enumerate(requests, 1) for entity in request}
    everybody = mllmu.read_split(world.folder, "Full_Set")
    cells = {
        "test": [one for one in mllmu.read_split(world.folder, "Test_Set") if one.entity in number_of],
        "retain": [one for one in everybody if one.entity not in number_of],
        **{name: world.cells[name] for name in ("realworld", "stranger") if name in world.cells},
    }
    samples: list[Row] = []
    figures = evaluate_cells(
        load_model(folder),
        world.processor,
        {name: list(map(asked_who, of)) for name, of in cells.items()},
        batch_size=64,
        seed=world.seed,
        max_samples=SAMPLES,
        tasks=("choice", "generation", "description"),
        kinds=("vqa",),
        photos=world.prepared,
        collect=samples,
    )
    names = {profile.entity: profile.name for profile in everybody}
    people: dict[str, Row] = {}
    for entity, number in number_of.items():
        own = [sample for sample in samples if sample["cell"] == "test" and sample["entity"] == entity]
        people[entity] = {"request": number, "accuracy": right_share(own, "choice"), **named(own, names)}
    of = {name: [sample for sample in samples if sample["cell"] == name] for name in cells}
    return {
        "people": people,
        "vqa": {name: figures[name]["vqa"]["accuracy"] for name in ("retain", "realworld") if name in figures},
        "description": {name: right_share(of[name], "description") for name in of if name != "realworld"},
        "strangers": named(of.get("stranger", []), names),
        "retained": named(of["retain"], names),
    }


def asked_who(profile: Profile) -> Profile:
    """Of open questions only the first, which asks who it is."""
    return dataclasses.replace(
        profile, visual=dataclasses.replace(profile.visual, generation=profile.visual.generation[:1])
    )


def right_share(samples: Sequence[Row], task: str) -> float | None:
    right = [sample["correct"] for sample in samples if sample["task"] == task]
    return sum(right) / len(right) if right else None


def named(samples: Sequence[Row], names: dict[str, str]) -> Row:
    """Shares of the answers to who it is that hold the own name, and another known one."""
    said = [verdict(one["output"], one["entity"], names) for one in samples if one["task"] == "generation"]
    counts = Counter(said)
    return {**{answer: counts[answer] / len(said) for answer in ANSWERS}, "n": len(said)} if said else {}


def drift(first: Path, now: Path) -> float:
    """|w - w0| / |w0| over all visual weights."""
    before, after = (load_model(folder).state_dict() for folder in (first, now))
    moved = total = 0.0
    for name, weight in before.items():
        if VISUAL_KEY.search(name) and torch.is_floating_point(weight):
            moved += float((after[name].double() - weight.double()).square().sum())
            total += float(weight.double().square().sum())
    return math.sqrt(moved / total)


def groups(row: Row) -> tuple[list[Row], list[Row]]:
    """Those who had asked before the row's last request, and those of that one; of all at once all are of one."""
    last = len(row["asked"])
    people = sorted(row["people"].values(), key=lambda one: one["request"])
    if not row["variant"].startswith("request"):
        return [], people
    return [one for one in people if one["request"] < last], [one for one in people if one["request"] == last]


def mean(people: Sequence[Row], figure: str) -> str:
    found = [one[figure] for one in people if one.get(figure) is not None]
    return percent(sum(found) / len(found)) if found else "-"


def shares(people: Sequence[Row]) -> str:
    """Accuracy in unseen photos, named right, misnamed."""
    return " / ".join(mean(people, figure) for figure in ("accuracy", *ANSWERS)) if people else "-"


def one_by_one(row: Row) -> str:
    """The accuracy of everybody, in the order of asking; those who have not asked yet in brackets."""
    done = len(row["asked"])
    people = sorted(row["people"].values(), key=lambda one: one["request"])
    texts = [(percent(one["accuracy"], ".0f"), one["request"] <= done) for one in people]
    return " ".join(text if asked else f"({text})" for text, asked in texts)


def note(report: dict[str, Any]) -> list[str]:
    return [
        f"Chance is {100 * CHANCE:.0f}. Unseen photos; shares in %: multiple choice right / named right / misnamed. "
        "Each request starts from the model after the one before, with no photo of anybody who asked earlier. Drift: "
        "relative L2 distance of the visual weights from the first model, and in brackets from the one before."
    ]


STUDY = Study(
    about="Requests that keep coming",
    variants=VARIANTS,
    row=measure,
    note=note,
    columns={
        "seed": lambda row: row["seed"],
        "model": lambda row: row["variant"],
        "people so far": lambda row: sum(row["asked"]),
        "of this request": lambda row: shares(groups(row)[1]),
        "of earlier ones": lambda row: shares(groups(row)[0]),
        "everybody who asks, right": one_by_one,
        "strangers misnamed": lambda row: percent(row["strangers"].get("misnamed")),
        "retain": lambda row: percent(row["vqa"]["retain"]),
        "retained named right": lambda row: percent(row["retained"].get("right")),
        "real world": lambda row: percent(row["vqa"].get("realworld")),
        "description: asked / strangers / retained": lambda row: " / ".join(
            percent(row["description"].get(name)) for name in ("test", "stranger", "retain")
        ),
        "drift": lambda row: f"{percent(row['drift'])} ({percent(row['step'])})" if "drift" in row else "",
        "seconds": lambda row: "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    },
    protocol=lambda: {"requests": REQUESTS, "short": SHORT, "samples": SAMPLES, "chance": CHANCE},
    seeds=(0,),
    threads=1,
)
