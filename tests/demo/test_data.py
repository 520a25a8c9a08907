"""The demo's people and questions: distinct faces, true options, and a test that image-blind guessing cannot beat."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvkd.data import mllmu
from fastvkd.data.check import check_data
from fastvkd.demo.data import (
    CHANCE,
    NOBODY_I_KNOW,
    UNKNOWN,
    _counterbalance,
    make_demo_data,
    one_photo_a_person,
    write_photos,
)
from fastvkd.demo.flags import COUNTRIES
from fastvkd.demo.people import FACTS, draw_photo, draw_photos, make_look, make_people, make_strangers, side_by_side
from fastvkd.demo.photos import beside
from fastvkd.photos import decode_image


def test_people_differ_in_face_and_name_and_repeat_for_a_seed() -> None:
    people = make_people(40, 0)
    assert people == make_people(40, 0)
    assert people != make_people(40, 1)
    assert len({p.name for p in people}) == 40
    traits = ("skin", "hair", "top", "beard", "glasses")
    for i, one in enumerate(people):
        for other in people[:i]:
            assert sum(one.face[t] != other.face[t] for t in traits) >= 3
    for fact, pool in FACTS.items():
        assert max(Counter(p.facts[fact] for p in people).values()) == 40 // len(pool)


def test_strangers_are_as_unlike_people_as_those_among_themselves() -> None:
    people = make_people(40, 0)
    strangers = make_strangers(100, people, 0)
    assert strangers == make_strangers(100, people, 0)
    traits = ("skin", "hair", "top", "beard", "glasses")
    assert all(sum(s.face[t] != p.face[t] for t in traits) >= 3 for s in strangers for p in people)
    assert not any(s.name or s.facts for s in strangers)
    assert len({one.entity for one in [*people, *strangers]}) == 140


def test_photos_of_a_person_differ_and_can_be_drawn_again() -> None:
    person = make_people(1, 0)[0]
    looks = [make_look(person, k, 0) for k in range(4)]
    photos = [draw_photo(person.face, look) for look in looks]
    assert len(set(photos)) == 4
    assert photos == draw_photos([person.face] * 4, looks, workers=2)


def test_a_photo_of_two_shows_the_middle_of_both(data) -> None:
    one, other = (half.photo.data for half in data.halves[:2])
    left, right, joint = (np.asarray(decode_image(d, "-")) for d in (one, other, side_by_side(one, other)))
    size = joint.shape[0]
    middle = slice(size // 4, size // 4 + size // 2)
    assert (joint == np.concatenate([left[:, middle], right[:, middle]], axis=1)).all()
    as_tensors = [torch.from_numpy(x.copy()).permute(2, 0, 1)[None] for x in (left, right, joint)]
    assert torch.equal(beside(*as_tensors[:2]), as_tensors[2])  # as training joins them


def test_flags_are_many_and_unlike_each_other() -> None:
    assert len(COUNTRIES) >= 24
    assert len({c.rule for c in COUNTRIES}) == len(COUNTRIES)
    assert len({c.capital for c in COUNTRIES}) == len(COUNTRIES)


@pytest.fixture(scope="module")
def data():
    return make_demo_data(people=16, forget_percent=25, photos=4, test_photos=2, flag_photos=1, neighbours=3, seed=3)


def test_splits_are_disjoint_where_they_must_be(data) -> None:
    forget = {p.entity for p in data.splits["forget_25"]}
    retain = {p.entity for p in data.splits["retain_75"]}
    assert len(forget) == 4
    assert not forget & retain
    training = {p.photos[0].data for p in data.splits["Full_Set"]}
    assert not training & {p.photos[0].data for p in data.splits["Test_Set"]}
    flags = {p.photos[0].data for p in data.splits["Retain_Set"]}
    assert not flags & {p.photos[0].data for p in data.training_flags}


def test_strangers_are_asked_what_people_are_and_nothing_is_known(data) -> None:
    person, stranger = (data.splits[split][0].visual for split in ("Test_Set", "Stranger_Set"))
    assert {c.question for c in person.choice} < {o.question for o in stranger.generation}
    assert [o.question for o in stranger.generation[:2]] == [o.question for o in person.generation]
    assert [o.question for o in stranger.cloze] == [o.question for o in person.cloze]
    assert {o.answer for o in stranger.generation[:2]} == {NOBODY_I_KNOW}
    assert {o.answer for o in (*stranger.generation[2:], *stranger.cloze)} == {UNKNOWN}
    trained = {p.entity for p in data.strangers} | {half.entity for half in data.halves}
    assert not trained & {p.entity for p in data.splits["Stranger_Set"]}


def test_a_photo_of_two_has_a_profile_about_each(data) -> None:
    retained, forgotten = data.splits["Neighbour_Set"], data.splits["Pair_Set"]
    assert len(retained) == len(forgotten) == 4 * 3
    assert {p.entity for p in forgotten} == data.forgotten
    assert not {p.entity for p in retained} & data.forgotten
    names = {p.entity: p.name for p in data.splits["Full_Set"]}
    for one, other in zip(retained, forgotten, strict=True):
        assert one.photos == other.photos
        sides = [side for side in ("left", "right") for p in (one, other) if side in p.visual.choice[0].question]
        assert sides == ["left", "right"]
        for profile in (one, other):
            assert profile.visual.choice[0].answer_text == profile.name == names[profile.entity]
            assert profile.visual.generation[0].answer.startswith(profile.name)


def test_what_a_photo_shows_is_asked_with_all_answers_that_there_are(data) -> None:
    shown = data.traits[data.strangers[0].photos[0].source]
    asked = {c.question: c for c in data.strangers[0].visual.description}
    assert asked["What colour are the clothes?"].answer_text == shown["clothes"]
    assert asked["What colour is the background?"].answer_text == shown["background"]
    assert ("What colour is the hair?" in asked) == ("hair" in shown)
    for question in asked.values():
        assert len(set(question.options.values())) == len(question.options) >= 4


def test_one_photo_a_person_is_for_the_unlearning_run_alone(data) -> None:
    fewer = one_photo_a_person(data)
    for split in ("forget_25", "retain_75"):
        assert [p.entity for p in fewer.splits[split]] == list(dict.fromkeys(p.entity for p in data.splits[split]))
        assert all(p in data.splits[split] for p in fewer.splits[split])
    assert fewer.splits["Full_Set"] == data.splits["Full_Set"]
    assert fewer.splits["Test_Set"] == data.splits["Test_Set"]


def test_the_folder_is_sound_and_is_read_back(data, tmp_path) -> None:
    for split, profiles in data.splits.items():
        mllmu.write_split(tmp_path, split, profiles)
    write_photos(tmp_path / "strangers", data.strangers)
    report = check_data(tmp_path)
    assert report.problems == []
    assert set(report.splits) == set(data.splits)
    assert report.splits["Stranger_Set"].visual_description >= 4 * report.splits["Stranger_Set"].rows
    for split in ("Neighbour_Set", "Stranger_Set"):
        read = mllmu.read_split(tmp_path, split)
        assert [(p.name, p.visual) for p in read] == [(p.name, p.visual) for p in data.splits[split]]
    kept = sorted(p.relative_to(tmp_path / "strangers") for p in (tmp_path / "strangers").rglob("*.png"))
    assert [str(path) for path in kept[:2]] == [f"{data.strangers[0].entity}/{k}.png" for k in (0, 1)]
    assert len(kept) == len(data.strangers)


@pytest.mark.parametrize("split", ["forget_25", "Test_Set", "Pair_Set"])
def test_who_ignores_the_image_is_right_in_exactly_a_quarter(data, split) -> None:
    profiles = data.splits[split]
    if split == "Test_Set":  # as evaluated: the forgotten people's unseen photos
        forgotten = {p.entity for p in data.splits["forget_25"]}
        profiles = [p for p in profiles if p.entity in forgotten]
    for favourite in range(20):  # an image-blind responder: one fixed order of preference over all answers
        rng = random.Random(favourite)
        right = total = 0
        for fact in range(len(profiles[0].visual.choice)):
            answers = sorted({o for p in profiles for o in p.visual.choice[fact].options.values()})
            rank = {answer: rng.random() for answer in answers}
            for profile in profiles:
                choice = profile.visual.choice[fact]
                right += max(choice.options, key=lambda k: rank[choice.options[k]]) == choice.answer
                total += 1
        assert right / total == CHANCE


@settings(max_examples=40, deadline=None)
@given(size=st.integers(4, 23), distinct=st.integers(4, 23), rounds=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_question_has_four_distinct_options_with_the_truth_among_them(size, distinct, rounds, seed) -> None:
    members = list(range(size))
    values = [str(m % max(4, min(size, distinct))) for m in members]
    options = _counterbalance(members, rounds, lambda m: values[m], np.random.default_rng(seed))
    for member, asked in zip(members, options, strict=True):
        assert len(asked) == rounds
        for four in asked:
            assert len(set(four)) == 4
            assert values[member] in four
