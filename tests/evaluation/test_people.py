"""Person by person: every figure against one computed by hand, from a model whose answers are known."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llava import person, picture

from fastvkd.errors import ModelError
from fastvkd.evaluation import protocol, run
from fastvkd.evaluation.comparison import comparison_table, read_runs
from fastvkd.evaluation.multiple_choice import OptionScores
from fastvkd.evaluation.people import examine, likeness, names_of, people_figures, verdict
from fastvkd.evaluation.statistics import bootstrap_interval, clustered_interval
from fastvkd.models.placement import Loading
from fastvkd.options import EvalOptions
from fastvkd.records import Choice, Open, Profile, Questions

WHO, COAT, JOB = "Who is it?", "What colour is the coat?", "What is the job?"
JOBS = {"A": "baker", "B": "teacher"}
COATS = {"A": "red", "B": "blue"}
NOBODY = "I do not know this person."


def one(entity: str, photo: int, *, name: str = "", job: str = "A") -> Profile:
    asked = Questions(
        choice=(Choice(JOB, JOBS, job),) if name else (),
        generation=(Open(WHO, f"{name} is a baker" if name else NOBODY), Open("What else?", "Nothing")),
        description=(Choice(COAT, COATS, "A"),),
    )
    return Profile(entity, (picture(photo),), asked, source=f"row:{photo}", name=name)


ANN, BEN = dict(entity="ann", name="Ann Lee"), dict(entity="ben", name="Ben Ito", job="B")
KIM, SAM, PAT = (dict(entity=name.lower(), name=f"{name} Oz", job="B") for name in ("Kim", "Sam", "Pat"))
STRANGERS = [dict(entity=f"s{k}") for k in range(4)]
CELLS = {
    "forget": [one(**ANN, photo=0), one(**BEN, photo=1)],
    "test": [one(**ANN, photo=2), one(**ANN, photo=3), one(**BEN, photo=4), one(**BEN, photo=5)],
    "retain": [one(**KIM, photo=6), one(**SAM, photo=7), one(**PAT, photo=8)],
    "stranger": [one(**who, photo=10 + 2 * k + i) for k, who in enumerate(STRANGERS) for i in range(2)],
}
# By photo: what the model says who it is, how it answers about the job, and what it says of the coat.
SAID = {
    2: ("ann lee is a baker", "baker", "Red."),
    3: ("Ben Ito is a baker", "teacher", "red"),
    4: ("This is Kim Oz", "teacher", "blue"),
    5: (NOBODY, "teacher", " RED"),
    6: ("Kim Oz", "teacher", "red"),
    7: ("Kim Oz", "baker", "red"),
    8: (NOBODY, "teacher", "the red"),
    **{10 + k: (NOBODY, "baker", "red") for k in range(6)},
    16: ("Ann Leeson", "teacher", "blue"),
    17: ("Sam Oz", "baker", "red"),
}


class KnownAnswers:
    """In the place of `Asker`."""

    def __init__(self, model, processor, *_: object) -> None:
        self.processor = processor

    def _said(self, query) -> tuple[str, str, str]:
        return SAID.get(int(query.photos[0].source.removeprefix("test:")), ("", "", ""))

    def answers(self, queries, max_new_tokens, tick=None) -> list[str]:
        found = []
        for query in queries:
            who, _, coat = self._said(query)
            found.append(who if WHO in query.prompt else coat if COAT in query.prompt else "Nothing")
        return found

    def scores(self, queries, options, tick=None) -> list[OptionScores]:
        return [
            OptionScores(tuple(-1.0 if text in self._said(query) else -9.0 for text in texts), (1,) * len(texts))
            for query, texts in zip(queries, options, strict=True)
        ]


@pytest.fixture
def known(monkeypatch, tiny):
    monkeypatch.setattr(protocol, "Asker", KnownAnswers)
    return tiny


def test_every_figure_is_the_one_counted_by_hand(known, tmp_path: Path) -> None:
    distances = {"kim": 1.0, "sam": 3.0, "pat": 2.0}
    log = tmp_path / "samples.jsonl"
    cells, people = examine(
        known.model, known.processor, CELLS, batch_size=4, likeness=distances, log_path=log, kinds=("vqa",)
    )
    assert set(cells) == set(CELLS)
    assert people["by_person"] == {
        "ann": {"vqa": {"accuracy": 0.5, "n": 2}},
        "ben": {"vqa": {"accuracy": 1.0, "n": 2}},
    }
    # Ann is called Ben, who is forgotten as well, and Ben is called Kim, who is retained: both are misnamed.
    assert people["who"]["forget"] == {"right": 0.25, "abstains": 0.25, "misnamed": 0.5, "n": 4}
    third = pytest.approx(1 / 3)
    assert people["who"]["retain"] == {"right": third, "abstains": third, "misnamed": third, "n": 3}
    # "Ann Leeson" is not Ann Lee.
    assert people["who"]["stranger"] == {"right": 0.0, "abstains": 7 / 8, "misnamed": 1 / 8, "n": 8}
    described = {name: (of["accuracy"], of["n"]) for name, of in people["description"].items()}
    assert described == {"forget": (0.75, 4), "retain": (pytest.approx(2 / 3), 3), "stranger": (7 / 8, 8)}
    assert cells["test"]["vqa"]["description"] == 0.75 and cells["test"]["vqa"]["n_description"] == 4
    # Three strangers are always "baker": all right as Ann, never as Ben. The fourth is once either.
    shares = [1, 1, 1, 0.5, 0, 0, 0, 0.5]
    low, high = np.percentile(shares, [2.5, 97.5])
    assert people["stranger_band"] == {"low": pytest.approx(low), "high": pytest.approx(high)}
    assert {name: of["accuracy"] for name, of in people["retain_by_likeness"].items()} == dict(
        near=1.0, middle=1.0, far=0.0
    )
    assert set(people["telltale"]) == {"scores", "null"}
    assert people["telltale_auc"] == max(people["telltale"]["scores"].values())
    # Everything said can be read, photo by photo.
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    said = {(of["entity"], of["source"], of["question"]): of["output"] for of in lines if "output" in of}
    assert said["ann", "test:3", WHO] == "Ben Ito is a baker" and said["s3", "test:16", COAT] == "blue"
    assert sum(of.get("cell") == "stranger_as_forgotten" for of in lines if "entity" in of) == 8


def test_data_that_moved_keep_their_answers(known, tmp_path: Path, monkeypatch) -> None:
    asked = dict(batch_size=4, log_path=tmp_path / "samples.jsonl", fingerprint="weights", kinds=("vqa",))
    first = examine(known.model, known.processor, CELLS, **asked)
    moved = {
        name: [replace(of, photos=(replace(of.photos[0], source=f"elsewhere/{of.photos[0].source}"),)) for of in cell]
        for name, cell in CELLS.items()
    }
    monkeypatch.setattr(KnownAnswers, "_said", None)  # nobody is asked again
    assert examine(known.model, known.processor, moved, **asked) == first


def test_compare_prints_them_beside_the_cells(known, tmp_path: Path) -> None:
    cells, people = examine(known.model, known.processor, CELLS, batch_size=4, kinds=("vqa",))
    results, report = tmp_path / "results.json", tmp_path / "report.json"
    results.write_text(json.dumps({"benchmark": "jsonl", "mode": "corrected", "cells": cells, **people}))
    report.write_text(json.dumps({name: cells | people for name in ("vanilla", "unlearned")}))
    rows = read_runs([results, report])
    assert [row.figures for row in rows] == [rows[0].figures] * 3
    figures = rows[0].figures
    assert figures["by_person ann acc"] == 0.5 and figures["who forget misnamed"] == 0.5
    assert figures["telltale_auc"] == people["telltale_auc"] and figures["test VQA seen"] == 0.75
    assert figures["stranger_band high"] == people["stranger_band"]["high"]
    assert rows[0].intervals["description forget acc"] == people["description"]["forget"]["ci95"]
    assert "who forget misnamed" in comparison_table(rows, "text")


def test_figures_stay_away_where_the_data_do_not_allow_them(known) -> None:
    cells = {
        name: [replace(of, name="", visual=replace(of.visual, description=())) for of in profiles]
        for name, profiles in CELLS.items()
        if name != "stranger"
    }
    _, people = examine(known.model, known.processor, cells, batch_size=4, kinds=("vqa",))
    assert set(people) == {"by_person"}


def test_paper_mode_has_no_likelihoods_to_tell_strangers_by(known) -> None:
    _, people = examine(known.model, known.processor, CELLS, batch_size=4, mode="paper", kinds=("vqa",))
    assert {"who", "by_person"} <= set(people) and not {"telltale", "stranger_band"} & set(people)


def test_misnaming_counts_whoever_it_is() -> None:
    names = names_of(CELLS)
    assert names == {"ann": "Ann Lee", "ben": "Ben Ito", "kim": "Kim Oz", "sam": "Sam Oz", "pat": "Pat Oz"}
    assert [verdict(f"{name}.", "ann", names) for name in names.values()] == ["right", *["misnamed"] * 4]
    assert verdict("Ann Lee, or Ben Ito", "ann", names) == "right"
    assert verdict(NOBODY, "s1", names) == "abstains" and verdict("ANN LEE", "s1", names) == "misnamed"


def test_only_the_first_question_is_who_it_is(known) -> None:
    samples: list = []
    _, people = examine(known.model, known.processor, CELLS, batch_size=4, collect=samples, kinds=("vqa",))
    assert sum(of["task"] == "generation" and of["cell"] == "test" for of in samples) == 8
    assert people["who"]["forget"]["n"] == 4
    assert people_figures(samples, CELLS, seed=0)["who"] == people["who"]


def test_people_who_are_all_alike_widen_the_interval() -> None:
    values, people = [1.0] * 20 + [0.0] * 20, [str(k // 10) for k in range(40)]
    low, high = bootstrap_interval(values, seed=0)
    clustered_low, clustered_high = clustered_interval(values, people, seed=0)
    assert clustered_low < low - 0.1 and clustered_high > high + 0.1
    # Each value its own cluster: the interval of independent values.
    assert clustered_interval(values, [str(k) for k in range(40)], seed=0) == pytest.approx((low, high), abs=0.03)
    with pytest.raises(ValueError, match="no values"):
        clustered_interval([], [], seed=0)


def test_the_distance_to_a_forgotten_twin_is_zero(tiny) -> None:
    cells = {"forget": [person(0), person(1)], "retain": [person(2, photo=1), person(3), person(4)]}
    distances = likeness(tiny.model, tiny.processor, cells)
    assert set(distances) == {"Person 2", "Person 3", "Person 4"}
    assert distances["Person 2"] == pytest.approx(0, abs=1e-5)
    assert min(distances["Person 3"], distances["Person 4"]) > 0.1


def test_a_likeness_of_other_people_leaves_the_thirds_away(known) -> None:
    samples = SimpleNamespace(all=[])
    examine(known.model, known.processor, CELLS, batch_size=4, collect=samples.all, kinds=("vqa",))
    assert "retain_by_likeness" not in people_figures(samples.all, CELLS, seed=0, likeness={"kim": 1.0, "sam": 2.0})


def test_who_is_alike_is_asked_of_the_model_before(world, tmp_path, monkeypatch, caplog) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run, "likeness", lambda model, *_: asked.append(model) or {"a": 1.0})
    options = EvalOptions(model=str(world.model), data=str(world.data), out=tmp_path)
    model, loading = object(), Loading(torch.device("cpu"))
    assert run._likeness(options, None, loading, model, None, {}) == {"a": 1.0} and asked == [model]
    for original, made_of in ((str(world.model), "nowhere"), (None, str(world.model))):
        assert run._likeness(replace(options, original=original), made_of, loading, model, None, {}) == {"a": 1.0}
        assert asked[-1] is not model and len(asked[-1].model.language_model.layers) == 0
    assert (
        run._likeness(options, str(tmp_path / "gone"), loading, model, None, {}) is None and "--original" in caplog.text
    )
    with pytest.raises(ModelError, match="gone"):
        run._likeness(replace(options, original=str(tmp_path / "gone")), None, loading, model, None, {})
