"""`forget_target: saturate`: the loss, its start, what is left of a closed image, and where it is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from fastvkd.data import mllmu
from fastvkd.engines.checkpoints import load_weights
from fastvkd.errors import ModelError, SettingsError
from fastvkd.models import families
from fastvkd.models.answers import collate_answers
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.visual_path import VisualPath
from fastvkd.unlearning.answers import answer_log_probabilities
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.vkd.images import ImageSet
from fastvkd.unlearning.vkd.saturation import WORST, ProjectorUnits


@pytest.fixture
def seen(world):
    """The shared random model, its units, and a batch of six photos."""
    model = load_model(world.model)
    photos = [photo for profile in mllmu.read_split(world.data, "Full_Set") for photo in profile.photos]
    processor = load_processor(world.model)
    images = ImageSet(photos[:6], processor, model.config, dtype=torch.float32, pin=False)
    path = VisualPath(model, ["projector"])
    return model, ProjectorUnits(model), path, images.batch(range(6))


def hidden_units(model: nn.Module, path: VisualPath, batch) -> torch.Tensor:
    """(images, patches, units) in front of the projector's activation."""
    found = []
    handle = model.model.multi_modal_projector.act.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    path(batch)
    handle.remove()
    return found[0].detach().view(batch.n_images, -1, found[0].shape[-1])


def test_the_losses_are_their_formulas(seen) -> None:
    model, units, path, batch = seen
    x = hidden_units(model, path, batch).double().numpy() - 1.0
    is_forget, weight, m = torch.tensor([True, False, True, False, False, True]), torch.rand(6), 0.75
    units._seen = torch.from_numpy(x).float().flatten(0, 1)
    forget, retain, still_open = units.losses(is_forget, weight, m)
    assert float(still_open) == 1
    expected = {True: [], False: []}
    for i in range(6):
        above = (np.maximum(x[i] + m, 0) / m) ** 2
        below = (np.maximum(-x[i].max(axis=1), 0) / m) ** 2
        value = above.mean() + WORST * above.max() if is_forget[i] else below.mean()
        expected[bool(is_forget[i])].append(float(weight[i]) * value)
    assert float(forget) == pytest.approx(np.mean(expected[True]), rel=1e-5) and float(forget) > 0
    assert float(retain) == pytest.approx(np.mean(expected[False]), rel=1e-5)
    x[:5] -= 10  # one of the three forget images stays open
    units._seen = torch.from_numpy(x).float().flatten(0, 1)
    assert float(units.losses(is_forget, weight, m)[2]) == pytest.approx(1 / 3)


def test_the_start_takes_the_direction_that_retained_images_use_least(seen) -> None:
    _, units, path, batch = seen
    before = copy.deepcopy(units.first_layer.weight)
    features = path(batch)["projector"].gathered()
    units.start(path, [batch])
    change = units.first_layer.weight - before
    assert torch.linalg.matrix_rank(change) == 1
    torch.testing.assert_close(change, change[:1].expand_as(change))  # the same for every unit
    moved = (path(batch)["projector"].gathered() - features).norm() / features.norm()
    units.first_layer.weight.data.copy_(before + change.norm() * torch.randn_like(before) / before.numel() ** 0.5)
    at_random = (path(batch)["projector"].gathered() - features).norm() / features.norm()
    assert moved < 0.2 * at_random


def test_a_closed_image_is_a_constant_without_a_gradient_and_others_are_kept(world, tmp_path) -> None:
    settings = world.settings(
        tmp_path,
        forget_target="saturate",
        saturation_margin=12.0,
        lambda_forget=30.0,
        learning_rate=5e-3,
        max_steps=150,
        per_device_train_batch_size=12,
        lr_scheduler_type="cosine",
    )
    run = unlearn(settings)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines[-1]["loss_forget"] < 1e-3 * lines[0]["loss_forget"]
    assert lines[0]["forget_open"] == 1 and lines[-1]["forget_open"] == 0
    model = load_model(world.model)
    model.load_state_dict(load_weights(run.checkpoint), strict=False)
    processor = load_processor(world.model)
    path, act = VisualPath(model, ["projector"]), model.model.multi_modal_projector
    forget = [p for profile in mllmu.read_split(world.data, world.forget_split) for p in profile.photos]
    images = ImageSet(forget, processor, model.config, dtype=torch.float32, pin=False)
    tokens = path(images.batch(range(len(images))))["projector"].gathered()
    assert torch.equal(tokens, act.linear_2.bias.expand_as(tokens))
    retain = [p for profile in mllmu.read_split(world.data, world.retain_split) for p in profile.photos]
    kept = ImageSet(retain, processor, model.config, dtype=torch.float32, pin=False)
    tokens = path(kept.batch(range(len(kept))))["projector"].gathered()
    # A random tower hardly tells people apart; that trained ones keep the others is what the demo's test asserts.
    assert ((tokens != act.linear_2.bias).any(1)).float().mean() > 0.5

    # What a relearning attack would follow: only the second layer's bias still has a gradient.
    pairs = [(images.image(0), "Who is this?", "Ann")]
    log_p, _ = answer_log_probabilities(model, collate_answers(processor, pairs, [0], [True]))
    visual = families.visual_parameters(model, families.family_of(model), "vision+projector")
    gradients = torch.autograd.grad(log_p.sum(), [p for _, p in visual], allow_unused=True)
    alive = {name for (name, _), g in zip(visual, gradients, strict=True) if g is not None and bool(g.any())}
    assert alive == {"model.multi_modal_projector.linear_2.bias"}


def test_a_site_in_the_tower_alone_is_refused(world, tmp_path) -> None:
    with pytest.raises(SettingsError, match="projector or llm"):
        world.settings(tmp_path, forget_target="saturate", sites={"vision:1": 1.0}).check()


def test_families_without_one_projector_for_all_patches_are_refused() -> None:
    for name in ("qwen2_5_vl", "idefics3"):
        model = nn.Module()
        model.config = type("Config", (), {"model_type": name})()
        with pytest.raises(ModelError, match="forget_target=noise"):
            ProjectorUnits(model)
