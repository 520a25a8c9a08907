"""The scrub: the LLM reads what it knew of forgotten people as a stranger's and answers everything else as before."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_stranger import QUICK, WHAT, WHO, strangers, tiny_population

from fastvkd import cli
from fastvkd.engines.checkpoints import load_weights
from fastvkd.engines.exporting import edited_of, export, load_trained, read_record
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import SettingsError
from fastvkd.models.families import all_parameters, family_of, visual_parameters
from fastvkd.models.loading import load_model
from fastvkd.settings import Certificate, Scrub, Settings
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.vkd import scrub
from fastvkd.unlearning.vkd.scrub import Kept, Scrubber
from fastvkd.unlearning.vkd.stranger import StrangerMap, divergence

__all__ = ["strangers"]  # a fixture
SHORT = {"steps": 3, "photos": 4, "rank": 2}


def scrubber(name: str, told: Scrub) -> Scrubber:
    """A model whose two people a map moves to where it answers otherwise; the unlearned tower is the original's."""
    model, processor, images, population = tiny_population(name)
    with torch.no_grad():
        model.lm_head.weight *= 5  # a random model hardly hears its image
    width = model.lm_head.weight.shape[1]
    maps = []
    for e in range(2):
        map_ = StrangerMap(width, 2).requires_grad_(False)
        map_.bias.copy_(3 * torch.randn(width, generator=torch.Generator().manual_seed(e)))
        maps.append(map_)
    retained = [(photo, [(WHO, "C B")]) for photo in population.others[0]]
    kept = Kept(retained, population.others[1], population.others[2], [(WHAT, "B")], range(4, 10))
    settings = Settings(forget_target="stranger", scrub=told)
    return Scrubber(model, model, processor, images, population, {"projector": maps}, kept, settings)


def apart(name: str, told: Scrub) -> tuple[float, float]:
    """After a scrub: how far answers about forgotten people are from a stranger's, as a share of before, and how far
    those about somebody else are from the original's."""
    found = scrubber(name, told)
    people, photos = [0, 1], [mine[0] for mine in found.population.people]
    who = found.asker.batch(photos, [(WHO, "A B")] * 2)
    other = found.asker.batch(found.population.others[0], [(WHO, "C B")] * 2)
    with torch.no_grad():
        as_stranger = found.asker.read(who, "projector", found._mapped(people)).logits
        before, kept = found.asker.read(who).logits, found.asker.read(other).logits
    found.run(lambda *_: None)
    with torch.no_grad():
        after, now = found.asker.read(who).logits, found.asker.read(other).logits
        with found._without_adapters():
            assert torch.equal(found.asker.read(who).logits, before)
    left = divergence(after, as_stranger).mean() / divergence(before, as_stranger).mean()
    return float(left), float(divergence(now, kept).mean())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_features_of_the_original_are_answered_as_a_strangers(name: str, monkeypatch) -> None:
    monkeypatch.setattr(scrub, "_MAPPED", 0.0)  # a random model is lost to any attacker
    assert apart(name, Scrub(steps=14, photos=4, rank=8, learning_rate=1e-2, reach=0.0))[0] < 0.8


def test_what_is_said_of_others_is_held(monkeypatch) -> None:
    monkeypatch.setattr(scrub, "_MAPPED", 0.0)
    told = Scrub(steps=16, photos=4, rank=8, learning_rate=1e-2, reach=0.0)
    held, free = (apart("llava", dataclasses.replace(told, keep=keep))[1] for keep in (8.0, 0.01))
    assert held < 0.5 * free


def test_the_worst_features_nearby_give_the_own_answers_more_easily(monkeypatch) -> None:
    monkeypatch.setattr(scrub, "_MAPPED", 0.0)
    found = scrubber("llava", Scrub(photos=4, rank=2, reach=0.0))
    found._distance = 10.0
    photos, people = [found.photos[i][1] for i in (0, 1, 2, 3)], [0, 0, 1, 1]
    batch = found.asker.batch(photos, [(WHO, "A B")] * 4)
    pixels = found.images.batch(photos)
    rows = found._original(pixels)["projector"].gathered().detach()

    def loss(reach: float) -> float:
        found.told = dataclasses.replace(found.told, reach=reach)
        found._rng = np.random.default_rng(0)
        hostile = found._hostile(batch, rows, rows, people)
        return float(found.asker.read(batch, "projector", lambda *_: hostile).loss().detach())

    assert loss(0.3) < loss(0.0)


def test_a_run_leaves_the_adapters_beside_the_visual_weights_and_export_folds_them_in(
    world, strangers, tmp_path, monkeypatch
) -> None:
    found: dict[str, torch.Tensor] = {}
    run_of = Scrubber.run
    monkeypatch.setattr(Scrubber, "run", lambda self, progress: found.update(run_of(self, progress)) or found)
    settings = world.settings(tmp_path / "run", strangers=str(strangers), scrub=SHORT, **QUICK)
    phases: dict[str, None] = {}
    run = unlearn(settings, progress=lambda phase, *_: phases.setdefault(phase))
    assert set(phases) == set(cli._PHASES) and set(run.seconds) == {"prepare", "unlearn", "scrub"}
    weights, beside = load_weights(run.checkpoint), read_manifest(run.checkpoint)["beside"]
    assert beside and set(beside) < set(weights)
    assert all("language_model" in name and ".lora_" in name for name in beside)
    assert any(weights[name].any() for name in beside if name.endswith("lora_B"))
    export(tmp_path / "run", tmp_path / "merged", model_card="")
    record = read_record(tmp_path / "merged")
    edited = edited_of(tmp_path / "merged")
    before, after = load_model(world.model), load_model(tmp_path / "merged")
    family = family_of(before)
    visual = {name for name, _ in visual_parameters(before, family, "vision+projector")}
    old, new = (dict(all_parameters(model, family)) for model in (before, after))
    changed = {name for name in old if name not in visual and not torch.equal(old[name], new[name])}
    assert changed and changed <= set(edited)
    for name in edited:  # W + B A of what was found, whatever the scale of stored adapters
        b, a = (found[name.removesuffix("weight") + part] for part in ("lora_B", "lora_A"))
        assert torch.allclose(new[name], old[name] + b @ a, atol=1e-6)
    load_trained(before, run.checkpoint)
    assert all(torch.allclose(value, new[name], atol=1e-6) for name, value in all_parameters(before, family))
    assert json.dumps(record["settings"]["scrub"])

    again = unlearn(dataclasses.replace(settings, resume_from_checkpoint="auto"))
    assert all(torch.equal(value, weights[name]) for name, value in load_weights(again.checkpoint).items())


def test_a_scrub_is_refused_where_it_has_no_maps_or_several_ranks() -> None:
    common = {"model_name_or_path": "m", "data": "d", "forget_target": "stranger", "scrub": Scrub()}
    for wrong, says in (
        ({"forget_target": "noise"}, "guided search"),
        ({"method": "gd"}, "guided search"),
        ({"engine": "deepspeed"}, "engine=local"),
    ):
        with pytest.raises(SettingsError, match=says):
            Settings(**{**common, **wrong}).check()


def test_an_edited_llm_is_judged_by_its_text() -> None:
    plain = {"certificate": dataclasses.asdict(Certificate()), "scrub": None}
    assert Certificate.of(plain) == Certificate()
    edited = Certificate.of({**plain, "scrub": dataclasses.asdict(Scrub())})
    assert edited.language_model_unchanged is False and edited.kept_text == 0.99
