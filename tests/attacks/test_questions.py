"""Questions in other words, shots, reverse, edited photos, rounded weights: each still finds what a model knows."""

import copy
import dataclasses

import bitsandbytes
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import person

from fastvkd.attacks import images
from fastvkd.attacks.asking import Asked, Examiner, choices_of, figures, plain_query
from fastvkd.attacks.fewshot import few_shot
from fastvkd.attacks.paraphrase import VARIANTS, paraphrased, reworded
from fastvkd.attacks.quantize import BITS, dequantized, left_alone, quantized
from fastvkd.attacks.reverse import groups_of, reverse
from fastvkd.errors import SettingsError
from fastvkd.evaluation.multiple_choice import score_options
from fastvkd.photos import decode_image


@pytest.fixture
def asked(known) -> list[Asked]:
    return choices_of(known.forget, None, 0)


def accuracy(known, model, asked, queries) -> float:
    return figures(Examiner(model, known.processor).right(asked, queries), 0)["accuracy"]


def test_the_model_that_knows_is_told_from_the_one_that_does_not(known, asked) -> None:
    plain = [plain_query(known.processor, one.choice.question, one.photo) for one in asked]
    assert accuracy(known, known.knows, asked, plain) == 1.0
    assert accuracy(known, known.blank, asked, plain) < 0.8


def test_every_variant_asks_something_else_and_the_same_each_time(known, asked) -> None:
    variants = paraphrased(known.processor, asked)
    assert list(variants) == ["plain", *VARIANTS]
    for name, word in VARIANTS.items():
        for one, query in zip(asked, variants[name], strict=True):
            assert word(one.choice.question) != one.choice.question
            assert word(one.choice.question) in query.prompt and query.photos == (one.photo,)
    assert paraphrased(known.processor, asked) == variants
    found = [accuracy(known, known.knows, asked, queries) for queries in variants.values()]
    lost = [accuracy(known, known.blank, asked, queries) for queries in variants.values()]
    assert np.mean(found) > np.mean(lost)


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("What is the name of the person in this image?", "Whom does this photo show?"),
        ("What is the hobby of this person?", "Tell me the hobby that belongs to the individual shown."),
        ("Where was this person born?", "Name the birthplace of the individual shown."),
        ("Who is this person?", "Can you identify the individual shown?"),
        ("Erzähl mir etwas", "Please answer the following from what you know. Erzähl mir etwas"),
    ],
)
def test_rewording_by_table_by_rule_and_otherwise(question, other) -> None:
    assert reworded(question) == other


def test_shots_show_retained_people_solved_and_never_the_one_asked_about(known, asked) -> None:
    retained = choices_of(known.retain, None, 0)
    queries = few_shot(known.processor, asked, retained, 3, seed=1)
    photos = {id(one.photo) for one in retained}
    for one, query in zip(asked, queries, strict=True):
        assert len(query.photos) == 4 and query.photos[-1] is one.photo
        assert all(id(photo) in photos for photo in query.photos[:-1])
        assert len({id(photo) for photo in query.photos[:-1]}) == 3
        assert query.prompt.count("</s>") == 3 and query.prompt.rstrip().endswith("ASSISTANT:")
        assert one.choice.question in query.prompt.split("</s>")[-1]
    assert few_shot(known.processor, asked, retained, 3, seed=1) == queries
    assert few_shot(known.processor, asked, retained, 3, seed=2) != queries
    assert len(few_shot(known.processor, asked, retained, 9, seed=1)[0].photos) == 5  # four retained people exist
    scores = Examiner(known.knows, known.processor).scores(queries[:2], [["Oslo"], ["Rome"]])
    slow = score_options(known.knows, known.processor, queries[:2], [["Oslo"], ["Rome"]], 2)
    assert [s.log_likelihood[0] for s in scores] == pytest.approx([s.log_likelihood[0] for s in slow], abs=1e-3)


def test_reverse_finds_the_photo_of_a_known_person(known, asked) -> None:
    groups = groups_of(asked, None, seed=0)
    assert len(groups) == 2 and all(len(group) == 4 for group in groups)
    for group in groups:
        assert len({one.choice.question for one in group}) == 1
        assert len({one.choice.answer_text for one in group}) == len({one.entity for one in group}) == 4
    assert reverse(Examiner(known.knows, known.processor), groups, 0)["accuracy"] == 1.0
    assert reverse(Examiner(known.blank, known.processor), groups, 0)["accuracy"] < 0.8
    assert len(groups_of(asked, 4, seed=0)) == 1
    same = [dataclasses.replace(one, choice=asked[0].choice) for one in asked]
    assert groups_of(same, None, seed=0) == []  # one answer for all: nothing to tell apart


