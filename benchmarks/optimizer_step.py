"""The optimiser's step alone, over the trained weights of a real model: what the host and what the GPU takes for it.

    python benchmarks/optimizer_step.py --preset llava-1.5-13b --device cuda --json out/optimizer.json

`wall_ms` is a step that starts on an idle device and is waited for; `host_ms` what the host needs to ask for it;
`kernel_ms` what the GPU needs once all is asked for (see `gauges.gpu_milliseconds`). `peak_bytes` are those that a step
takes beside weights and gradients, moments included; paged moments lie outside of what torch allocates, on the device
they are part of `device_bytes`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gauges import clock, free_memory, gpu_milliseconds, launch_seconds, peak_bytes, seconds_of
from rig import PRESETS, build_model, visual_parameters
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastvkd.engines.flat import FlatOptimizer
from fastvkd.engines.optimizers import build_optimizer, parameter_groups
from fastvkd.environment import measured_on

Named = list[tuple[str, nn.Parameter]]
Made = tuple[Any, list[nn.Parameter]]  # an optimiser and its float32 masters, in the order of the weights
SETTINGS: dict[str, Any] = {"learning_rate": 1e-6, "weight_decay": 0.0, "max_steps": 1000}


def masters_of(named: Named) -> Named:
    return [(name, nn.Parameter(p.detach().float())) for name, p in named]


def one_by_one(optim: str) -> Callable[[Named, torch.device], Made]:
    def make(named: Named, device: torch.device) -> Made:
        masters = masters_of(named)
        return build_optimizer(masters, optim=optim, device=device, **SETTINGS), [m for _, m in masters]

    return make


def foreach(named: Named, device: torch.device) -> Made:
    masters = masters_of(named)
    groups = [{k: v for k, v in g.items() if k != "eight_bit"} for g in parameter_groups(masters, 0.0)]
    return torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], foreach=True), [m for _, m in masters]


def buffers(named: Named, device: torch.device) -> Made:
    optimizer = FlatOptimizer(named, optim="adamw_8bit", device=device, **SETTINGS)
    return optimizer, list(optimizer.masters.values())


WAYS: dict[str, Callable[[Named, torch.device], Made]] = {
    "adamw_torch, fused": one_by_one("adamw_torch"),
    "adamw_torch, foreach": foreach,
    "adamw_8bit, tensor by tensor": one_by_one("adamw_8bit"),
    "adamw_8bit, in buffers": buffers,
    "paged_adamw_8bit": one_by_one("paged_adamw_8bit"),
}


def weights(preset: str, device: torch.device) -> Named:
    """The trained weights of a preset in bfloat16: real shapes, random values."""
    shapes = dataclasses.replace(PRESETS[preset](), bf16=True, site="projector")
    named = visual_parameters(build_model(shapes, torch.device("meta"), layers=0), shapes)
    return [(n, nn.Parameter(0.02 * torch.randn(p.shape, device=device, dtype=torch.bfloat16))) for n, p in named]


def used_bytes(device: torch.device) -> int | None:
    """Of the device, by whomever."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure_way(
    make: Callable[[Named, torch.device], Made], named: Named, gradients: list[Tensor], device: torch.device, count: int
) -> tuple[dict[str, Any], str]:
    """A row, and the profile of a step as a table."""
    free_memory()
    before = used_bytes(device)
    optimizer, masters = make(named, device)

    def give() -> None:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient

    def step() -> None:
        give()
        optimizer.step()

    row: dict[str, Any] = {"peak_bytes": peak_bytes(step, device)}  # the first, which makes the moments
    step()
    walls, hosts = [], []
    for _ in range(count):
        give()
        walls.append(1e3 * seconds_of(optimizer.step, device))
        give()
        started = clock(device)
        optimizer.step()
        hosts.append(1e3 * (time.perf_counter() - started))
    row |= {"wall_ms": statistics.median(walls), "host_ms": statistics.median(hosts)}
    if device.type == "cuda":
        launch = launch_seconds(step)
        row["kernel_ms"] = statistics.median(
            gpu_milliseconds(optimizer.step, launch, before=give) for _ in range(count)
        )
        after = used_bytes(device)
        row["device_bytes"] = None if before is None or after is None else after - before
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        clock(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    tables = [profiler.key_averages().table(sort_by=by, row_limit=15) for by in {order, "self_cpu_time_total"}]
    return row, "\n".join(tables)


def measure(
    preset: str, device: torch.device, count: int, keep: Callable[[dict[str, Any]], None] = lambda report: None
) -> dict[str, Any]:
    """A row for each way; `keep` is given the report after each of them."""
    named = weights(preset, device)
    gradients = [1e-3 * torch.randn(p.shape, device=device) for _, p in named]
    total = sum(p.numel() for _, p in named)
    report: dict[str, Any] = {**measured_on(device), "preset": preset, "tensors": len(named), "weights": total}
    report |= {"rows": [], "profiles": {}}
    for way, make in WAYS.items():
        row, report["profiles"][way] = measure_way(make, named, gradients, device, count)
        report["rows"].append({"way": way, **row})
        keep(report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()

    def keep(report: dict[str, Any]) -> None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    report = measure(arguments.preset, torch.device(arguments.device), arguments.steps, keep)
    for row in report["rows"]:
        print(row)
        print(report["profiles"][row["way"]])


if __name__ == "__main__":
    main()
