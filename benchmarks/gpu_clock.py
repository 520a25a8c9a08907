"""How long work takes on a GPU, without the time that the host takes to launch it. For the scripts beside this one."""

import time
from collections.abc import Callable
from typing import Any

import torch

CYCLES_PER_SECOND = 2e9  # no less than any GPU's clock, so that a wait of so many cycles is no shorter than meant


def launch_seconds(function: Callable[[], Any]) -> float:
    """The longest of three calls as the host sees them, nothing waited for; the first call ever is not among them."""
    function()
    longest = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        longest = max(longest, time.perf_counter() - begin)
    torch.cuda.synchronize()
    return longest


def gpu_milliseconds(function: Callable[[], Any], launch: float, before: Callable[[], Any] = lambda: None) -> float:
    """Time of one call's kernels by events, `before` having run.

    A kernel of 50 microseconds takes the host several times as long to launch. So the GPU first spins for twice
    `launch` seconds, in which all launches queue up; the events then enclose the kernels alone. A function that waits
    for the GPU gains nothing by it.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    torch.cuda._sleep(int(2 * launch * CYCLES_PER_SECOND))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)
