"""What scripts beside this one measure with: clocks, ceilings of the device, peaks of memory."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]

CYCLES_PER_SECOND = 2e9  # no less than any GPU's clock, so that a wait of so many cycles is no shorter than meant


def launch_seconds(function: Run) -> float:
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


def gpu_milliseconds(function: Run, launch: float, before: Run = lambda: None) -> float:
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


def milliseconds(function: Run, device: torch.device, seconds: float, *, cold: bool = True) -> float:
    """Median time of a call, of 5 to 200 within `seconds`. On a GPU it is that of the kernels alone, and where `cold`
    the cache is overwritten before each call."""
    function()
    times: list[float] = []
    if device.type == "cuda":
        launch = launch_seconds(function)
        flush = torch.empty(2**28 if cold else 0, dtype=torch.int8, device=device)
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        if device.type == "cuda":
            times.append(gpu_milliseconds(function, launch, before=flush.zero_))
        else:
            times.append(1e3 * seconds_of(function, device))
    return statistics.median(times)


def seconds_of(run: Run, device: torch.device) -> float:
    """One call as the host sees it, the device's work waited for."""
    start = clock(device)
    run()
    return clock(device) - start


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this run: what MFU on an unknown device is measured against."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s of a plain copy in this run, read and written."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * source.numel() / min(seconds_of(lambda: destination.copy_(source), device) for _ in range(8))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes in live tensors while `run` is at work, above those before: models, optimiser and activations.

    On a GPU the allocator's own peak; on a CPU the sum of the allocator's events, as the profiler records them.
    """
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
