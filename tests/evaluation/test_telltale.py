"""The tell-tale scores: no more than the null where forgotten people are strangers, near 1 where they are not."""

import numpy as np
import pytest
from tiny_llava import person

from fastvkd.evaluation import telltale
from fastvkd.evaluation.features import mean_features, token_features
from fastvkd.evaluation.people import examine
from fastvkd.evaluation.telltale import area, areas, feature_scores, mahalanobis, probe_area, telltale_cell
from fastvkd.records import Choice, Open, Profile, Questions


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    positive = np.array([True, False, True, False, False])
    # (3 > 1, 2, 0) and (2 > 1, 0; 2 = 2)
    assert area(scores, positive) == pytest.approx((3 + 2 + 0.5) / 6)


def test_mahalanobis_is_the_textbook_one() -> None:
    rng = np.random.default_rng(0)
    for size in (50, 4):  # more, and fewer photos than dimensions
        reference, vectors = rng.normal(size=(size, 6)) * np.arange(1, 7), rng.normal(size=(5, 6))
        covariance = np.cov(reference.T) + 0.05 * reference.var(0, ddof=1).mean() * np.eye(6)
        away = vectors - reference.mean(0)
        expected = np.einsum("nh,hk,nk->n", away, np.linalg.inv(covariance), away)
        assert mahalanobis(vectors, reference) == pytest.approx(expected)


def world(shift: float, seed: int = 0) -> tuple[dict, dict, np.ndarray, set[str]]:
    """Scores, vectors to probe, and whose each photo is: 12 forgotten people (by `shift` off) and 36 strangers."""
    rng = np.random.default_rng(seed)
    people = np.repeat([f"f{k}" for k in range(12)] + [f"s{k}" for k in range(36)], 6)
    own = np.repeat(rng.normal(size=(48, 8)), 6, axis=0)  # what a person's photos have in common
    vectors = own + rng.normal(size=(len(people), 8))
    vectors[:72, 0] += shift
    return {"length": vectors[:, 0]}, {"probe": vectors}, people, {f"f{k}" for k in range(12)}


def test_forgotten_people_like_strangers_are_told_no_better_than_random_ones() -> None:
    found = areas(*world(0.0), seed=0)
    assert found["telltale_auc"] < 0.65
    assert found["telltale_auc"] <= found["telltale"]["null"]["high"]
    assert all(abs(value - 0.5) < 0.15 for value in found["telltale"]["scores"].values())


def test_forgotten_people_off_the_strangers_are_told() -> None:
    found = areas(*world(6.0), seed=0)
    assert min(found["telltale"]["scores"].values()) > 0.97
    assert found["telltale_auc"] > found["telltale"]["null"]["high"] + 0.2


def test_the_probe_is_tested_on_people_it_has_not_seen() -> None:
    """Vectors that tell who it is, but not which side: a probe that had seen the person would be right."""
    people = np.repeat([f"p{k}" for k in range(16)], 5)
    vectors = np.eye(16)[np.repeat(np.arange(16), 5)]
    assert probe_area(vectors, people, np.isin(people, ["p0", "p1", "p2", "p3"])) <= 0.5


def cells() -> dict[str, list[Profile]]:
    def profile(entity: str, photo: int, name: str = "") -> Profile:
        asked = Questions(
            generation=(Open("Who is it?", f"{name} is a baker" if name else "I do not know."),),
            description=(Choice("What colour is it?", {"A": "red", "B": "blue"}, "A"),),
        )
        return Profile(entity, person(photo).photos, asked, source=str(photo), name=name)

    return {
        "forget": [profile(f"f{k}", k, f"Ann {k}") for k in range(4)],
        "test": [profile(f"f{k // 2}", 10 + k, f"Ann {k // 2}") for k in range(8)],
        "retain": [profile(f"r{k}", 30 + k, f"Ben {k}") for k in range(3)],
        "stranger": [profile(f"s{k // 2}", 40 + k) for k in range(48)],
    }


def test_no_forgotten_name_is_weighed_and_every_photo_is_asked_the_same() -> None:
    names = {f"f{k}": f"Ann {k}" for k in range(4)} | {f"r{k}": f"Ben {k}" for k in range(3)}
    asked = telltale_cell(cells(), names, None)
    assert len(asked) == 8 + 48
    for one in asked:
        who, coat = one.visual.choice
        assert who.options == {"Ben 0": "Ben 0", "Ben 1": "Ben 1", "Ben 2": "Ben 2", "nobody": "I do not know."}
        assert coat.options == {"A": "red"}
    assert len(telltale_cell(cells(), names, 20)) == 10
    assert telltale_cell(cells() | {"stranger": []}, names, None) == []
    assert telltale_cell(cells() | {"stranger": cells()["stranger"][:6]}, names, None) == []


def test_features_are_those_that_enter_the_llm(tiny) -> None:
    photos = [person(k).photos[0] for k in range(3)]
    features = list(token_features(tiny.model, tiny.processor, photos))
    assert [tuple(one.shape) for one in features] == [(9, 48)] * 3
    assert mean_features(tiny.model, tiny.processor, photos)[1] == pytest.approx(features[1].double().mean(0).numpy())
    scores, vectors = feature_scores(tiny.model, tiny.processor, photos[:2], photos[1:])
    assert vectors.shape == (2, 48) and {len(one) for one in scores.values()} == {2}
    assert scores["nearest stranger"][1] == pytest.approx(0, abs=1e-6) and scores["nearest stranger"][0] > 0
    assert scores["length of features"][0] == pytest.approx(float(features[0].square().mean()))


def test_features_apart_are_told_whatever_the_answers_are(tiny, monkeypatch) -> None:
    data = cells()
    _, plain = examine(tiny.model, tiny.processor, data, batch_size=32, kinds=("vqa",))
    assert len(plain["telltale"]["scores"]) == 12
    assert plain["telltale_auc"] < 0.95

    forgotten = {photo.key for one in data["test"] for photo in one.photos}

    def apart(model, processor, photos):
        for photo, tokens in zip(photos, token_features(model, processor, photos), strict=True):
            yield tokens + 1000.0 * (photo.key in forgotten)

    monkeypatch.setattr(telltale, "token_features", apart)
    _, shifted = examine(tiny.model, tiny.processor, data, batch_size=32, kinds=("vqa",))
    before, after = (one["telltale"]["scores"] for one in (plain, shifted))
    told = {"length of features", "Mahalanobis", "nearest stranger", "deviation by token", "probe of features"}
    assert {name for name in after if after[name] > 0.99} == told
    assert {name: after[name] for name in after.keys() - told} == {name: before[name] for name in before.keys() - told}
    assert shifted["telltale"]["null"] == plain["telltale"]["null"]


def test_given_a_reference_every_stranger_is_tested(tiny, monkeypatch) -> None:
    data, tested = cells(), []
    real = telltale.areas
    monkeypatch.setattr(telltale, "areas", lambda *of: tested.append(set(of[2])) or real(*of))
    for reference in ([], [person(k).photos[0] for k in range(100, 104)]):
        examine(tiny.model, tiny.processor, data, batch_size=32, kinds=("vqa",), reference=reference)
    assert [len([who for who in people if who.startswith("s")]) for people in tested] == [12, 24]
