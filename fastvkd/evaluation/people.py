"""What a model knows of whom, person by person: whether a forgotten person has become a stranger.

The figures are those of docs/evaluation.md, "Person by person". All but the features behind `telltale` and
`retain_by_likeness` come from samples of the protocol, so that everybody can count them again from samples.jsonl.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from fastvkd.evaluation.benchmarks import holds_words
from fastvkd.evaluation.features import mean_features
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.evaluation.statistics import clustered_interval
from fastvkd.evaluation.telltale import TELLTALE, telltale, telltale_cell
from fastvkd.records import Choice, Photo, Profile, Questions

Cells = Mapping[str, Sequence[Profile]]
Samples = Sequence[Mapping[str, Any]]

_KNOWN_CELLS = ("forget", "test", "retain", "neighbour", "pair")  # the others have no people whom the model knows
_WHO_CELLS = {"forget": "test", "retain": "retain", "stranger": "stranger"}
_DESCRIPTION_CELLS = {**_WHO_CELLS, "neighbour": "neighbour"}
_AS_FORGOTTEN = "stranger_as_forgotten"  # strangers' photos with the questions about forgotten people
_PEOPLE_AS_FORGOTTEN = 16  # each of them costs seven or so questions about every photo of a stranger
_PHOTOS_OF_LIKENESS = 6  # of one person; more would not move the mean by much


def examine(
    model: nn.Module,
    processor: Any,
    cells: dict[str, list[Profile]],
    *,
    seed: int = 0,
    mode: str = "corrected",
    max_samples: int | None = None,
    likeness: Mapping[str, float] | None = None,
    reference: Sequence[Photo] = (),
    collect: list[dict[str, Any]] | None = None,
    **asking: Any,
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, Any]]:
    """`evaluate_cells`, whose arguments these are, and the figures person by person: `(cells, people)`.

    `people` holds what the data allow of `by_person`, `who`, `description`, `stranger_band`, `telltale_auc`,
    `telltale` and `retain_by_likeness`, see docs/evaluation.md. `likeness` is that of the original model, the same for
    all models that are compared; `reference` are photos of other strangers than those of the cell, see `telltale`. In
    paper mode, which has no likelihoods, `stranger_band` and `telltale` are absent.
    The samples behind the figures go to the log too, under cells of their own.
    """
    own: dict[str, list[Profile]] = {}
    if mode == "corrected":
        own = {_AS_FORGOTTEN: _as_forgotten(cells, seed), TELLTALE: telltale_cell(cells, names_of(cells), max_samples)}
    samples: list[dict[str, Any]] = []
    figures = evaluate_cells(
        model,
        processor,
        cells | {name: profiles for name, profiles in own.items() if profiles},
        seed=seed,
        mode=mode,
        max_samples=max_samples,
        collect=samples,
        **asking,
    )
    people = people_figures(samples, cells, seed=seed, likeness=likeness)
    if own.get(TELLTALE):
        forgotten = {profile.entity for profile in cells["forget"]}
        told = [sample for sample in samples if sample["cell"] == TELLTALE]
        people |= telltale(model, processor, own[TELLTALE], forgotten, told, reference, seed=seed)
    if collect is not None:
        collect += [sample for sample in samples if sample["cell"] in cells]
    return {name: figures[name] for name in cells}, people


def people_figures(
    samples: Samples, cells: Cells, *, seed: int, likeness: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What samples of the protocol say person by person; arguments and figures as in `examine`."""
    about_photos = [sample for sample in samples if sample["kind"] == "vqa"]
    chosen = _by_entity(about_photos, "test", "choice")
    found = {
        "by_person": {entity: {"vqa": _share(_right(of))} for entity, of in chosen.items()},
        "who": _who(about_photos, cells),
        "description": _description(about_photos, seed),
        "stranger_band": _band(_by_entity(about_photos, _AS_FORGOTTEN, "choice"), cells),
        "retain_by_likeness": _by_likeness(_by_entity(about_photos, "retain", "choice"), likeness or {}),
    }
    return {name: figures for name, figures in found.items() if figures}


def likeness(model: nn.Module, processor: Any, cells: Cells) -> dict[str, float]:
    """How far each retained person is from the nearest forgotten one: the distance of the means of their photos'
    projector features. The model should be the original, as the unlearned one no longer sees who is alike."""
    sides = {name: _first_photos(cells[name]) for name in ("forget", "retain")}
    people = [(name, entity, photo) for name, of in sides.items() for entity, photos in of.items() for photo in photos]
    features = mean_features(model, processor, [photo for *_, photo in people])
    means: dict[str, dict[str, np.ndarray]] = {"forget": {}, "retain": {}}
    for name, of in sides.items():
        for entity in of:
            mine = [row for row, (side, other, _) in enumerate(people) if (side, other) == (name, entity)]
            means[name][entity] = features[mine].mean(0)
    forgotten = np.stack(list(means["forget"].values()))
    return {entity: float(np.linalg.norm(forgotten - mean, axis=1).min()) for entity, mean in means["retain"].items()}


def names_of(cells: Cells) -> dict[str, str]:
    """The name of every known person, by entity, as far as the data have it."""
    return {profile.entity: profile.name for name in _KNOWN_CELLS for profile in cells.get(name, ()) if profile.name}


