"""Confidence intervals of a mean over samples."""

from collections.abc import Sequence

import numpy as np

_CHUNK = 4_000_000  # resampled values held at once: 32 MB


def bootstrap_interval(
    values: Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (Efron 1979), seeded.

    The samples are taken as independent: the interval speaks about other questions of this kind, not about other people
    or another training run, and is a point where all values are equal. Raises `ValueError` for no values.
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
