"""How the cost of a step grows with LLM layers, visual tokens, images a step and ranks, beside what `plan` counts.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json      # measure, on tiny models
    python benchmarks/scaling.py --predict docs/scaling.md                   # rewrite the table of predictions there

A prediction beside a measured row takes one constant from the measurement: the FLOP/s of the middle configuration; for
several ranks also the time that an all-reduce of the gradients takes alone.
"""

import argparse
import contextlib
import copy
import json
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gauges import seconds_of
from rig import PRESETS, E, Images, Preset, Rig, analytic_flops, build_model, configuration, disturb, visual_parameters
from tables import table

from fastvkd.environment import measured_on
from fastvkd.planning.architecture import architecture_of
from fastvkd.planning.cost import ASSUMED
from fastvkd.planning.plan import plan
from fastvkd.settings import Settings

CPU = torch.device("cpu")
AXES: dict[str, tuple[int, ...]] = {
    "LLM layers": (1, 2, 4, 8),
    "visual tokens": (16, 64, 144, 256),
    "images a step": (2, 4, 8, 16),
}
MIDDLE = {"LLM layers": 2, "visual tokens": 64, "images a step": 8}
BEGIN, END = "<!-- predictions: benchmarks/scaling.py -->", "<!-- end of predictions -->"


def variation(axis: str, value: int) -> Preset:
    """The tiny preset with one quantity changed."""
    preset = PRESETS["tiny"]()
    if axis == "LLM layers":
        return replace(preset, site=f"llm:{value}")
    if axis == "images a step":
        return replace(preset, batch=value)
    facts = copy.deepcopy(preset.facts)
    facts["vision_config"]["image_size"] = facts["vision_config"]["patch_size"] * round(value**0.5)
    return replace(preset, facts=facts)


def ready(preset: Preset, folder: Path) -> Rig:
    student = build_model(preset, CPU, layers=int(preset.site.partition(":")[2]))
    rig = Rig(E, preset, CPU, folder, student, student)
    rig.load(Images(preset, configuration(preset), preset.batch // 2, preset.batch - preset.batch // 2), 1.0)
    disturb(visual_parameters(student, preset))
    rig.step()
    return rig


def milliseconds(rig: Rig, repetitions: int) -> float:
    """Median of a step, per image."""
    times = [seconds_of(rig.step, CPU) for _ in range(repetitions)]
    return 1e3 * statistics.median(times) / rig.preset.batch


def flops(preset: Preset) -> int:
    return analytic_flops(E, preset, architecture_of(configuration(preset).to_dict(), name="tiny"))


def one_rank(rank: int, world_size: int, port: int, repetitions: int, out: str) -> None:
    """Steps whose gradients are summed over ranks; rank 0 writes ms a step and ms of the all-reduce alone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # before the ranks join: each has a teacher cache of its own
        rig = ready(PRESETS["tiny"](), Path(folder))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    flat = torch.zeros(sum(p.numel() for _, p in rig.parameters))
    times: list[list[float]] = [[], []]
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        rig.engine.backward(rig.loss())
        middle = time.perf_counter()
        dist.all_reduce(flat)  # as many bytes as the gradients
        times[1].append(time.perf_counter() - middle)
        rig.engine.step()
        times[0].append(time.perf_counter() - start)
    rig.close()
    if rank == 0:
        Path(out).write_text(json.dumps([1e3 * statistics.median(t) for t in times]))
    dist.destroy_process_group()


def over_ranks(world_size: int, repetitions: int) -> tuple[float, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/times.json"
        mp.spawn(one_rank, (world_size, port, repetitions, out), nprocs=world_size)
        step, reduce = json.loads(Path(out).read_text())
    return step, reduce


def along(axis: str, values: tuple[int, ...], folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """A row for each value of what grows; the middle one's rate is the constant of all."""
    counts = {value: flops(variation(axis, value)) for value in values}
    measured = {}
    for value in values:
        with contextlib.closing(ready(variation(axis, value), folder / f"{axis}-{value}")) as rig:
            measured[value] = milliseconds(rig, repetitions)
    rate = flops(variation(axis, MIDDLE[axis])) / measured[MIDDLE[axis]]
    return [row(axis, value, ms, counts[value], counts[value] / rate / ms) for value, ms in measured.items()]


def row(axis: str, value: int, ms: float, count: int, ratio: float) -> dict[str, Any]:
    shares = {"ms_per_image": ms, "flops_per_image": count, "predicted_over_measured": ratio}
    return {"axis": axis, "value": value, **shares}


def measure(repetitions: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for axis, values in AXES.items() for row in along(axis, values, Path(folder), repetitions)]
    tiny = PRESETS["tiny"]()
    alone: float | None = None
    for n in ranks:
        step, reduce = over_ranks(n, repetitions)
        alone = step - reduce if alone is None else alone
        rows.append(row("ranks", n, step / (tiny.batch * n), flops(tiny), (alone + reduce) / step))
    note = (
        "Step (e) of the tiny preset, one thread a rank. Planned times scale the middle configuration (2 layers, 64 "
        "visual tokens, 8 images) by FLOPs; for ranks they are one rank's compute and the measured all-reduce."
    )
    return {"benchmark": "scaling", **measured_on(CPU), "note": note, "rows": rows}


def predictions() -> str:
    """Updates at llm:8, 8 images a GPU and micro-batch, for models of 7B to 72B on 1 to 64 H100s."""
    head = ["model", "preset", "GPUs", "compute ms", "gather ms", "PCIe ms", "images/s", "memory GiB"]
    rows = []
    for model in ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-34b", "qwen2.5-vl-72b"):
        for preset in ("zero2", "zero3", "zero3_offload"):
            for ranks in (1, 8, 64) if preset != "zero3" else (8, 64):  # on one card there is nothing to spread
                optim = "adamw_torch" if preset == "zero3_offload" else "adamw_8bit"
                settings = Settings(
                    model_name_or_path=model, sites={"llm:8": 1.0}, bf16=True, optim=optim,
                    per_device_train_batch_size=8, engine="deepspeed", deepspeed=preset,
                )  # fmt: skip
                result = plan(settings, gpu="H100", world_size=ranks)
                t = result.step_seconds
                assert t is not None
                low, high = t["images_per_second_serial"], t["images_per_second_overlapped"]
                cells = [model, preset, ranks, *(f"{1e3 * t[term]:.1f}" for term in ("compute", "gather", "pcie"))]
                cells += [f"{low:.0f}" if high < 1.005 * low else f"{low:.0f}-{high:.0f}"]
                rows.append([*cells, f"{result.memory_bytes['total'] / 2**30:.1f}"])
    return "\n".join(table(head, rows, left=2))


def with_predictions(text: str) -> str:
    """The document with its table of predictions made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{predictions()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="measure, and write the figures here")
    parser.add_argument("--predict", type=Path, metavar="MARKDOWN", help="rewrite the predictions in this document")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    if arguments.predict:
        arguments.predict.write_text(with_predictions(arguments.predict.read_text()))
    if arguments.json:
        report = measure(arguments.repetitions, tuple(arguments.ranks))
        report = {"command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]), **report}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        for row in report["rows"]:
            print(row)
    if not (arguments.predict or arguments.json):
        parser.error(f"give --json FILE to measure, or --predict FILE to predict (assuming {ASSUMED})")


if __name__ == "__main__":
    main()
