"""The order of images: fair, the same on every resume, and disjoint between ranks."""

import functools
import hashlib
import operator
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvkd.data.sources import read_forget_retain
from fastvkd.errors import DataError
from fastvkd.models.loading import load_config, load_processor
from fastvkd.records import Photo
from fastvkd.unlearning.sampling import BatchPlan, draw
from fastvkd.unlearning.vkd.images import (
    ImageSet,
    NoiseImage,
    Views,
    _normalisation,
    _view_of_image,
    _views,
    noise_image,
)

PLAIN = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)  # pixels in [0, 1], not normalised


@given(population=st.integers(1, 12), start=st.integers(0, 50), count=st.integers(1, 40), seed=st.integers(0, 5))
def test_any_part_of_the_sequence_can_be_asked_for(population: int, start: int, count: int, seed: int) -> None:
    whole = draw(population, 0, start + count, (seed,))
    assert draw(population, start, count, (seed,)) == whole[start:]


@given(population=st.integers(1, 12), turns=st.integers(1, 5))
def test_every_image_comes_up_once_before_any_comes_up_twice(population: int, turns: int) -> None:
    counts = Counter(draw(population, 0, population * turns, (0,)))
    assert counts == dict.fromkeys(range(population), turns)


@given(step=st.integers(0, 30), ranks=st.sampled_from([1, 2, 4]))
def test_ranks_together_see_what_one_process_would(step: int, ranks: int) -> None:
    def plan(batch: int) -> BatchPlan:
        return BatchPlan(range(5), range(5, 20), batch_size=batch, forget_share=0.5, seed=3)

    one_forget, one_retain = plan(4 * ranks).indices(step, 0, 1)
    parts = [plan(4).indices(step, rank, ranks) for rank in range(ranks)]
    assert functools.reduce(operator.iadd, (f for f, _ in parts), []) == one_forget
    assert functools.reduce(operator.iadd, (r for _, r in parts), []) == one_retain


@given(step=st.integers(0, 30), ranks=st.sampled_from([1, 2, 4]), auxiliary=st.integers(0, 6))
def test_ranks_together_see_the_views_that_one_process_would(step: int, ranks: int, auxiliary: int) -> None:
    def plan(batch: int) -> BatchPlan:
        return BatchPlan(
            range(5),
            range(5, 20),
            batch_size=batch,
            forget_share=0.5,
            seed=3,
            auxiliary=range(20, 20 + auxiliary),
            auxiliary_share=0.5,
        )

    def viewed(plan: BatchPlan, rank: int, world_size: int) -> dict[int, tuple[int, torch.Tensor]]:
        """Position in the whole batch -> (image, its view), for images of one colour ramp each."""
        forget, retain = plan.indices(step, rank, world_size)
        indices, positions = forget + retain, plan.positions(rank, world_size)
        ramps = torch.arange(3 * 32 * 32, dtype=torch.float32).view(1, 3, 32, 32)
        pixels = ramps * torch.tensor([1.0 + i for i in indices])[:, None, None, None]
        seen = _views(pixels, Views((3, 14, step, 0), positions, world_size * len(indices)), *PLAIN)
        return {p: (i, v) for p, i, v in zip(positions, indices, seen, strict=True)}

    whole = viewed(plan(8 * ranks), 0, 1)
    assert sorted(whole) == list(range(8 * ranks))
    parts = [viewed(plan(8), rank, ranks) for rank in range(ranks)]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        for position, (image, view) in part.items():
            assert image == whole[position][0]
            assert torch.equal(view, whole[position][1])


def test_one_view_in_five_is_the_photo_in_grey() -> None:
    mean, deviation = _normalisation(
        SimpleNamespace(do_normalize=True, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    )
    assert _normalisation(SimpleNamespace(do_normalize=False))[0].abs().max() == 0
    colours = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(400, 3, 8, 8)
    pixels = (colours - mean) / deviation
    seen = _views(pixels, Views((3, 14, 0, 0), range(400), 400), mean, deviation) * deviation + mean
    grey = (seen.amax(1) - seen.amin(1)).amax((1, 2)) < 1e-5
    assert 0.14 < grey.float().mean() < 0.26
    # as bright as Pillow makes a photo in grey; light moves it by 15 % of its distance from the mean
    luma = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * colours[0]).sum(0)[0, 0]
    middle = seen[grey].mean()
    assert abs(middle - luma) < 0.02
    assert (seen[~grey].amax(1) - seen[~grey].amin(1)).min() > 0.05


def test_one_view_in_five_of_an_image_of_any_size_is_grey_too() -> None:
    image = noise_image((40, 24), (0,))
    views = [np.asarray(_view_of_image(image, (0, i))) for i in range(300)]
    assert {view.shape for view in views} == {(24, 40, 3)}
    grey = [bool((view == view[..., :1]).all()) for view in views]
    assert 0.13 < np.mean(grey) < 0.27


