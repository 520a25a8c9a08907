"""The demo's people and questions: distinct faces, true options, and a test that image-blind guessing cannot beat."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvkd.data.demo_data import CHANCE, _counterbalance, make_demo_data
from fastvkd.data.flags import COUNTRIES
from fastvkd.data.people import FACTS, make_people, render_photo


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


def test_photos_of_a_person_differ_and_can_be_drawn_again() -> None:
    person = make_people(1, 0)[0]
    photos = [render_photo(person, k, 0) for k in range(4)]
    assert len(set(photos)) == 4
    assert photos == [render_photo(person, k, 0) for k in range(4)]


def test_flags_are_many_and_unlike_each_other() -> None:
    assert len(COUNTRIES) >= 24
    assert len({c.rule for c in COUNTRIES}) == len(COUNTRIES)
    assert len({c.capital for c in COUNTRIES}) == len(COUNTRIES)


@pytest.fixture(scope="module")
def data():
    return make_demo_data(people=16, forget_percent=25, photos=4, test_photos=2, flag_photos=1, seed=3)


def test_splits_are_disjoint_where_they_must_be(data) -> None:
    forget = {p.entity for p in data.splits["forget_25"]}
    retain = {p.entity for p in data.splits["retain_75"]}
    assert len(forget) == 4
    assert not forget & retain
    training = {p.photos[0].data for p in data.splits["Full_Set"]}
    assert not training & {p.photos[0].data for p in data.splits["Test_Set"]}
    flags = {p.photos[0].data for p in data.splits["Retain_Set"]}
    assert not flags & {p.photos[0].data for p in data.training_flags}


@pytest.mark.parametrize("split", ["forget_25", "Test_Set"])
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
