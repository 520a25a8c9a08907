"""What an attacker does to a model first, for every family: what it moves, and that it moves nothing else."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny

from fastvkd.attacks import first_moves
from fastvkd.attacks.first_moves import MOVES, applies, condition_number, moved, put_back
from fastvkd.models.answers import collate_answers
from fastvkd.models.families import family_of, visual_parameters


def model_and_batch(name: str, seed: int = 0):
    config, processor = tiny.BUILDERS[name]()
    pairs = [(image, tiny.QUESTION, tiny.ANSWER) for image in tiny.photos((16, 16), (16, 16))]
    return tiny.randomised(config, seed), collate_answers(processor, pairs, [0, 1], [True, True])


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
@pytest.mark.parametrize("move", list(MOVES))
def test_a_move_changes_the_part_that_it_is_about(name: str, move: str) -> None:
    model, batch = model_and_batch(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    MOVES[move](model, batch, torch.Generator().manual_seed(0))
    part = "vision+projector" if move == "noise" else "projector"
    allowed = {key for key, _ in visual_parameters(model, family_of(model), part)}
    assert bool(changed(model, before)) == applies(move, model)
    assert changed(model, before) <= allowed
    if move == "noise":
        assert changed(model, before) == {key for key in allowed if before[key].any()}
        assert moved(model, before) == pytest.approx(first_moves.NOISE, rel=0.1)
    again, _ = model_and_batch(name)
    MOVES[move](again, batch, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dead_units_live_again() -> None:
    for move in ("shifted_biases", "recentred_biases"):
        model, batch = model_and_batch("llava")
        layer, seen = model.model.multi_modal_projector.linear_1, []
        layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            layer.bias.sub_(8.0)
            MOVES[move](model, batch, torch.Generator())
            model.model(**batch.inputs)
        assert (seen[-1] > -3).float().mean() > 0.9
        if move == "recentred_biases":
            assert seen[-1].mean((0, 1)).abs().max() < 1e-4


def test_a_redrawn_projector_is_as_large_as_it_was_and_passes_all_directions() -> None:
    model, batch = model_and_batch("llava")
    layer = model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        layer.weight.copy_(torch.outer(layer.weight[:, 0], layer.weight[0]))  # one direction passes
        before = layer.weight.clone()
    assert condition_number(model) > 1e5
    MOVES["redrawn_projector"](model, batch, torch.Generator().manual_seed(0))
    assert float(layer.weight.detach().std()) == pytest.approx(float(before.std()), rel=0.2)
    assert condition_number(model) < 1e4 and not layer.bias.any()


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
@pytest.mark.parametrize("part", ["vision", "projector"])
def test_what_is_public_is_put_back(name: str, part: str) -> None:
    (model, _), (public, _) = model_and_batch(name), model_and_batch(name, seed=1)
    before = {key: value.clone() for key, value in model.named_parameters()}
    theirs = dict(public.named_parameters())
    put_back(model, public, part)
    wanted = {key for key, _ in visual_parameters(model, family_of(model), part)}
    assert all(torch.equal(p, theirs[key] if key in wanted else before[key]) for key, p in model.named_parameters())
    assert wanted >= changed(model, before) != set()
