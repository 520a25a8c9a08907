"""One perturbation of all photos, for every family: within its bounds, the same for each, and found by gradients."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from tiny_llava import person

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny

from fastvkd.attacks.asking import Examiner, choices_of, plain_query
from fastvkd.attacks.perturb import Perturbation, find, judged_by, strangers_as_forgotten
from fastvkd.attacks.relearning import Attacker, answer_losses
from fastvkd.records import Choice, Photo, Profile, Questions


def photo_of(image) -> Photo:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Photo(buffer.getvalue(), "test")


def loss_of(model, attacker) -> float:
    with torch.no_grad():
        return sum(float(loss) for loss in answer_losses(model, [attacker.batch(1)], torch.device("cpu"), False))


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_it_makes_the_answers_likelier_through_every_tower(name: str) -> None:
    config, processor = tiny.BUILDERS[name]()
    model = tiny.randomised(config)
    photos = [photo_of(image) for image in tiny.photos((16, 16), (32, 16), (40, 24))]
    choice = Choice(tiny.QUESTION, {"A": tiny.ANSWER.strip(), "B": "answer"}, "A")
    attacker = Attacker(processor, [Profile("a", tuple(photos), Questions(choice=(choice,)))])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = find(model, processor, attacker, photos[0], size=16 / 255, steps=4)
    assert 0 < float(found.delta.abs().max()) <= 16 / 255 + 1e-7
    plain = loss_of(model, attacker)
    with found.added():
        perturbed = loss_of(model, attacker)
    assert perturbed < plain == loss_of(model, attacker)  # and nothing is left of it afterwards
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl"])
def test_it_is_the_same_for_each_photo_and_no_pixel_leaves_its_range(name: str) -> None:
    config, processor = tiny.BUILDERS[name]()
    images, model = processor.image_processor, tiny.randomised(config)
    one, other = tiny.photos((16, 16), (32, 16))
    found = Perturbation(model, processor, photo_of(one))
    noise = torch.rand(found.delta.shape, generator=torch.Generator().manual_seed(0))
    found.delta = 0.1 * (noise - 0.5)
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    for image in (one, other):
        pixels = images(images=[image], return_tensors="pt")["pixel_values"]
        changed = found.on(pixels)
        assert changed.shape == pixels.shape and changed.dtype == pixels.dtype
        if pixels.ndim == 2:  # packed: (patches, colour, frame, pixel of the patch)
            pixels, changed = (x.view(len(x), 3, 2, -1).movedim(1, -1) for x in (pixels, changed))
            expected = found.delta.T
        else:
            pixels, changed = (x.movedim(-3, -1) for x in (pixels, changed))
            expected = found.delta.permute(1, 2, 0)
        grey, after = pixels * std + mean, changed * std + mean
        assert torch.allclose(after, (grey + expected).clamp(0, 1), atol=1e-5)
        assert after.min() > -1e-5 and after.max() < 1 + 1e-5


def test_the_tile_of_a_photo_of_another_size_is_repeated_or_cut() -> None:
    config, processor = tiny.BUILDERS["llava"]()
    found = Perturbation(tiny.randomised(config), processor, photo_of(tiny.photos((16, 16))[0]))
    found.delta = torch.arange(3 * 16 * 16).view(3, 16, 16) / 1e5
    grey = torch.full((1, 3, 20, 12), 0.5)
    mean, std = (torch.tensor(of)[:, None, None] for of in (found._mean.tolist(), found._std.tolist()))
    added = found.on((grey - mean) / std) * std + mean - grey
    assert torch.allclose(added[0, :, :16], found.delta[:, :, :12], atol=1e-5)
    assert torch.allclose(added[0, :, 16:], found.delta[:, :4, :12], atol=1e-5)


def test_it_is_seen_by_the_questions_asked_meanwhile(known) -> None:
    asked = choices_of(known.forget, None, 0)
    queries = [plain_query(known.processor, one.choice.question, one.photo) for one in asked]
    options = [list(one.choice.options.values()) for one in asked]
    found = Perturbation(known.knows, known.processor, asked[0].photo)
    found.delta += 0.2
    for fast in (True, False):
        plain, changed = [], []
        for scores in (plain, changed):
            examiner = Examiner(known.knows, known.processor, fast=fast)
            if scores is plain:
                scores += [one.log_likelihood for one in examiner.scores(queries, options)]
            else:
                with found.added():
                    scores += [one.log_likelihood for one in examiner.scores(queries, options)]
        assert all(one != pytest.approx(other, abs=1e-3) for one, other in zip(plain, changed, strict=True))


def test_strangers_are_asked_as_if_they_were_forgotten_people() -> None:
    forgotten = [person(0), person(1), person(0, photo=30)]
    strangers = [dataclasses.replace(person(5, photo=40 + n), entity=f"s{n}") for n in range(4)]
    asked = strangers_as_forgotten(strangers, forgotten, None, seed=0)
    assert {one.entity for one in asked} == {"s0", "s1", "s2", "s3"} and len(asked) == 8
    truths = {choice.answer_text for profile in forgotten for choice in profile.visual.choice}
    assert {one.choice.answer_text for one in asked} == truths
    assert strangers_as_forgotten(strangers, forgotten, 3, seed=0) == asked[:3]
    cells = {"forget": forgotten, "stranger": strangers}
    assert list(judged_by(cells, forgotten, None, 0)) == ["unseen", "strangers"]
    assert list(judged_by({"forget": forgotten}, forgotten, None, 0)) == ["unseen"]
