"""Batches built ahead of time, so that the step never waits for decoding, resizing or reading from disk."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def prefetched(load: Callable[[int], Any], steps: Iterable[int], depth: int) -> Iterator[Iterator[Any]]:
    """Context that yields an iterator over `load(step)` for each of `steps`, in order.

    A thread keeps up to `depth` results ready while it builds one more; with 0 each is built when it is asked for.
    `load` must depend on its step alone, so the results are the same either way. An error in `load` is raised where its
    result is asked for. Leaving the context ends the thread, whatever has been taken.
    """
    if depth <= 0:
        yield map(load, steps)
        return
    left = iter(steps)
    # A thread begins with GPU 0 as its current device, and would take memory of it for what it pins.
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    thread = ThreadPoolExecutor(
        1, "fastvkd-prefetch", lambda: None if current is None else torch.cuda.set_device(current)
    )
    ahead = deque(thread.submit(load, step) for step in itertools.islice(left, depth + 1))

    def results() -> Iterator[Any]:
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(thread.submit(load, step) for step in itertools.islice(left, 1))
            yield result

    try:
        yield results()
    finally:
        thread.shutdown(cancel_futures=True)
