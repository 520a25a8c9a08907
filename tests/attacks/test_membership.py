"""Membership inference: an overfitted model gives its members away, equal sets give nothing away, scores by hand."""

import copy
import zlib

import numpy as np
import pytest
import torch
from tiny_llava import person

from fastvkd.attacks.asking import choices_of, plain_query
from fastvkd.attacks.membership import (
    GRADIENT,
    SCORES,
    auc,
    gradient_norms,
    membership,
    membership_scores,
    pair_sets,
    photo_sets,
    score_statements,
    true_positives,
)
from fastvkd.evaluation.multiple_choice import score_options
from fastvkd.models.answers import collate_answers
from fastvkd.photos import decode_image


@pytest.mark.parametrize("members", [3, 12, 41])
@pytest.mark.parametrize("others", [7, 13, 28, 48])
def test_an_area_of_sides_that_never_meet_is_one_and_so_is_its_interval(members: int, others: int) -> None:
    found = auc([2.0] * members, [1.0] * others, seed=0)
    assert found["auc"] == 1 and found["ci95"] == [1, 1]


def test_auc_counts_pairs_won_and_ties_half() -> None:
    found = auc([3.0, 1.0], [2.0, 1.0], seed=0)
    assert found["auc"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["ci95"][0] <= found["auc"] <= found["ci95"][1]
    rng = np.random.default_rng(0)
    same = rng.normal(size=200)
    equal = auc(same, same, seed=1)
    assert equal["auc"] == pytest.approx(0.5) and equal["ci95"][0] < 0.5 < equal["ci95"][1]
    assert auc(same + 9, same, seed=1)["auc"] == 1.0
    with pytest.raises(ValueError, match="at least one"):
        auc([], [1.0], seed=0)


def test_true_positives_at_a_low_rate_of_false_ones_by_hand() -> None:
    members = [5.0, 3.0, 2.0, 1.0]
    assert true_positives(members, [2.0, 0.0, -1.0]) == 0.5  # none of three may be above: 5 and 3 are above 2
    others = [4.0, 2.5, *range(-198, 0)]  # two of two hundred may be: those above -1
    assert true_positives(members, others) == 1.0
    assert true_positives(members, others, rate=0.005) == 0.5  # one of them, 4
    assert true_positives(members, others, rate=0.0) == 0.25
    assert auc(members, [2.0, 0.0, -1.0], seed=0)["tpr_at_1_fpr"] == 0.5


def test_the_gradients_norm_is_the_slope_of_the_loss_and_leaves_the_model_as_it_was(known) -> None:
    statements = photo_sets(*(choices_of(known.forget, 2, 0),) * 2)[0]
    model = copy.deepcopy(known.blank).double()
    model.lm_head.weight.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    found = gradient_norms(model, known.processor, statements)
    assert [p.requires_grad for p in model.parameters()] == required and all(p.grad is None for p in model.parameters())
    weights = [p for name, p in model.named_parameters() if "multi_modal_projector" in name]
    one = statements[0]
    photo = decode_image(one.asked.photo.data, one.asked.photo.source)
    batch = collate_answers(known.processor, [(photo, one.asked.choice.question, one.answer)], [0], [True])
    at = batch.predicts != -100
    loss = torch.nn.functional.cross_entropy(model(**batch.inputs).logits[at], batch.predicts[at])
    gradient = torch.autograd.grad(loss, weights)
    assert -found[0] == pytest.approx(
        float(sum(g.square().sum() for g in gradient).sqrt()), rel=1e-3
    )  # its logits are float32
    # Along the gradient the loss of the score next to it rises by as much.
    losses, step = [], 1e-5  # of a float32 loss: smaller ones drown in its rounding
    for sign in (1, -2):
        for p, g in zip(weights, gradient, strict=True):
            p.data += sign * step * g / -found[0]
        losses.append(-score_statements(model, known.processor, statements[:1])["loss"][0])
    assert -found[0] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


def test_scores_of_one_answer_by_hand() -> None:
    log_p, normalised = np.array([-1.0, -5.0, -2.0, -3.0, -4.0]), np.array([0.5, -2.0, 0.1, 0.0, -1.0])
    found = membership_scores("Rome", log_p, normalised)
    assert found["loss"] == pytest.approx(-3.0)
    assert found["zlib"] == pytest.approx(-15.0 / len(zlib.compress(b"Rome")))
    assert found["min_k"] == -5.0 and found["min_k++"] == -2.0  # a fifth of five tokens is one


def test_an_overfitted_model_gives_its_members_away_and_a_fresh_one_does_not(known) -> None:
    asked = choices_of(known.forget, None, 0)
    others = choices_of([person(n, photo=70 + n) for n in range(4)], None, 0)
    sets = {"pairs": pair_sets(asked, seed=0), "photos": photo_sets(asked, others), "same": photo_sets(asked, asked)}
    knows, blank = (membership(model, known.processor, sets, seed=0) for model in (known.knows, known.blank))
    for score in (*SCORES, GRADIENT):
        assert knows["same"][score]["auc"] == pytest.approx(0.5)
    assert knows["photos"][GRADIENT]["auc"] > 0.6 > blank["photos"][GRADIENT]["auc"]
    for score in ("loss", "min_k"):
        assert knows["pairs"][score]["auc"] > 0.9
        assert knows["photos"][score]["auc"] > 0.6
        assert abs(blank["photos"][score]["auc"] - 0.5) < knows["photos"][score]["auc"] - 0.5
        assert blank["pairs"][score]["auc"] < 0.8


def test_pairs_are_the_same_photos_with_anothers_answer(known) -> None:
    members, others = pair_sets(choices_of(known.forget, None, 0), seed=0)
    assert len(members) == len(others) == 8
    for one, two in zip(members, others, strict=True):
        assert one.asked is two.asked and one.answer == one.asked.choice.answer_text != two.answer
        assert two.answer in {m.answer for m in members if m.asked.choice.question == two.asked.choice.question}


def test_loss_is_the_evaluations_likelihood_with_the_end_token(known) -> None:
    asked = choices_of(known.forget, 2, 0)
    statements = photo_sets(asked, asked)[0]
    found = score_statements(known.knows, known.processor, statements)["loss"]
    queries = [plain_query(known.processor, one.choice.question, one.photo) for one in asked]
    ended = [[s.answer + known.processor.tokenizer.eos_token] for s in statements]
    expected = [s.normalised[0] for s in score_options(known.knows, known.processor, queries, ended, 2)]
    assert found == pytest.approx(expected, abs=1e-3)
