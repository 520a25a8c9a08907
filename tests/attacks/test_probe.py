"""Probes: separable features are separated, noise is not, ranks by hand, and every site of a model is reached."""

import pytest
import torch
from tiny_llava import person

from fastvkd.attacks.probe import (
    ProbeData,
    effective_rank,
    every_site,
    photo_features,
    prior_rank,
    probe,
    probe_gap,
    ridge_probe,
)
from fastvkd.models.visual_path import VisualPath, collate_images
from fastvkd.photos import decode_image


def clusters(apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of five classes, 20 to fit and 20 to judge of each, in 30 dimensions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(5, 30, generator=generator, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(20)
    one, two = (centres[labels] + torch.randn(100, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    return one, labels, two, labels


def test_the_probe_separates_what_is_separable_and_only_that() -> None:
    train, labels, held, truth = clusters(2.0)
    assert (ridge_probe(train, labels, held) == truth).double().mean() > 0.95
    train, labels, held, truth = clusters(0.0)
    assert (ridge_probe(train, labels, held) == truth).double().mean() < 0.4
    assert (ridge_probe(1e3 * train + 7, labels, 1e3 * held + 7) == ridge_probe(train, labels, held)).all()


def test_ranks_by_hand() -> None:
    line = torch.outer(torch.arange(6, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert effective_rank(line) == pytest.approx(1.0)
    assert effective_rank(torch.cat([torch.eye(4), -torch.eye(4)]).double()) == pytest.approx(4.0)
    train, labels, held, truth = clusters(4.0)
    assert prior_rank(train, labels, held, truth) > 0.98
    train, labels, held, truth = clusters(0.0)
    by_chance = sum(1 / r for r in range(1, 6)) / 5
    assert prior_rank(train, labels, held, truth) == pytest.approx(by_chance, abs=0.1)
    for same in (torch.zeros_like(train), torch.full_like(train, 0.1)):  # collapsed features name nobody
        assert prior_rank(same, labels, same, truth) == pytest.approx(by_chance)


def test_features_are_means_over_a_photos_visual_tokens(known) -> None:
    photos = [profile.photos[0] for profile in known.forget]
    sites = every_site(known.blank)
    assert sites == ["vision:1", "vision:2", "vision:3", "projector", "llm:1", "llm:2", "llm:3"]
    found = photo_features(known.blank, known.processor, photos, sites, batch_size=3)
    image = decode_image(photos[1].data, "")
    path = VisualPath(known.blank, sites)
    with torch.no_grad():
        alone = path(collate_images(known.processor, known.blank.config, [image]))
    for site in sites:
        assert found[site].shape[0] == 4
        assert torch.allclose(found[site][1], alone[site].gathered().double().mean(0), atol=1e-4)


def test_photos_that_are_judged_are_never_fitted() -> None:
    forget = [person(n % 4, photo=200 + n) for n in range(12)]
    unseen = [person(n, photo=300 + n) for n in range(4)]
    retain = [person(4 + n % 4, photo=400 + n) for n in range(24)]
    data = ProbeData(forget, unseen, retain, seed=0)
    assert set(data.groups) == {"forget", "retain"}
    for train, labels, held, truth in data.groups.values():
        assert not {id(p.data) for p in train} & {id(p.data) for p in held}
        assert len(train) == len(labels) and len(held) == len(truth) and set(truth) == set(labels) == {0, 1, 2, 3}
        for rows in data.fitted(labels):
            assert sorted(labels[i] for i in rows) == sorted([0, 1, 2, 3] * 2)
        assert data.fitted(labels) == data.fitted(labels) and len({tuple(rows) for rows in data.fitted(labels)}) > 1
    assert len(data.groups["forget"][2]) == 4 and len(data.groups["retain"][2]) == 8
    alone = ProbeData(forget, [], retain, seed=0)
    assert len(alone.groups["forget"][0]) == 8 and len(alone.groups["forget"][2]) == 4


def test_a_probe_reads_identity_at_every_site_and_the_gap_is_the_worst_of_them(known) -> None:
    forget = [person(n % 3, photo=n % 3) for n in range(9)]  # every photo of an entity is the same picture
    unseen = [person(n, photo=n) for n in range(3)]
    data = ProbeData(forget, unseen, known.retain, seed=0)
    found = probe(known.blank, known.processor, data, ["vision:1", "projector", "llm:3"])
    for by_group in found.values():
        assert by_group["forget"]["accuracy"] == 1.0 and by_group["forget"]["prior_rank"] == 1.0
        assert by_group["forget"]["n"] == 3 and by_group["forget"]["chance"] == pytest.approx(1 / 3)
    assert "retain" not in found["projector"]  # one photo each: nothing to judge on
    lower = {site: {"forget": {"accuracy": 0.4 if site == "projector" else 0.9}} for site in found}
    assert probe_gap({"unlearned": found, "gold": lower}) == pytest.approx(0.6)
    assert probe_gap({"unlearned": found}) is None
