"""Means over samples and their confidence intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_CHUNK = 4_000_000  # resampled values held at once: 32 MB


def bootstrap_interval(
    values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (Efron 1979), seeded.

    The samples are taken as independent. So the interval speaks about other questions of this kind, not about other
    people or another training run. Where all values are equal it is a point. Raises `ValueError` for no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("bootstrap_interval of no values")
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // sample.size)
    means = [
        sample[generator.integers(sample.size, size=(min(rows, resamples - start), sample.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def clustered_interval(
    values: Sequence[float], clusters: Sequence[str], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """As `bootstrap_interval`, but whole clusters (people) are drawn, each with all its values (Field and Welsh 2007).

    What one person's photos have in common then counts once: the interval speaks about other people. `clusters` names
    the cluster of each value. Raises `ValueError` for no values.
    """
    if not len(values):
        raise ValueError("clustered_interval of no values")
    of_value = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(of_value, weights=values), np.bincount(of_value)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    tail = (1 - level) / 2
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [tail, 1 - tail])
    return float(low), float(high)


def with_interval(name: str, values: Sequence[float], seed: int, interval: str = "") -> dict[str, Any]:
    """The mean of `values` under `name` and its 95 % interval, [low, high], under `interval` or `<name>_ci95`; None for
    both where there are no values."""
    low_high = list(bootstrap_interval(values, seed=seed)) if values else None
    return {name: float(np.mean(values)) if values else None, interval or f"{name}_ci95": low_high}
