"""A run that watches itself: its rate, its end and its stop, by figures that need neither a gold model nor an LLM."""

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastvkd.cli import main
from fastvkd.engines.checkpoints import find_latest, load_weights
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import SettingsError, TrainingError
from fastvkd.settings import Settings, load_settings
from fastvkd.unlearning import rates
from fastvkd.unlearning.loop import Unlearned, unlearn
from fastvkd.unlearning.watch import Course, Watch

SELF_DRIVEN = {
    "learning_rate": "auto",
    "ends": "auto",
    "watch_steps": 3,
    "max_steps": 60,
    "warmup_steps": 3,
    "max_drift": None,  # a model that knows nobody cannot tell whom to keep
    "augment": True,
    "auxiliary_images": 4,
}
BASE = {"model_name_or_path": "m", "data": "d"}


def figures(run: Unlearned | Path) -> list[dict]:
    path = run.metrics if isinstance(run, Unlearned) else run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def trials(run: Unlearned | Path) -> dict[float, float]:
    return {line["trial_rate"]: line["watched_loss"] for line in figures(run) if "trial_rate" in line}


def course_of(run: Unlearned) -> Course:
    return Course(**read_manifest(run.checkpoint)["watch"])


def same(one: Path, other: Path) -> bool:
    a, b = load_weights(one), load_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def self_driven(world, tmp_path_factory) -> Unlearned:
    output = tmp_path_factory.mktemp("self") / "run"
    return unlearn(world.settings(output, save_steps=1, save_total_limit=0, **SELF_DRIVEN))


# Looking


@pytest.mark.parametrize(
    "settings",
    [{"augment": True, "auxiliary_images": 4}, {"forget_target": "mean", "sites": {"llm:2": 1, "projector": 2}}],
)
def test_watching_changes_no_weight(world, tmp_path: Path, settings) -> None:
    seen = unlearn(world.settings(tmp_path / "seen", max_steps=7, watch_steps=3, max_drift=100.0, **settings))
    plain = unlearn(world.settings(tmp_path / "plain", max_steps=7, **settings))
    assert same(seen.checkpoint, plain.checkpoint)
    assert [line["step"] for line in figures(seen) if "left" in line] == [3, 6, 7]
    assert seen.verdict and plain.verdict is None
    assert not (tmp_path / "seen" / "best").exists()


@pytest.mark.parametrize("target", ["noise", "mean", "redirect", "reference"])
def test_the_original_has_all_of_the_way_left_and_has_not_drifted(world, tmp_path: Path, target: str) -> None:
    # Weights that hardly move in one update are the original's.
    settings = {"forget_target": target, "learning_rate": 1e-12, "max_steps": 1, "watch_steps": 1}
    if target == "reference":
        settings["reference_model"] = str(world.model)  # nothing to learn: no way at all
    line = figures(unlearn(world.settings(tmp_path, distance="cosine", **settings)))[0]
    assert line["left"] == pytest.approx(0 if target == "reference" else 1, abs=1e-4)
    assert line["drift_retain"] == pytest.approx(0, abs=1e-6)


def test_the_figures_of_mse_are_the_losses_of_training(world, tmp_path: Path) -> None:
    """`watched_loss` weighs L_f and L_r, which for mse are squared distances over the variance."""
    run = unlearn(
        world.settings(tmp_path, max_steps=6, watch_steps=3, lambda_forget=3.0, lambda_retain=2.0, max_drift=None)
    )
    first, second = (line for line in figures(run) if "left" in line)
    assert second["left"] < first["left"] < 1 and second["watched_loss"] < first["watched_loss"]
    # Both looks share the way and the variances: two unknowns, and the losses of both are explained.
    system = torch.tensor([[look["left"], look["drift_retain"]] for look in (first, second)], dtype=torch.float64)
    way, scale = torch.linalg.solve(system, torch.tensor([first["watched_loss"], second["watched_loss"]]).double())
    assert scale == pytest.approx(2.0, rel=0.25) and way > 0  # the watch's own images give nearly the same variance


@pytest.mark.parametrize("key", ["forget_target=repel", "forget_target=saturate", "method=gd"])
def test_what_has_no_targets_is_left_alone_with_a_message(world, tmp_path: Path, caplog, key: str) -> None:
    run = unlearn(world.settings(tmp_path, max_steps=2, watch_steps=1, **dict([key.split("=")])))
    assert f"{key} has no targets" in caplog.text
    assert all("left" not in line for line in figures(run)) and run.verdict is None


# The rate