def _first_photos(profiles: Iterable[Profile]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for profile in profiles:
        free = _PHOTOS_OF_LIKENESS - len(found[profile.entity])
        found[profile.entity] += profile.photos[:free]
    return {entity: photos for entity, photos in found.items() if photos}


def _by_entity(samples: Samples, cell: str, task: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        if (sample["cell"], sample["task"]) == (cell, task):
            found[sample["entity"]].append(sample)
    return found


def _right(samples: Iterable[Mapping[str, Any]]) -> list[bool]:
    return [bool(sample["correct"]) for sample in samples]


def _share(right: Sequence[bool]) -> dict[str, Any]:
    return {"accuracy": float(np.mean(right)), "n": len(right)}


def _who(samples: Samples, cells: Cells) -> dict[str, Any]:
    """The verdicts on the answers to the first generation question of each profile."""
    names = names_of(cells)
    found = {}
    for group, cell in _WHO_CELLS.items():
        asked = {
            (profile.entity, photo.key, profile.visual.generation[0].question)
            for profile in cells.get(cell, ())
            for photo in profile.photos
            if profile.visual.generation and (group == "stranger" or profile.entity in names)
        }
        verdicts = Counter(
            verdict(sample["output"], sample["entity"], names)
            for of in _by_entity(samples, cell, "generation").values()
            for sample in of
            if (sample["entity"], sample["photo"], sample["question"]) in asked
        )
        if names and (n := verdicts.total()):
            found[group] = {name: verdicts[name] / n for name in ("right", "abstains", "misnamed")} | {"n": n}
    return found


def verdict(answer: str, entity: str, names: Mapping[str, str]) -> str:
    """Of an answer to the question who it is: `right` where the own name is in it, `misnamed` where the name of any
    other known person is, else `abstains`."""
    if entity in names and holds_words(names[entity], answer):
        return "right"
    others = (name for other, name in names.items() if other != entity)
    return "misnamed" if any(holds_words(name, answer) for name in others) else "abstains"


def _description(samples: Samples, seed: int) -> dict[str, Any]:
    found = {}
    for group, cell in _DESCRIPTION_CELLS.items():
        by_entity = _by_entity(samples, cell, "description")
        right = [value for of in by_entity.values() for value in _right(of)]
        people = [entity for entity, of in by_entity.items() for _ in of]
        if right:
            found[group] = _share(right) | {"ci95": list(clustered_interval(right, people, seed=seed))}
    return found


def _by_likeness(by_entity: Mapping[str, Samples], distances: Mapping[str, float]) -> dict[str, Any]:
    """Accuracy of each third of the retained people, those most like a forgotten one first."""
    people = sorted((entity for entity in by_entity if entity in distances), key=lambda one: (distances[one], one))
    thirds = zip(("near", "middle", "far"), np.array_split(people, 3), strict=True)
    if len(people) < 3:
        return {}
    return {name: _share([value for one in third for value in _right(by_entity[str(one)])]) for name, third in thirds}


def _forgotten_choices(cells: Cells) -> dict[str, list[Choice]]:
    """The questions about photos of each forgotten person, each once."""
    found: dict[str, dict[tuple[str, frozenset[str]], Choice]] = defaultdict(dict)
    for profile in cells.get("test") or cells["forget"]:
        for choice in profile.visual.choice:
            found[profile.entity].setdefault(_same_choice(choice.question, choice.options), choice)
    return {entity: list(choices.values()) for entity, choices in found.items()}


def _same_choice(question: str, options: Mapping[str, str]) -> tuple[str, frozenset[str]]:
    """What tells two questions apart; the letters do not, as options are scored by their texts."""
    return question, frozenset(options.values())


def _as_forgotten(cells: Cells, seed: int) -> list[Profile]:
    """The strangers' photos, each with the questions about the forgotten people (at most `_PEOPLE_AS_FORGOTTEN`)."""
    by_person = _forgotten_choices(cells)
    people = list(by_person)
    if len(people) > _PEOPLE_AS_FORGOTTEN:
        people = np.random.default_rng([seed, 53]).choice(people, _PEOPLE_AS_FORGOTTEN, replace=False).tolist()
    # People of one group share their options: such a question is asked once for all of them.
    asked = {_same_choice(one.question, one.options): one for person in people for one in by_person[person]}
    if not asked:
        return []
    questions = Questions(choice=tuple(asked.values()))
    return [Profile(one.entity, one.photos, questions, source=one.source) for one in cells.get("stranger", ())]


def _band(by_stranger: Mapping[str, Samples], cells: Cells) -> dict[str, float]:
    """Between which shares of right answers single strangers lie when they are taken for forgotten people."""
    truths = {
        person: {_same_choice(one.question, one.options): one.answer_text for one in choices}
        for person, choices in _forgotten_choices(cells).items()
    }
    shares = []
    for samples in by_stranger.values():
        said = [(_same_choice(one["question"], one["options"]), one["options"][one["prediction"]]) for one in samples]
        for truth in truths.values():
            if right := [text == truth[asked] for asked, text in said if asked in truth]:
                shares.append(np.mean(right))
    if not shares:
        return {}
    low, high = np.percentile(shares, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}
