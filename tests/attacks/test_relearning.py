"""Relearning: the area under a curve, the attacker's share of photos, and that what was known returns faster."""

import copy

import numpy as np
import pytest
import torch
from tiny_llava import person

from fastvkd.attacks.certificate import relearned
from fastvkd.attacks.first_moves import MOVES
from fastvkd.attacks.relearning import (
    Attacker,
    answer_losses,
    area_under_curve,
    collapsed,
    relearning_curve,
    summarise,
)
from fastvkd.attacks.suite import Attack
from fastvkd.evaluation.inputs import PreparedPhotos
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


def attacked(known, models: dict[str, torch.nn.Module], budget: Budget, **cells: list) -> list[dict]:
    """The rows of relearning, judged on the attacker's own photos."""
    loaders = {name: lambda model=model: model for name, model in models.items()}
    cells = {"forget": known.forget, "test": known.forget, "retain": known.retain} | cells
    return Attack(loaders, known.processor, cells, PreparedPhotos(known.processor), budget).run(["relearn"])[
        "relearning"
    ]


@pytest.mark.parametrize("weights", ["visual", "all"])
def test_relearning_moves_what_it_says_and_leaves_the_model_as_it_was(known, weights) -> None:
    before = {name: value.clone() for name, value in known.blank.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in known.blank.parameters()]
    found = relearning_curve(
        known.blank,
        known.processor,
        Attacker(known.processor, known.forget),
        known.forget,
        weights=weights,
        first=lambda model: MOVES["noise"](model, None, torch.Generator()),
        measure_at=(0, 20),
        learning_rate=3e-3,
    )
    assert [point["step"] for point in found] == [0, 20]
    assert found[-1]["accuracy"] > found[0]["accuracy"] or found[0]["accuracy"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in known.blank.state_dict().items())
    assert [parameter.requires_grad for parameter in known.blank.parameters()] == trainable
    assert all(parameter.grad is None for parameter in known.blank.parameters())


def test_an_attack_that_breaks_off_leaves_the_model_as_it_was(known) -> None:
    before = {name: value.clone() for name, value in known.blank.state_dict().items()}

    def stop(step: int, last: int) -> None:
        raise KeyboardInterrupt

    attacker = Attacker(known.processor, known.forget)
    with pytest.raises(KeyboardInterrupt):
        relearning_curve(known.blank, known.processor, attacker, known.forget, weights="all", progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in known.blank.state_dict().items())


def trained_weights(known, dtype: torch.dtype, **how) -> dict[str, torch.Tensor]:
    """The weights after three steps at a small rate, as `progress` sees them."""
    model, found = copy.deepcopy(known.blank).to(dtype), {}

    def look(step: int, last: int) -> None:
        found.update({name: value.clone() for name, value in model.state_dict().items()})

    attacker = Attacker(known.processor, known.forget)
    relearning_curve(
        model, known.processor, attacker, known.forget, weights="all", measure_at=(3,), progress=look, **how
    )
    return found


def test_micro_batches_and_recomputed_layers_change_nothing_but_rounding(known) -> None:
    whole = trained_weights(known, torch.float32)
    for how in (
        {"micro_batch": 3},
        {"gradient_checkpointing": True},
        {"micro_batch": 5, "gradient_checkpointing": True},
    ):
        parts = trained_weights(known, torch.float32, **how)
        apart = torch.cat([(parts[name] - whole[name]).abs().flatten() for name in whole])
        # Adam's first steps have the gradient's sign: a weight whose gradient is rounding alone may go either way.
        assert float((apart > 1e-5).float().mean()) < 0.01 and float(apart.max()) <= 2 * 3 * 1e-3 + 1e-6
    other = trained_weights(known, torch.float32, seed=1, learning_rate=9e-4)
    assert float(torch.cat([(other[n] - whole[n]).abs().flatten() for n in whole]).gt(1e-5).float().mean()) > 0.5


def test_half_precision_weights_have_float32_masters(known) -> None:
    """One update of 1e-4 is below half a unit in the last place of most weights; twenty of them are not."""
    blank, changed = copy.deepcopy(known.blank).to(torch.bfloat16), []
    weight = blank.model.multi_modal_projector.linear_2.weight
    start = weight.detach().clone()
    relearning_curve(
        blank,
        known.processor,
        Attacker(known.processor, known.forget),
        known.forget,
        weights="visual",
        measure_at=(20,),
        learning_rate=1e-4,
        progress=lambda *_: changed.append(float((weight != start).float().mean())),
    )
    assert changed[0] < 0.2 and changed[-1] > 0.4
    assert torch.equal(weight, start) and weight.grad is None and not weight._post_accumulate_grad_hooks


