"""Relearning: the area under a curve, the attacker's share of photos, and that what was known returns faster."""

import copy

import numpy as np
import pytest
import torch
from tiny_llava import person

from fastvkd.attacks.certificate import mean_gaps
from fastvkd.attacks.relearning import Attacker, area_under_curve, relearn, relearning_curve, summarise
from fastvkd.options import Budget


def curve(*points: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "accuracy": accuracy} for step, accuracy in points]


def test_the_area_is_the_mean_accuracy_over_steps() -> None:
    assert area_under_curve(curve((0, 0.25), (10, 0.25), (40, 0.25))) == pytest.approx(0.25)
    assert area_under_curve(curve((0, 0.0), (10, 1.0), (40, 1.0))) == pytest.approx((5 + 30) / 40)
    assert area_under_curve(curve((0, 0.6))) == 0.6
    for bad in ([], curve((0, 0.1), (0, 0.2)), curve((5, 0.1), (2, 0.2))):
        with pytest.raises(ValueError, match="area_under_curve"):
            area_under_curve(bad)


def test_the_gap_is_unlearned_minus_gold() -> None:
    curves = {"all": {"unlearned": curve((0, 0.2), (4, 1.0)), "gold": curve((0, 0.2), (4, 0.4))}}
    assert summarise(curves) == {
        "all": {"unlearned": pytest.approx(0.6), "gold": pytest.approx(0.3), "relearning_gap": pytest.approx(0.3)}
    }
    assert "relearning_gap" not in summarise({"all": {"unlearned": curve((0, 0.2), (4, 1.0))}})["all"]


def test_an_attacker_holds_a_share_spread_over_the_entities(known) -> None:
    rows = [person(n % 4, photo=100 + n) for n in range(20)]
    for share, photos in ((0.1, 2), (0.2, 4), (0.5, 10), (1.0, 20), (0.01, 1)):
        attacker = Attacker(known.processor, rows, share=share, seed=1)
        assert attacker.photos == photos
    held = Attacker(known.processor, rows, share=0.2, seed=1)._samples
    assert {answer for _, question, answer in held if question.startswith("Where")} == {
        row.visual.choice[0].answer_text for row in rows[:4]
    }
    again, other = (Attacker(known.processor, rows, share=0.2, seed=seed) for seed in (1, 2))
    assert torch.equal(again.batch(3).predicts, Attacker(known.processor, rows, share=0.2, seed=1).batch(3).predicts)
    assert [s[0].source for s in again._samples] != [s[0].source for s in other._samples]
    with pytest.raises(ValueError, match="share"):
        Attacker(known.processor, rows, share=0.0)


@pytest.mark.parametrize("weights", ["visual", "all"])
def test_relearning_moves_what_it_says_and_leaves_the_model_alone(known, weights) -> None:
    before = {name: value.clone() for name, value in known.blank.state_dict().items()}
    found = relearning_curve(
        known.blank,
        known.processor,
        Attacker(known.processor, known.forget),
        known.forget,
        weights=weights,
        measure_at=(0, 20),
        learning_rate=3e-3,
    )
    assert [point["step"] for point in found] == [0, 20]
    assert found[-1]["accuracy"] > found[0]["accuracy"] or found[0]["accuracy"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in known.blank.state_dict().items())


def test_a_model_that_knew_scores_a_larger_area_than_one_that_did_not(known) -> None:
    rows = relearn(
        {"unlearned": known.knows, "gold": known.blank},
        known.processor,
        {"forget": known.forget, "test": known.forget},
        Budget(
            relearning_shares=(0.5, 1.0), relearning_seeds=(0, 1), relearning_steps=(0, 1, 2), relearning_variants=()
        ),
        weights=("all",),
    )
    assert [(row["share"], row["seed"], row["photos"]) for row in rows] == [
        (0.5, 0, 2), (0.5, 1, 2), (1.0, 0, 4), (1.0, 1, 4)
    ]  # fmt: skip
    assert np.mean([row["auc"]["relearning_gap"] for row in rows]) > 0.2


def test_a_dead_projector_hides_until_its_biases_are_recentred(known) -> None:
    """Below -1000 GELU and its gradient are 0: the plain attack on visual weights stands still."""
    dead = copy.deepcopy(known.knows)
    with torch.no_grad():
        dead.model.multi_modal_projector.linear_1.bias.sub_(1000)
    rows = relearn(
        {"unlearned": dead},
        known.processor,
        {"forget": known.forget, "test": known.forget, "retain": known.retain, "realworld": []},
        Budget(
            relearning_shares=(0.5, 1.0),
            relearning_seeds=(0,),
            relearning_steps=(0, 10),
            relearning_variants=("recentred_biases", "retained_photos", "unrelated_photos", "public_tower"),
        ),
        weights=("visual",),
    )
    # Nothing is at hand for the last two, and variants are those of whoever holds most photos.
    assert [(row["share"], row["variant"], row["photos"]) for row in rows] == [
        (0.5, "plain", 2),
        (1.0, "plain", 4),
        (1.0, "recentred_biases", 4),
        (1.0, "retained_photos", 4),
    ]
    plain, recentred, retained = (row["curves"]["unlearned"] for row in rows[1:])
    assert plain[0]["accuracy"] == plain[1]["accuracy"] and plain[0]["moved"] == 0
    assert recentred[1]["accuracy"] > plain[1]["accuracy"] + 0.2
    assert recentred[0]["moved"] > 0.1 and retained[0]["moved"] == 0
    assert rows[0]["condition"]["unlearned"] > 1
    assert len(mean_gaps([{**row, "auc": {"relearning_gap": 0.1}} for row in rows])) == 4
