"""The study of removal: every attack on every kind of model, and the table of who comes how far above gold."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import defences
import pytest
import torch
from random_world import brief_world, world_over
from study import methods, removal
from tables import RESULTS
from world import RECIPE, World

from fastvkd.models.loading import load_model
from fastvkd.paths import shipped
from fastvkd.settings import Settings, Stranger, load_settings

ATTACKS = {("plain", rate) for rate in (1e-5, 1e-4, 1e-3)} | {
    (variant, 1e-3)
    for variant in (
        *("redrawn_projector", "shifted_biases", "recentred_biases", "noise"),
        *("retained_photos", "unrelated_photos", "all_photos"),
    )
}


def curve(weights: str, auc: float, *, variant: str = "plain", rate: float = 1e-3, collapsed: bool = False) -> dict:
    return {"variant": variant, "weights": weights, "learning_rate": rate, "auc": auc, "collapsed": collapsed}


def row(variant: str, *curves: dict, seed: int = 0) -> dict:
    return {"size": "tiny", "seed": seed, "variant": variant, "relearning": list(curves)}


def full(made: dict) -> dict:
    """A row with the figures that do not come of attacks."""
    who = {"right": 0.0, "abstains": 0.9, "misnamed": 0.1, "n": 8}
    return {
        **made,
        "setting": {},
        "vqa": dict.fromkeys(("forget", "test", "retain", "realworld", "neighbour"), 0.25),
        "who": {"forget": who, "stranger": who},
        "description": {kind: {"accuracy": 0.9} for kind in ("forget", "stranger", "retain", "neighbour")},
        "text_qa_worst": 1.0,
        "language_model_unchanged": True,
        "unlearning_seconds": 3.0,
    }


def test_the_worst_attack_is_the_one_furthest_above_gold_of_the_same_seed() -> None:
    rows = [
        row("gold", curve("visual", 0.6), curve("visual", 0.2, rate=1e-4), curve("all", 0.8)),
        row("vkd", curve("visual", 0.9), curve("visual", 0.7, rate=1e-4), curve("all", 0.7)),
        row("vkd", curve("visual", 0.95), curve("visual", 0.3, rate=1e-4), curve("all", 0.9), seed=1),
    ]
    gold, first, second = removal.beside_gold(rows)
    assert first["worst"]["visual"]["learning_rate"] == 1e-4  # 0.5 above gold, where the highest area is 0.3 above
    assert first["worst"]["visual"]["gap"] == pytest.approx(0.5)
    assert first["worst"]["all"]["gap"] == pytest.approx(-0.1)
    assert [(one["worst"]["visual"]["auc"], one["worst"]["visual"]["gap"]) for one in (gold, second)] == [
        (0.6, None),
        (0.95, None),  # seed 1 has no gold
    ]


def test_a_collapsed_curve_does_not_count_but_for_what_it_brought_back() -> None:
    def worst(*curves: dict) -> dict | None:
        gold = [dict(one, auc=0.5, collapsed=False) for one in curves]
        return list(removal.beside_gold([row("gold", *gold, curve("all", 0.5)), row("vkd", *curves)]))[1]["worst"]

    low, near = curve("visual", 0.45), curve("visual", 0.55, variant="noise", collapsed=True)
    high = curve("visual", 0.7, variant="noise", collapsed=True)
    assert worst(low, near)["visual"]["auc"] == 0.45
    assert worst(near)["visual"] is None
    assert worst(low, high)["visual"]["auc"] == 0.7  # else what hides behind the projector would count as gone
    (alone,) = removal.beside_gold([row("vkd", low, near)])
    assert alone["worst"]["visual"]["auc"] == 0.45 and alone["worst"]["all"] is None


def test_the_table_has_every_area_the_worst_and_what_was_kept() -> None:
    both = (curve("visual", 0.5), curve("all", 0.6))
    moved = [curve(kind, 0.3, variant="redrawn_projector", collapsed=True) for kind in ("visual", "all")]
    rows = [
        full(row("gold", *both, *moved)),
        full(row("vkd, scrub", curve("visual", 0.9), curve("all", 0.7, collapsed=True), *moved)),
        full(row("gd", *(dict(one, auc=0.2, collapsed=True) for one in (*both, *moved)))),
    ]
    lines = removal.STUDY.table({"rows": rows})
    assert "| seed | model | plain at 0.001 | redrawn projector |" in lines
    assert "| 0 | VKD, scrub | 90.0 / 70.0* | 30.0* / 30.0* |" in lines
    assert "| 0 | gold | 50.0 by plain at 0.001 | 60.0 by plain at 0.001 | 25.0 |" in " ".join(lines)
    told = next(line for line in lines if line.startswith("| 0 | VKD, scrub | +40.0, 90.0 by plain at 0.001 |"))
    assert " | nothing shown | 25.0 | 0 / 10 (10) | 90 / 90 / 90 / 90 | 25.0 | " in told
    assert "| 0 | GD (GA + retain) | nothing shown | nothing shown |" in " ".join(lines)
    assert removal.STUDY.table({"rows": []})


@pytest.fixture
def told(world, tmp_path: Path, monkeypatch) -> World:
    """A world whose runs end with their settings, in place of a model."""
    run = SimpleNamespace(seconds={"prepare": 1.0, "unlearn": 8.0}, images_seen=0)

    def unlearn(self: World, overrides: dict, *, config: str | None = RECIPE) -> tuple[Settings, Any]:
        return self.settings(tmp_path / "run", overrides, config=config), run

    def follow(self: World, overrides: dict, *, steps: int, every: int) -> Iterator[tuple[int, Settings, Any]]:
        settings = self.settings(tmp_path / "run", {"max_steps": steps, **overrides}, config=None)
        yield from ((step, settings, run) for step in range(every, steps + 1, every))

    monkeypatch.setattr(World, "unlearn", unlearn)
    monkeypatch.setattr(World, "follow", follow)
    made = world_over(world, tmp_path, overrides={})
    made.size, made.gold, made.one_photo = "default", world.model, tmp_path / "one-photo"
    return made


def test_the_settings_of_every_variant_load(told: World) -> None:
    recipe = told.settings(Path(), {})
    assert (
        recipe.forget_target == load_settings(shipped(RECIPE), {"model_name_or_path": "x", "data": "x"}).forget_target
    )
    changed: dict[str, dict[str, Any]] = {}
    for name, variant in removal.VARIANTS.items():
        if variant.method in ("vanilla", "gold"):
            continue
        _, settings = removal.made(told, variant)
        assert isinstance(settings, Settings)
        if variant.method.startswith("vkd"):
            theirs = dataclasses.asdict(settings)
            changed[name] = {
                key: theirs[key] for key, value in dataclasses.asdict(recipe).items() if theirs[key] != value
            }
            changed[name].pop("output_dir")
        else:
            assert settings.method == name
    assert changed.pop("vkd") == {}
    assert changed.pop("vkd-one-photo") == {"data": str(told.one_photo)}
    assert changed.pop("vkd-saturate")["forget_target"] == "saturate"
    assert changed.pop("vkd-noise")["forget_target"] == "noise"
    assert changed.pop("vkd, projector and llm:1") == {"sites": {"projector": 1.0, "llm:1": 1.0}}
    assert changed.pop("vkd, twice as far")["stranger"]["beyond"] > 10 * Stranger.beyond
    assert changed.pop("vkd, scrub")["scrub"] is not None
    for name, difference in changed.items():  # those of defences.py
        assert removal.VARIANTS[name].defence and set(difference) <= {"max_drift"}
    assert len(changed) == 4


def test_methods_on_answers_are_at_the_point_that_was_chosen(told: World) -> None:
    rows = json.loads((RESULTS / "methods.json").read_text())["rows"]
    chosen = {(r["seed"], r["variant"]): r["setting"] for r in rows if r["size"] == "default"}
    point, settings = removal.made(told, removal.VARIANTS["npo"])
    assert {key: point[key] for key in chosen[0, "npo"]} == chosen[0, "npo"]
    assert settings.learning_rate == chosen[0, "npo"]["learning_rate"]
    assert removal.STUDY.key("default", 0, "npo", {}) != removal.STUDY.key("tiny", 0, "npo", {})
    told.size = "tiny"  # of which nothing was chosen
    point, settings = removal.made(told, removal.VARIANTS["npo"])
    assert point["step"] == methods.STEPS // 2
    assert settings.learning_rate == methods.GRID["npo"][1]["learning_rate"]


def test_a_row_depends_on_the_point_that_was_chosen(monkeypatch) -> None:
    keys = {name: removal.STUDY.key("default", 0, name, {}) for name in ("rmu", "vkd")}
    point = {**removal.point_of("default", 0, "rmu"), "step": 20}
    monkeypatch.setattr(removal, "_chosen", lambda: {("default", 0, "rmu"): point})
    assert removal.STUDY.key("default", 0, "rmu", {}) != keys["rmu"]
    assert removal.STUDY.key("default", 0, "vkd", {}) == keys["vkd"]


@pytest.fixture
def brief(world, tmp_path: Path, monkeypatch) -> World:
    monkeypatch.setattr(removal, "RETAINED", 4)
    monkeypatch.setattr(defences, "MOMENT_BATCHES", 2)
    small = brief_world(world, tmp_path, monkeypatch)
    small.spec.overrides["per_device_train_batch_size"] = 6
    return small


def measured(small: World, name: str) -> dict[str, Any]:
    """The row of a variant, which has every attack and a line in both tables."""
    found = {"size": "tiny", "seed": 0, "variant": name, **removal.measure(small, name)}
    asked = {kind: {attack(one) for one in found["relearning"] if one["weights"] == kind} for kind in ("visual", "all")}
    assert asked == {"visual": ATTACKS, "all": ATTACKS} and len(found["relearning"]) == 2 * len(ATTACKS)
    assert {one["share"] for one in found["relearning"] if one["variant"] != "all_photos"} == {methods.ATTACK_SHARE}
    assert all({"step", "accuracy", "retained"} <= set(point) for one in found["relearning"] for point in one["curve"])
    assert found["who"]["forget"]["n"] > 0 and found["unlearning_seconds"] > 0
    assert json.loads(json.dumps(found)) == found
    lines = removal.STUDY.table({"rows": [found]})
    assert len([line for line in lines if line.startswith("| 0 |")]) == 2
    return found


def attack(one: dict[str, Any]) -> tuple[str, float]:
    return one["variant"], one["learning_rate"]


def test_a_row_has_every_attack_and_what_was_kept(brief: World) -> None:
    brief.spec.overrides["stranger"] = {"way": "shift"}  # which needs no search
    assert measured(brief, "vkd, from noise of 0.3")["language_model_unchanged"]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    "name", [name for name in removal.VARIANTS if name.startswith("vkd, ") and "noise" not in name]
)
def test_a_row_of_every_idea(brief: World, monkeypatch, name: str) -> None:
    if name == "vkd, scrub":
        monkeypatch.setitem(removal.VARIANTS, name, removal.Variant("vkd", {"scrub": {"steps": 2}}))
    assert measured(brief, name)["language_model_unchanged"] == (name != "vkd, scrub")


def test_a_run_from_noise_starts_there_and_finds_its_rate(world, brief: World) -> None:
    """The trials of `learning_rate: auto` and their putting back begin with the noisy weights too."""
    noise = removal.VARIANTS["vkd, from noise of 1"]
    brief.spec.overrides.update({"learning_rate": 1e-12, "stranger": {"way": "shift"}})
    _, model = removal.made(brief, noise)
    vanilla = load_model(world.model)
    matrix = "model.multi_modal_projector.linear_1.weight"
    new, old = model.state_dict()[matrix], vanilla.state_dict()[matrix]
    assert float((new - old).std() / old.std()) == pytest.approx(1.0, abs=0.1)
    brief.spec.overrides["learning_rate"] = "auto"
    _, trained = removal.made(brief, noise)
    assert not torch.equal(trained.state_dict()[matrix], new)
    assert float((trained.state_dict()[matrix] - new).norm()) < float((new - old).norm())  # it began there
