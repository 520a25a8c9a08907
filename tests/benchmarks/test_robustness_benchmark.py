"""The comparison of defences against relearning: the projection keeps what it says, the worst case is what it says."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import defences
import pytest
import torch
from random_world import world_over
from study import robustness
from torch import nn
from world import World

from fastvkd.models.folder import identify_base
from fastvkd.models.loading import load_model
from fastvkd.unlearning.tasks import prepare


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_an_update_in_the_null_space_changes_nothing_for_retained_inputs(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        layer: nn.Module = nn.Linear(12, 5).double()
        basis = torch.randn(4, 12, dtype=torch.float64)  # retained inputs use 4 of 12 directions
        retained, other = torch.randn(50, 4, dtype=torch.float64) @ basis, torch.randn(50, 12, dtype=torch.float64)
    else:
        layer = nn.Conv2d(3, 5, 2, stride=2).double()
        basis = torch.randn(4, 12, dtype=torch.float64)
        windows = torch.randn(6, 9, 4, dtype=torch.float64) @ basis
        retained = nn.functional.fold(windows.transpose(1, 2), (6, 6), 2, stride=2)
        other = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    moments = defences.second_moments({"layer": layer}, lambda: layer(retained))
    projection = defences.null_space(moments["layer"], 1 - 1e-12)
    assert float(projection.trace()) == pytest.approx(8)
    before, before_other = layer(retained), layer(other)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.add_((torch.randn_like(weight).flatten(1) @ projection).view_as(weight))
    assert torch.allclose(layer(retained), before, atol=1e-12)
    assert not torch.allclose(layer(other), before_other, atol=1e-2)


def test_the_share_of_energy_says_how_many_directions_are_free() -> None:
    moment = torch.diag(torch.tensor([90.0, 6.0, 3.0, 1.0], dtype=torch.float64))
    free = {energy: defences.null_space(moment, energy).diagonal().tolist() for energy in (0.89, 0.95, 0.985)}
    assert free == {0.89: [0, 1, 1, 1], 0.95: [0, 0, 1, 1], 0.985: [0, 0, 0, 1]}


def test_the_worst_case_gradient_is_that_of_a_copy_that_was_attacked() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(7, 4).double()
    original = copy.deepcopy(model.state_dict())
    values = list(model.parameters())
    for parameter in values:
        parameter.grad = torch.ones_like(parameter)

    def attack(module: nn.Module) -> torch.Tensor:
        return module(inputs).square().mean()

    def loss(module: nn.Module) -> torch.Tensor:
        return (module(inputs) - 1).square().mean()

    found = defences.worst_case_gradient(values, lambda: attack(model), lambda: loss(model), 3, 1e-2)
    attacked = copy.deepcopy(model)
    for _ in range(3):
        attacked.zero_grad()
        attack(attacked).backward()
        for parameter in attacked.parameters():
            assert parameter.grad is not None
            parameter.data -= 1e-2 * parameter.grad / (parameter.grad.abs() + 1e-8)
    attacked.zero_grad()
    loss(attacked).backward()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in values if p.grad is not None)
    here = torch.autograd.grad(loss(model), values)
    for gradient, parameter, ordinary in zip(found, attacked.parameters(), here, strict=True):
        assert gradient is not None and torch.equal(gradient, parameter.grad)
        assert not torch.equal(gradient, ordinary)


def test_noise_is_a_share_of_what_each_tensor_varies_by() -> None:
    torch.manual_seed(0)
    named = [("wide", nn.Parameter(5 * torch.randn(100, 100))), ("constant", nn.Parameter(torch.full((7,), 2.0)))]
    before = [parameter.detach().clone() for _, parameter in named]
    defences.add_noise(named, 0.3, seed=1)
    added = [(parameter - old).detach() for (_, parameter), old in zip(named, before, strict=True)]
    assert float(added[0].std()) == pytest.approx(1.5, rel=0.05)
    assert not added[1].any()
    again = nn.Parameter(before[0].clone())
    defences.add_noise([("wide", again)], 0.3, seed=1)
    assert torch.equal(again, named[0][1])


def test_the_rate_and_the_schedule_that_a_loop_sets_are_the_engines() -> None:
    engine: Any = SimpleNamespace(forward_module=nn.Linear(2, 2), base_learning_rate=1.0, schedule="first", updates=3)
    guarded: Any = defences.Defended(engine, SimpleNamespace(), energy=None, attack_steps=0)  # type: ignore[arg-type]
    guarded.base_learning_rate, guarded.schedule = 0.5, "second"
    assert (engine.base_learning_rate, engine.schedule) == (0.5, "second")
    assert (guarded.base_learning_rate, guarded.schedule, guarded.updates) == (0.5, "second", 3)


@pytest.fixture
def random_world(world, tmp_path: Path, monkeypatch) -> World:
    """A `World` whose vanilla model is the shared random one, so that nothing has to be trained."""
    spec: dict[str, Any] = {"overrides": {"auxiliary_images": 4}, "max_samples": 12}
    small = world_over(world, tmp_path, relearning_steps=(0, 2, 5), **spec)
    monkeypatch.setattr(defences, "MOMENT_BATCHES", 2)
    for name, value in {"STEPS": {"noise": 22, "saturate": 22}, "ATTACK_SAMPLES": 8}.items():
        monkeypatch.setattr(robustness, name, value)
    monkeypatch.setitem(robustness.COMMON, "per_device_train_batch_size", 6)
    return small


def test_a_row_of_every_kind(random_world: World) -> None:
    names = [
        "noise, null space of 99 %",
        "noise, worst case of 1 step",
        "saturate, worst case of 1 step",
        "saturate, half of the neurons",
        "saturate, last block supervised too",
    ]
    rows = [{"seed": 0, "variant": name, **robustness.measure(random_world, name)} for name in names]
    share = {row["variant"]: row["free_share"] for row in rows}
    assert 0 < share["noise, null space of 99 %"] < 1 and share["noise, worst case of 1 step"] == 1
    assert share["saturate, half of the neurons"] == pytest.approx(0.5, abs=0.05)
    for row in rows:
        assert set(row["vqa"]) == {"forget", "test", "retain", "realworld"}
        assert set(row["relearning_auc"]) == {"visual", "all"}
        assert (row["forget_open"] is None) == row["variant"].startswith("noise")
    assert json.loads(json.dumps(rows)) is not None
    assert len({line.count("|") for line in robustness.STUDY.table({"rows": rows})}) == 1


def test_a_run_in_the_null_space_moves_matrices_only_and_there_only(random_world: World, tmp_path: Path) -> None:
    variant = robustness.VARIANTS["noise, null space of 99 %"]
    settings = random_world.settings(tmp_path / "run", {**robustness.RECIPES["noise"], "max_steps": 22})
    run = prepare(settings, torch.device("cpu"), identify_base(random_world.vanilla))
    assert variant.energy is not None
    space = defences.NullSpace(run, variant.energy)
    model, _ = robustness.train(random_world, settings, variant)
    moved = {}
    before = dict(load_model(random_world.vanilla).named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter - before[name]).detach()
        moved[name] = bool(difference.any())
        if moved[name]:
            assert torch.allclose(space.project(name, difference), difference, atol=1e-6)
    assert any(moved.values())
    assert {name for name, there in moved.items() if there} <= set(space.projections)
    assert all(name.endswith("weight") for name in space.projections)


def test_forget_images_stand_alone_with_their_own_targets(random_world: World, tmp_path: Path) -> None:
    settings = random_world.settings(tmp_path / "run", {**robustness.RECIPES["noise"], "max_steps": 22})
    task = defences.feature_task(prepare(settings, torch.device("cpu"), identify_base(random_world.vanilla)))
    whole = task.place(task.load(0, 0, 1))
    alone = defences.forget_side(whole)
    assert alone.images.n_images == int(whole.is_forget.sum()) < whole.images.n_images
    assert torch.allclose(task.loss(alone)["loss_forget"], task.loss(whole)["loss_forget"], rtol=1e-4)
