"""How long each phase of a step takes, measured without making the host wait for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

PHASES = ("data", "teacher", "forward", "backward", "step")
Spans = dict[str, list[tuple[Any, Any]]]


class PhaseTimer:
    """Marks phases. On a GPU these are events in its stream, which are read when the figures are.

    `data` is the host's wait for the next batch and is timed by the host's clock. Each phase is also a range in a
    profiler's trace.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: Spans = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with record_function(phase):
            start = self._now(phase)
            yield
            self._spans.setdefault(phase, []).append((start, self._now(phase)))

    def _now(self, phase: str) -> Any:
        if not self._on_gpu or phase == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> Spans:
        """The spans since the last call."""
        spans, self._spans = self._spans, {}
        return spans


def seconds(spans: Spans) -> dict[str, float]:
    """`<phase>_seconds` of each phase, summed; call it when the device has done that work."""

    def length(start: Any, end: Any) -> float:
        return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3

    return {f"{phase}_seconds": sum(length(*span) for span in spans.get(phase, [])) for phase in PHASES}