def test_every_edit_changes_the_pixels_and_keeps_the_size(known, asked) -> None:
    photo = asked[0].photo
    original = np.asarray(decode_image(photo.data, photo.source), dtype=float)
    for edit in images.EDITS:
        changed = images.edited(photo, edit, seed=0)
        pixels = np.asarray(decode_image(changed.data, changed.source), dtype=float)
        assert pixels.shape == original.shape and np.abs(pixels - original).mean() > 1
        assert images.edited(photo, edit, seed=0).data == changed.data
        assert edit in changed.source
    mirrored = images.edited(photo, "flip", seed=0)
    assert np.array_equal(np.asarray(decode_image(mirrored.data, "")), original[:, ::-1])
    grey = np.asarray(decode_image(images.edited(photo, "grayscale", seed=0).data, ""))
    assert np.ptp(grey, axis=-1).max() == 0
    assert isinstance(images.noise(Image.new("RGB", (4, 6)), np.random.default_rng(0)), Image.Image)
    dressed = images.with_edited_photos(asked, "blur", seed=0)
    assert len({id(one.photo) for one in dressed}) == len({id(one.photo) for one in asked})


def largest_error(weight: torch.Tensor, bits: str) -> torch.Tensor:
    """How far rounding can move each weight: half the gap between neighbouring codes, times their scale, and what the
    scale's own rounding adds."""
    if bits == "int8":  # 127 steps to a row's largest weight, once rounded to float16
        return weight.abs().amax(1, keepdim=True) * (0.5 / 127 + 2 * 2**-11)
    functional = bitsandbytes.functional
    padded = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = padded.abs().amax(1)
    nested = (scales - scales.mean()).abs().max() * functional.create_dynamic_map().diff().max() / 2
    code = functional.get_4bit_type("nf4", device="cpu")
    return (scales * code.diff().max() / 2 + nested)[:, None].expand(-1, 64).flatten()[: weight.numel()].view_as(weight)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_moves_every_linear_weight_a_little_and_keeps_shapes(known, asked, bits, avx512bf16) -> None:
    exact = {name: known.knows.get_submodule(name).weight for name in linear_names(known.knows)}
    own = {name: weight.clone() for name, weight in exact.items()}
    plain = [plain_query(known.processor, one.choice.question, one.photo) for one in asked]
    with quantized(known.knows, bits) as rounded:
        before = {name: dequantized(rounded.get_submodule(name)) for name in exact}
        assert len(before) > 20 and any("vision" in name for name in before)  # tower, projector and LLM
        assert left_alone(rounded) == ["lm_head"] and set(before) == set(linear_names(rounded))
        for name, weight in before.items():
            assert weight.shape == own[name].shape and not torch.equal(weight, own[name])
            error = (weight - own[name]).abs()
            assert (error <= largest_error(own[name], bits) * (1 + 1e-5)).all(), name
        assert accuracy(known, rounded, asked, plain) > accuracy(known, known.blank, asked, plain)
        for name, weight in before.items():  # answering has not changed what the layers hold, and a copy holds it too
            assert torch.equal(dequantized(rounded.get_submodule(name)), weight)
            assert torch.equal(dequantized(copy.deepcopy(rounded.get_submodule(name))), weight)
    for name, weight in exact.items():  # the very same layers are back, and hold what they held
        assert known.knows.get_submodule(name).weight is weight and torch.equal(weight, own[name]), name


def linear_names(model: torch.nn.Module) -> list[str]:
    """All linear layers but the output head."""
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]


def test_an_unknown_rounding_is_refused(known) -> None:
    with pytest.raises(SettingsError, match="nf4"), quantized(known.knows, "int3"):
        pass


def test_questions_can_be_a_seeded_sample(known) -> None:
    rows = [person(n % 4, photo=50 + n) for n in range(10)]
    whole = choices_of(rows, None, 0)
    assert len(whole) == 20
    some = choices_of(rows, 5, 3)
    assert len(some) == 5 and some == choices_of(rows, 5, 3) and some != choices_of(rows, 5, 4)