def test_a_run_finds_its_rate_and_its_end(world, tmp_path: Path, self_driven: Unlearned) -> None:
    course, costs = course_of(self_driven), trials(self_driven)
    assert len(costs) == 3 and course.learning_rate == min(costs, key=costs.__getitem__)
    assert self_driven.steps == course.end < 60
    lines = [line for line in figures(self_driven) if "loss" in line]
    looks = [line for line in lines if "left" in line]
    assert [line["step"] for line in looks] == [*range(3, course.end, 3), course.end]
    assert looks[-1]["left"] < 0.6 and looks[-1]["watched_loss"] < looks[0]["watched_loss"]
    rate = {line["step"]: line["learning_rate"] for line in lines}  # of the update after
    assert all(rate[step] == course.learning_rate for step in range(3, course.falls_from))
    assert all(a > b for a, b in itertools.pairwise(rate[s] for s in range(course.falls_from + 1, course.end)))
    # The trials left nothing behind: a run that is given their rate ends with the same weights.
    again = unlearn(world.settings(tmp_path, **SELF_DRIVEN | {"learning_rate": course.learning_rate}))
    assert same(again.checkpoint, self_driven.checkpoint)
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize("optim", ["adamw_8bit", "ademamix_8bit"])
def test_trials_leave_no_moments_behind(world, tmp_path: Path, optim: str) -> None:
    settings = SELF_DRIVEN | {"optim": optim, "bf16": True, "max_steps": 9, "save_steps": 0}
    found = unlearn(world.settings(tmp_path / "found", **settings))
    given = unlearn(world.settings(tmp_path / "given", **settings | {"learning_rate": course_of(found).learning_rate}))
    assert same(found.checkpoint, given.checkpoint)


def test_a_divergent_rate_is_rejected(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rates, "RATE_TIMES_FAN_IN", 0.3)
    run = unlearn(world.settings(tmp_path / "one", **SELF_DRIVEN | {"max_steps": 24, "ends": "max_steps"}))
    costs = trials(run)
    assert max(costs.values()) > 1.5 * min(costs.values()) and course_of(run).learning_rate == min(costs)
    monkeypatch.setattr(rates, "RATE_TIMES_FAN_IN", 100.0)
    with pytest.raises(TrainingError, match=r"none of .* came nearer .* set learning_rate"):
        unlearn(world.settings(tmp_path / "none", **SELF_DRIVEN))


def test_the_middle_rate_falls_with_the_width() -> None:
    def middle(width: int) -> float:
        layers = nn.Sequential(nn.Linear(width, 3 * width), nn.LayerNorm(3 * width), nn.Linear(width, width))
        return rates.middle_rate(list(layers.named_parameters()))

    assert middle(128) == 2e-3 and middle(1024) == 2.5e-4
    split = nn.Parameter(torch.empty(0))
    split.ds_shape = torch.Size((8, 1024))  # as ZeRO-3 leaves a matrix
    assert rates.middle_rate([("w", split)]) == 2.5e-4


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ((1.3, 0.7, 0.6), 2e-3),  # few updates flatter the lowest rate
        ((1.3, 0.8, 0.6), 6.7e-4),
        ((0.5, 0.6, 0.7), 6e-3),
        ((math.nan, 0.95, 0.9), 2e-3),
    ],
)
def test_the_highest_rate_that_does_nearly_as_well_is_taken(costs: tuple[float, ...], chosen: float) -> None:
    seen, tried = iter((1.0, *costs)), []
    engine: Any = SimpleNamespace(base_learning_rate=2e-3)
    settings = load_settings(None, BASE | {"max_steps": 100})
    found = rates.find_rate(
        engine, settings, lambda step: None, lambda: next(seen), lambda: None, lambda rate, cost: tried.append(rate)
    )
    assert found == chosen and tried == [6e-3, 2e-3, 6.7e-4]


# The end


def take(course: Course, losses: list[float], settings: Settings, drifts: list[float] | None = None) -> None:
    seen = zip(losses, drifts or [0.01] * len(losses), strict=True)
    for step, (loss, drift) in zip(itertools.count(settings.watch_steps, settings.watch_steps), seen, strict=False):
        course.note(step, {"left": 0.5, "drift_retain": drift, "watched_loss": loss}, settings)


def auto(**overrides) -> Settings:
    return load_settings(
        None, BASE | {"ends": "auto", "watch_steps": 10, "max_steps": 300, "warmup_steps": 10} | overrides
    )


def test_the_rate_falls_after_four_looks_that_gain_too_little_together() -> None:
    settings, course = auto(), Course()
    take(course, [9, 8, 7.9, 7.8, 7.7, 7.6], settings)
    assert (course.falls_from, course.end) == (60, 90)
    schedule = course.schedule(settings)
    assert schedule.factor(59) == schedule.factor(60) == 1.0 > schedule.factor(75) > schedule.factor(89) > 0
    take(course, [6.8, 6.8, 6.8, 6.8, 6.8, 6.8, 6.8, 6.8, 6.8], settings)
    assert (course.falls_from, course.end) == (60, 90)  # once is all


