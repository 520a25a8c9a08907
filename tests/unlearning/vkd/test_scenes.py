"""Views in which a photo's subject stands in other surroundings."""

import numpy as np
import pytest
import tiny
import torch

from fastvkd.unlearning.vkd.images import ImageSet
from fastvkd.unlearning.vkd.scenes import Scenes, draw_scenes

COUNT, SIDE = 64, 24


def scenes(elsewhere: float, beside: float, movable: bool = True) -> Scenes:
    return draw_scenes((3,), range(COUNT), COUNT, [movable] * COUNT, range(5, 12), elsewhere, beside)


def test_a_subject_elsewhere_keeps_its_middle_and_nothing_of_its_border() -> None:
    mine, theirs = torch.ones(COUNT, 3, SIDE, SIDE), torch.zeros(COUNT, 3, SIDE, SIDE)
    seen = scenes(1.0, 0.0).apply(mine, theirs)
    assert (seen[..., SIDE // 2, SIDE // 2] == 1).all()
    share = seen.mean((1, 2, 3))
    assert share.min() > 0.15 and share.max() < 0.7
    corners = seen[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 0.05
    assert (mine == 1).all() and (theirs == 0).all()


def test_beside_another_the_subject_fills_the_half_whose_tokens_are_its_own() -> None:
    drawn = scenes(0.0, 1.0)
    seen = drawn.apply(torch.ones(COUNT, 3, SIDE, SIDE), torch.zeros(COUNT, 3, SIDE, SIDE))
    tokens = torch.nn.functional.avg_pool2d(seen[:, :1], 4).flatten(1)  # a grid of six by six
    for i in range(COUNT):
        subject = drawn.subject(i, 36)
        assert subject is not None
        assert (tokens[i] == subject.float()).all()
    assert 0.25 < np.mean(drawn.left) < 0.75


def test_the_middle_of_both_photos_is_seen_smaller() -> None:
    """A bright middle on a dark ground ends up in the middle of each half, not cut through."""
    photo = torch.zeros(COUNT, 3, SIDE, SIDE)
    photo[..., 8:16, 8:16] = 1
    seen = scenes(0.0, 1.0).apply(photo, photo)
    left, right = seen[..., : SIDE // 2], seen[..., SIDE // 2 :]
    for half in (left, right):
        lit = half.mean((1, 2, 3)) * SIDE * SIDE / 2
        assert lit.min() > 64 / 1.8**2 * 0.8 and lit.max() < 64 / 1.3**2 * 1.2
        assert half[..., 0].max() < 0.5 and half[..., -1].max() < 0.5


def test_shares_are_met_and_what_is_not_movable_stays() -> None:
    kinds = draw_scenes((1,), range(4000), 4000, [True] * 4000, range(9), 0.3, 0.2).kind
    assert np.bincount(kinds) / 4000 == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    still = scenes(0.5, 0.5, movable=False)
    photo = torch.rand(COUNT, 3, SIDE, SIDE)
    assert torch.equal(still.apply(photo, 1 - photo), photo)
    assert all(still.subject(i, 36) is None for i in range(COUNT))


def test_ranks_draw_what_one_process_draws() -> None:
    whole = draw_scenes((7,), range(8), 8, [True] * 8, range(20, 30), 0.4, 0.4)
    parts = [draw_scenes((7,), p, 8, [True] * 4, range(20, 30), 0.4, 0.4) for p in ([0, 1, 4, 5], [2, 3, 6, 7])]
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    for name in ("kind", "other", "place", "left"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name)[order])
    assert set(whole.other) <= set(range(20, 30))


def test_photos_that_keep_their_size_are_moved_one_by_one_and_the_others_stay() -> None:
    shown = tiny.photos((24, 16), (24, 16), (20, 28), (40, 40))
    config, processor = tiny.BUILDERS["qwen2_5_vl"]()
    images = ImageSet([tiny.as_photo(image) for image in shown], processor, config, dtype=torch.float32, pin=False)
    still, elsewhere, beside = 0, 1, 2
    place = np.full((3, 6), 0.5)
    scenes = Scenes(np.array([still, elsewhere, beside]), np.array([3, 3, 3]), place, np.array([True] * 3))
    seen = images.pictures([0, 1, 2], scenes=scenes)
    assert scenes.moved == [1, 2] and [image.size for image in seen] == [image.size for image in shown[:3]]
    before, after, lent = (np.array(image) for image in (shown[1], seen[1], shown[3].resize((24, 16))))
    assert np.array_equal(np.array(seen[0]), np.array(shown[0]))
    assert np.array_equal(after[8, 12], before[8, 12]) and np.array_equal(after[0, 0], lent[0, 0])
    assert not np.array_equal(np.array(seen[2]), np.array(shown[2]))
    assert images.batch([0, 1, 2], scenes=scenes).n_images == 3