def test_a_view_turns_zooms_shifts_and_mirrors_without_shearing() -> None:
    height, width = 60, 90
    down, right = (torch.arange(n) - (n - 1) / 2 for n in (height, width))

    def blob(x: float, y: float) -> torch.Tensor:
        return torch.exp(-((right[None] - x) ** 2 + (down[:, None] - y) ** 2) / 18)

    # three blobs, one a channel: where they lie in a view tells which similarity made it
    corners = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 12.0]])
    pixels = torch.stack([blob(*corner) for corner in corners])[None].expand(200, -1, -1, -1)
    seen = _views(pixels, Views((1, 2), range(200), 200), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)).double()
    mass = seen.sum((2, 3))
    x, y = (seen * right).sum((2, 3)) / mass, (seen * down[:, None]).sum((2, 3)) / mass
    grey = (seen.amax(1) - seen.amin(1)).amax((1, 2)) < 1e-5
    x, y = x[~grey].numpy(), y[~grey].numpy()
    along, across = (np.stack([x[:, i] - x[:, 0], y[:, i] - y[:, 0]], 1) for i in (1, 2))
    lengths = np.linalg.norm(along, axis=1) / 20, np.linalg.norm(across, axis=1) / 12
    assert np.abs(lengths[0] - lengths[1]).max() < 5e-3  # a circle stays a circle
    assert np.abs((along * across).sum(1)).max() / (20 * 12) < 5e-3  # and a right angle right
    assert 1.05 < lengths[0].max() < 1.1001 and 1 / 1.1001 < lengths[0].min() < 0.95
    mirrored = along[:, 0] < 0
    assert 0.4 < mirrored.mean() < 0.6
    assert ((along[:, 0] * across[:, 1] - along[:, 1] * across[:, 0] < 0) == mirrored).all()
    turn = np.rad2deg(np.arctan2(across[:, 0], across[:, 1]))
    assert 9 < turn.max() < 10.01 and -10.01 < turn.min() < -9
    for coordinate, side, other in ((x, width, height), (y, height, width)):
        furthest = 1.1 * (side + np.sin(np.deg2rad(10)) * other) / 16
        assert side / 16 * 0.8 < np.abs(coordinate[:, 0]).max() < furthest


def test_every_rank_has_both_kinds_even_with_fewer_images_than_ranks() -> None:
    plan = BatchPlan(range(1), range(1, 3), batch_size=4, forget_share=0.25, seed=0)
    for rank in range(8):
        forget, retain = plan.indices(0, rank, 8)
        assert len(forget) == 1
        assert len(retain) == 3


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(steps=st.integers(0, 12), ranks=st.integers(1, 3), auxiliary=st.integers(0, 4))
def test_visited_are_the_images_of_all_batches(steps: int, ranks: int, auxiliary: int) -> None:
    plan = BatchPlan(
        range(3),
        range(3, 12),
        batch_size=4,
        forget_share=0.25,
        seed=1,
        auxiliary=range(12, 12 + auxiliary),
        auxiliary_share=0.3,
    )
    taken = {i for t in range(steps) for r in range(ranks) for part in plan.indices(t, r, ranks) for i in part}
    assert plan.visited(steps, ranks) == taken


def test_auxiliary_images_take_their_share_of_the_retained_part() -> None:
    plan = BatchPlan(
        range(4), range(4, 20), batch_size=12, forget_share=1 / 3, seed=0, auxiliary=range(20, 30), auxiliary_share=0.25
    )
    forget, retain = plan.indices(0, 0, 1)
    assert len(forget) == 4
    assert sum(i >= 20 for i in retain) == 2
    assert len(retain) == 8


def test_noise_is_a_function_of_its_seed() -> None:
    one, other = noise_image((8, 6), (1, 2)), noise_image((8, 6), (1, 2))
    assert one.size == (8, 6)
    assert np.array_equal(np.asarray(one), np.asarray(other))
    assert not np.array_equal(np.asarray(one), np.asarray(noise_image((8, 6), (1, 3))))


def test_images_have_the_keys_that_caches_on_disk_know_them_by(world) -> None:
    assert NoiseImage(width=96, height=64, seed=0, number=3).key == "noise-0-3-96x64"
    assert NoiseImage(8, 6, 2, 1).draw().tobytes() == noise_image((8, 6), (2, 15, 1)).tobytes()
    forget, _ = read_forget_retain(str(world.data), world.forget_split, world.retain_split)
    photo = forget[0].photos[0]
    assert photo.key == hashlib.sha256(photo.data).hexdigest() and photo.key is photo.key
    twice = [photo, forget[1].photos[0], Photo(photo.data, "the same bytes")]
    images = ImageSet(twice, load_processor(world.model), load_config(world.model), dtype=torch.float32, pin=False)
    assert images.keys == [photo.key, twice[1].key]
    noise = images.noise_like(1, seed=4, number=7)
    assert (noise.width, noise.height) == images.image(1).size
    mixed, alone = (images.collate([1, noise]), images.batch([1]))
    assert torch.allclose(mixed.inputs["pixel_values"][:1], alone.inputs["pixel_values"])


def test_images_prepared_when_asked_for_are_those_prepared_ahead(world) -> None:
    forget, _ = read_forget_retain(str(world.data), world.forget_split, world.retain_split)
    processor, config = load_processor(world.model), load_config(world.model)
    photos = [photo for profile in forget for photo in profile.photos]
    ahead, later = (ImageSet(photos, processor, config, dtype=torch.float32, pin=False) for _ in range(2))
    ahead.prepare(range(len(ahead)))
    for indices in ([2, 0], [1], [0, 1, 2]):
        pixels = later.batch(indices).inputs["pixel_values"]
        assert torch.equal(pixels, ahead.batch(indices).inputs["pixel_values"])


def test_an_image_that_cannot_be_decoded_is_refused_when_it_is_prepared(world) -> None:
    forget, _ = read_forget_retain(str(world.data), world.forget_split, world.retain_split)
    photos = [forget[0].photos[0], Photo(b"no image", "row 7")]
    images = ImageSet(photos, load_processor(world.model), load_config(world.model), dtype=torch.float32, pin=False)
    images.prepare([0])
    with pytest.raises(DataError, match="row 7"):
        images.prepare([0, 1])
