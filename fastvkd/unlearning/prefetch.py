"""Batches built ahead of time, so that the step never waits for decoding, resizing or reading from disk."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def prefetched(load: Callable[[int], Any], steps: Iterable[int], depth: int) -> Iterator[Iterator[Any]]:
    """Context that yields an iterator over `load(step)` for each of `steps`, in order.

    A thread keeps up to `depth` results ready; with 0 each is built when it is asked for. Since `load` must depend on
    its step alone, the results are the same either way. An error in `load` is raised where its result is asked for.
    Leaving the context ends the thread, whatever has been taken.
    """
    if depth <= 0:
        yield map(load, steps)
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        for step in steps:
            if stopped.is_set():
                return
            try:
                put((load(step), None))
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asks for this batch
                return put((None, error))

    def results() -> Iterator[Any]:
        for _ in steps:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch

    thread = threading.Thread(target=work, name="fastvkd-prefetch", daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        stopped.set()
        thread.join()
