"""The chart geometry: ticks are round and inside, bins keep the extremes, labels do not sit on each other."""

import re
from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvkd.reporting.svg import Point, bin_points, log_ticks, nice_ticks, scatter_chart, spread, text_width

finite = st.floats(-1e6, 1e6)


@settings(deadline=None)  # the clock of a busy machine is no property of the code
@given(finite, st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_lie_inside_and_are_not_many(low: float, width: float, count: int) -> None:
    high = low + width
    assume(high - low > 1e-9 * max(1.0, abs(low)))
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= 2 * count + 2


def test_ticks_of_the_usual_axes() -> None:
    assert nice_ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(0, 1600, 4) == [0, 500, 1000, 1500]
    assert nice_ticks(3, 3, 4) == [3]


@settings(deadline=None)
@given(st.floats(1e-8, 1e6), st.floats(1.2, 1e9))
def test_log_ticks_lie_inside(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) <= 7
    assert all(0.99 * low <= tick <= 1.01 * low * ratio for tick in ticks)
    if ratio >= 10:
        assert ticks


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=700), st.integers(1, 120))
def test_bins_keep_lowest_and_highest(values: list[float], bins: int) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    means, band = bin_points(points, bins)
    assert len(means) <= max(bins, 1)
    if band:
        assert min(low for _, low, _ in band) == min(values)
        assert max(high for _, _, high in band) == max(values)
        assert all(low - 1e-3 <= mean <= high + 1e-3 for (_, mean), (_, low, high) in zip(means, band, strict=True))
    else:
        assert means == points


@settings(deadline=None)
@given(st.lists(st.floats(0, 200), max_size=8))
def test_spread_labels_keep_their_distance_and_order(positions: list[float]) -> None:
    placed = spread(positions, 14, 0, 200)
    assert len(placed) == len(positions)
    ordered = sorted(placed)
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(ordered))
    assert all(-1e-6 <= p <= 200 + 1e-6 for p in placed)
    for i, a in enumerate(positions):
        for j, b in enumerate(positions):
            assert not (a < b and placed[i] > placed[j])


def test_labels_of_crowded_points_do_not_overlap() -> None:
    points = [Point(f"method {i}", 0.25 + 0.02 * i, 0.95 - 0.015 * i, "grey") for i in range(7)]
    chart = scatter_chart(
        points, x_label="x", y_label="y", description="d", chance=0.25, goal=(0.15, 0.35, 0.9), width=350, height=330
    )
    placed = [
        (float(x), float(y), label)
        for x, y, label in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="label grey"[^>]*>(.*?)</text>', chart)
    ]
    assert len(placed) == 7
    for i, (x, y, label) in enumerate(placed):
        assert x >= 0 and x + text_width(label) <= 350 + 1
        for other_x, other_y, other in placed[:i]:
            apart = abs(y - other_y) >= 9 or x + text_width(label) <= other_x or other_x + text_width(other) <= x
            assert apart, (label, other)