def test_activations_of_all_layers_are_not_kept_when_they_are_computed_again(known) -> None:
    batch = [Attacker(known.processor, known.forget).batch(1)]
    calls = []
    layer = known.blank.model.language_model.layers[1].mlp
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(layer.training))
    try:
        for again in (False, True):
            for loss in answer_losses(known.blank, batch, torch.device("cpu"), again):
                loss.backward()
    finally:
        handle.remove()
        known.blank.zero_grad(set_to_none=True)
    assert len(calls) == 3 and not any(calls)  # once; once and again; dropout stays off
    assert not any(module.training for module in known.blank.modules())


def test_a_model_that_knew_scores_a_larger_area_than_one_that_did_not(known) -> None:
    rows = attacked(
        known,
        {"vanilla": known.knows, "unlearned": known.knows, "gold": known.blank},
        Budget(
            relearning_shares=(0.5, 1.0),
            relearning_seeds=(0, 1),
            relearning_steps=(0, 1, 2),
            relearning_variants=(),
            relearning_weights=("all",),
            learning_rates=(1e-3,),
        ),
    )
    assert [(row["share"], row["seed"], row["photos"]) for row in rows] == [
        (0.5, 0, 2), (0.5, 1, 2), (1.0, 0, 4), (1.0, 1, 4)
    ]  # fmt: skip
    assert np.mean([row["auc"]["relearning_gap"] for row in rows]) > 0.2
    assert all(row["auc"]["vanilla"] == row["auc"]["unlearned"] for row in rows)  # one and the same model
    assert all("retained" in point for row in rows for curve in row["curves"].values() for point in curve)


def test_every_rate_is_a_row_and_one_that_wrecks_the_model_is_no_evidence(known) -> None:
    rows = attacked(
        known,
        {"unlearned": known.knows},
        Budget(
            relearning_shares=(1.0,),
            relearning_seeds=(0,),
            relearning_steps=(0, 3),
            relearning_variants=(),
            relearning_weights=("visual",),
            learning_rates=(1e-5, 1.0),
        ),
    )
    assert [(row["learning_rate"], row["collapsed"]["unlearned"]) for row in rows] == [(1e-5, False), (1.0, True)]
    gentle, wrecked = (row["curves"]["unlearned"] for row in rows)
    assert gentle[0]["retained"] == gentle[1]["retained"] == 1.0 and wrecked[1]["retained"] < 0.8
    assert [(row["learning_rate"], row["evidence"]) for row in relearned(rows)] == [(1e-5, True), (1.0, False)]


def test_a_curve_is_no_evidence_once_a_fifth_of_what_was_kept_is_lost() -> None:
    def points(*retained: float) -> list[dict[str, float]]:
        return [{"step": step, "accuracy": 0.3, "retained": value} for step, value in enumerate(retained)]

    assert not collapsed(points(0.9, 0.73, 0.9), 0.9)
    assert collapsed(points(0.9, 0.71, 0.9), 0.9)  # at any time
    assert collapsed(points(0.5, 0.5), 0.9)  # by the first move already
    assert collapsed([{"step": 0, "accuracy": 0.3}], None)  # nobody can tell


def test_a_dead_projector_hides_until_its_biases_are_recentred(known) -> None:
    """Below -1000 GELU and its gradient are 0: the plain attack on visual weights stands still."""
    dead = copy.deepcopy(known.knows)
    with torch.no_grad():
        dead.model.multi_modal_projector.linear_1.bias.sub_(1000)
    rows = attacked(
        known,
        {"unlearned": dead},
        Budget(
            relearning_shares=(0.25, 0.5),
            relearning_seeds=(0,),
            relearning_steps=(0, 10),
            relearning_variants=(
                *("recentred_biases", "retained_photos", "unrelated_photos", "public_tower", "all_photos"),
            ),
            relearning_weights=("visual",),
            learning_rates=(1e-3,),
        ),
        realworld=[],
    )
    # Nothing is at hand for two of them, and variants are those of whoever holds most photos.
    assert [(row["share"], row["variant"], row["photos"]) for row in rows] == [
        (0.25, "plain", 1),
        (0.5, "plain", 2),
        (0.5, "recentred_biases", 2),
        (0.5, "retained_photos", 2),
        (1.0, "all_photos", 4),
    ]
    plain, recentred, retained, _ = (row["curves"]["unlearned"] for row in rows[1:])
    assert plain[0]["accuracy"] == plain[1]["accuracy"] and plain[0]["moved"] == 0
    assert recentred[1]["accuracy"] > plain[1]["accuracy"] + 0.2
    assert recentred[0]["moved"] > 0.1 and retained[0]["moved"] == 0
    assert rows[0]["condition"]["unlearned"] > 1
    groups = relearned([{**row, "auc": {"relearning_gap": 0.1}} for row in rows])
    assert [(one["variant"], one["share"], one["gap"]) for one in groups] == [
        (row["variant"], row["share"], 0.1) for row in rows
    ]