def test_small_gains_add_up() -> None:
    settings, course = auto(), Course()
    take(course, [0.95**k for k in range(15)], settings)
    assert course.falls_from is None and course.slow < 2


def test_a_run_that_never_slows_ends_at_max_steps() -> None:
    settings, course = auto(), Course()
    take(course, [0.8**k for k in range(20)], settings)
    assert (course.falls_from, course.end) == (200, 300)
    assert Course().steps(settings) == 300 and Course().schedule(settings).factor(299) == 1.0


def test_fixed_steps_are_kept_whatever_is_seen() -> None:
    settings, course = auto(ends="max_steps"), Course()
    take(course, [1.0] * 30, settings)
    assert course.end is None and course.steps(settings) == 300
    assert course.schedule(settings).factor(299) < 0.01  # the decay that is set


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"watch_steps": 0}, "ends=auto.*set watch_steps"),
        ({"learning_rate": "auto", "ends": "max_steps", "watch_steps": 0}, "learning_rate=auto.*set watch_steps"),
        ({"forget_target": "saturate"}, "ends=auto with forget_target=saturate"),
        ({"method": "gd"}, "ends=auto.*method=gd does not see"),
        ({"lr_scheduler_type": "constant"}, "set lr_scheduler_type"),
        ({"max_steps": 29}, "at least three times watch_steps=10"),
        ({"learning_rate": "automatic"}, "learning_rate='automatic'"),
        ({"max_drift": 0}, "max_drift=0.*above 0"),
        ({"ends": "early"}, "ends='early': allowed are max_steps, auto"),
    ],
)
def test_what_cannot_be_found_is_refused(overrides, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        auto(**overrides)


def test_an_interrupted_run_ends_with_the_weights_of_the_whole(world, tmp_path: Path, self_driven: Unlearned) -> None:
    course = course_of(self_driven)
    assert course.falls_from is not None
    for step in (4, course.falls_from + 1):  # between looks, and where the rate falls already
        resumed = unlearn(
            world.settings(
                tmp_path / str(step),
                **SELF_DRIVEN,
                resume_from_checkpoint=str(self_driven.checkpoint.with_name(f"checkpoint-{step}")),
            )
        )
        assert same(resumed.checkpoint, self_driven.checkpoint) and resumed.steps == self_driven.steps
        assert course_of(resumed) == course and not trials(resumed)  # they are in the first part's metrics


def test_a_checkpoint_that_knows_no_rate_is_refused(world, tmp_path: Path) -> None:
    plain = unlearn(world.settings(tmp_path, max_steps=3, augment=True, auxiliary_images=4))
    with pytest.raises(SettingsError, match="no rate for learning_rate=auto"):
        unlearn(world.settings(tmp_path, **SELF_DRIVEN, resume_from_checkpoint=str(plain.checkpoint)))


# Damage


def test_three_looks_beyond_max_drift_after_the_warm_up_are_damage() -> None:
    settings, course = auto(max_drift=0.05), Course()
    take(course, [9, 8, 7], settings, [0.2, 0.2, 0.03])
    assert course.damaged == 0 and (course.best, course.best_step) == (7, 30)
    assert course.harm(30, settings, 1e-3) is None
    take(course, [9, 5, 4, 3], settings, [0.01, 0.2, 0.01, 0.2])  # never in a row
    assert course.harm(40, settings, 1e-3) is None
    take(course, [9, 5, 4, 4, 4, 4], settings, [0.3, 0.09, 0.08, 0.081, 0.082, 0.07])  # it comes back
    assert course.harm(60, settings, 1e-3) is None and course.damaged == 0
    take(course, [9, 5, 4, 4], settings, [0.01, 0.4, 0.3, 0.2])  # from too far
    assert course.harm(40, settings, 1e-3) is not None
    take(course, [9, 5, 4], settings, [0.01, 0.2, float("nan")])
    assert course.harm(30, settings, 1e-3) is None
    take(course, [9, 5, 4, 4], settings, [0.01, 0.2, float("nan"), 0.2])
    assert (course.best, course.best_step) == (4, 30)
    message = course.harm(40, settings, 1e-3)
    assert message and "max_drift=0.05" in message and "set learning_rate below 0.001" in message


def test_damage_stops_a_run_and_keeps_its_best_look(world, tmp_path: Path, monkeypatch) -> None:
    drifts = {2: 0.01, 4: 0.02, 6: 0.03, 8: 0.2, 10: 0.3, 12: 0.3}
    losses = {2: 9.0, 4: 5.0, 6: 6.0, 8: 4.0, 10: 3.0, 12: 3.0}

    def look(_: Watch, engine) -> dict[str, float]:
        return {"left": 0.4, "drift_retain": drifts[engine.updates], "watched_loss": losses[engine.updates]}

    settings = {"watch_steps": 2, "warmup_steps": 2, "max_steps": 20, "save_steps": 1}
    whole = unlearn(world.settings(tmp_path / "whole", **settings | {"watch_steps": 0}, save_total_limit=0))
    monkeypatch.setattr(Watch, "look", look)
    with pytest.raises(
        TrainingError, match=r"step 12: .* drifted by 0.3 .* lambda_retain above 1; .*checkpoint-4 is kept"
    ):
        unlearn(world.settings(tmp_path / "stopped", **settings))
    kept = find_latest(tmp_path / "stopped")
    assert kept is not None and kept.name == "checkpoint-4"
    assert same(kept, whole.checkpoint.with_name("checkpoint-4"))
    assert not (tmp_path / "stopped" / "best").exists()
    assert [line["step"] for line in figures(tmp_path / "stopped")] == list(range(1, 13))
    # From there it goes on as asked.
    drifts |= dict.fromkeys(range(5, 21), 0.01)
    losses |= dict.fromkeys(range(5, 21), 1.0)
    gentle = {"resume_from_checkpoint": "auto", "learning_rate": 1e-4}
    resumed = unlearn(world.settings(tmp_path / "stopped", **settings | gentle))
    assert resumed.steps == 20


def test_a_rate_that_is_far_too_high_is_one_line_and_exit_code_2(world, tmp_path: Path, capsys) -> None:
    settings = world.settings(tmp_path / "run", learning_rate=0.03, max_steps=40, warmup_steps=2, watch_steps=3)
    keys = (
        "model_name_or_path data forget_split retain_split output_dir learning_rate max_steps warmup_steps watch_steps"
    )
    told = [f"{key}={getattr(settings, key)}" for key in keys.split()]
    (tmp_path / "empty.yaml").write_text("device: cpu\n")
    assert main(["train", "--config", str(tmp_path / "empty.yaml"), *told]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 9: kept images have drifted by .* set learning_rate below 0.03.*no checkpoint", line)
    assert find_latest(tmp_path / "run") is None


def test_a_rate_that_the_run_found_is_lowered_before_damage_stops_it(world, tmp_path: Path, monkeypatch) -> None:
    beyond = {3, 6, 9, 15, 18, 21, 27, 30, 33}

    def look(_: Watch, engine) -> dict[str, float]:
        drift = 0.2 if engine.updates in beyond else 0.01
        return {"left": 0.4, "drift_retain": drift, "watched_loss": 1.0 / (1 + engine.updates)}

    monkeypatch.setattr(Watch, "look", look)
    settings = SELF_DRIVEN | {"watch_steps": 3, "warmup_steps": 2, "max_steps": 24, "ends": "max_steps"}
    settings |= {"max_drift": 0.05, "lr_scheduler_type": "constant"}
    run = unlearn(world.settings(tmp_path / "ends", **settings))
    used = {line["step"]: line["learning_rate"] for line in figures(run) if "loss" in line}
    first = used[3]
    assert used[9] == first and used[10] == used[21] == pytest.approx(first / 3, rel=0.05)
    assert used[22] == used[24] == pytest.approx(first / 9, rel=0.05)
    assert course_of(run).lowered == 2 and course_of(run).learning_rate == used[24]
    with pytest.raises(TrainingError, match=r"step 33: kept images have drifted by 0.2"):
        unlearn(world.settings(tmp_path / "stops", **settings | {"max_steps": 45}))
    # A rate that is set is the user's.
    with pytest.raises(TrainingError, match=r"step 9: kept images have drifted by 0.2"):
        unlearn(world.settings(tmp_path / "set", **settings | {"learning_rate": first}))


# The verdict


@pytest.mark.parametrize(
    ("left", "drift", "says"),
    [
        (0.05, 0.006, "^done: on held-out views 5.0% .* 0.006 "),
        (0.3, 0.006, "^not done: .*30.0% .*raise max_steps"),
        (0.05, 0.04, "^not done: .*0.04 .*raise lambda_retain"),
        (0.05, float("nan"), "^not done"),
    ],
)
def test_the_verdict_says_in_words_whether_it_is_done(left: float, drift: float, says: str) -> None:
    seen = {"left": left, "drift_retain": drift, "drift_auxiliary": 0.001, "watched_loss": 1.0}
    assert re.search(says, Course(seen=seen).verdict())
