"""benchmarks/README.md, made from the JSON files in benchmarks/results, each of them measured and written by a script.

python benchmarks/tables.py            # write README.md
python benchmarks/tables.py --check    # exit code 1 if README.md is not what the results say
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
INTRODUCTION = """# Benchmarks

Made by `python benchmarks/tables.py` from the JSON files in `benchmarks/results`; do not edit. The tables are those of
time and memory. Each says on what machine and when it was measured and, but for the kernels, by which command; the
figures of quality are in files of their own, linked below. **No figure here comes from a GPU yet**: on a machine with
one, `python benchmarks/gpu_suite.py` measures the real shapes (7B, 13B) in at most nine minutes and writes the same
tables.

| script | what it measures |
|---|---|
| `step.py` | one training step, from the public loops' to ours, one change at a time, at equal gradients |
| `end_to_end.py` | a whole unlearning run of the demo by every method: time to reach the forgetting bar |
| `cache_dtype.py` | what a teacher cache in bf16 or float8 does to the demo's figures |
| `scaling.py` | cost of a step against layers, visual tokens, images and ranks, beside what `plan` says |
| `kernels.py`, `aot_kernels.py` | the kernels alone; registers and spills of the compiled code |
| `gpu_suite.py` | GPU tests, kernels, steps at 7B and 13B, and DeepSpeed on one GPU, in one command |
| `seeds.py`, `methods.py`, `ablation.py`, `mask.py`, `robustness.py` | quality, not speed: several seeds; every \
method; site x target; what MMUnlearner's mask helps; what VKD gains by worst-case training and null-space projection |
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    head = list(head)
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *map(list, rows))]


def origin(report: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['device']}; {report['date']}; {versions}."]
    if "command" in report:
        lines += ["", f"    {report['command']}"]
    return [*lines, ""]


def step_table(report: dict[str, Any]) -> list[str]:
    on_gpu = report["datasheet_flops_per_s"] is not None
    tokens = report["tokens"]
    lines = origin(report)
    lines.append(
        f"{report['model']}, loss at `{report['site']}`, {tokens['visual']} visual and {tokens['text']} text tokens, "
        f"{report['dtype']}. Ceilings of the same run: {report['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s (matrix "
        f"product), {report['copy_bytes_per_s'] / 1e9:.3g} GB/s (copy). Roofline: the longer of FLOPs at the first and "
        "least bytes (weights once a pass, update, cached features) at the second."
    )
    head = [
        "", "step", "ms/image", "quartiles", "images/s", "speed-up", "batch", "GFLOP/image", "counted", "MB/image",
        "roofline ms", "of matmul", *(["MFU"] if on_gpu else []), "peak MB", "loss error", "gradient error",
    ]  # fmt: skip
    rows = []
    for row in report["rows"]:
        low, high = row["ms_per_image_quartiles"]
        cells = [f"({row['variant']})", row["name"], f"{row['ms_per_image']:.2f}", f"{low:.2f}-{high:.2f}"]
        cells += [f"{row['images_per_s']:.2f}", "" if row["speedup"] is None else f"{row['speedup']:.2f}x"]
        cells += [str(row["batch"]), f"{row['flops_per_image'] / 1e9:.2f}"]
        cells += ["" if row["counted_flops_per_image"] is None else f"{row['counted_flops_per_image'] / 1e9:.2f}"]
        cells += [f"{row['least_bytes_per_image'] / 1e6:.1f}", f"{row['roofline_ms_per_image']:.2f}"]
        cells += [f"{row['mfu_of_matmul']:.0%}", *([f"{row['mfu']:.1%}"] if on_gpu else [])]
        cells += ["" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"]
        cells += [f"{row['max_loss_error']:.0e}", f"{row['max_grad_error']:.0e}"]
        rows.append(cells)
    lines += ["", *table(head, rows, left=2), ""]
    lines.append(
        "Speed-up: every step is taken once a round, and this is the median over rounds of the time of step (a) over "
        "that of the step in the same round. It need not equal the ratio of the medians in the table."
    )
    last = report["rows"][-1] if report["rows"] else None
    if last is not None:
        share = report["loss_ms_per_image"] / last["ms_per_image"]
        lines.append(
            f"The loss kernel alone takes {report['loss_ms_per_image']:.3g} ms an image, {share:.1%} of step "
            f"({last['variant']}). Peak: bytes in live tensors, models and optimiser included, built alone."
        )
    lines += [f"({letter}) is left out: {reason}." for letter, reason in report["left_out"].items()]
    return lines


def kernels_table(report: dict[str, Any]) -> list[str]:
    lines = [
        f"Copy ceiling {report['copy_gb_per_s']} GB/s; torch {report['torch']}, {report['device']}; {report['date']}.",
        "",
    ]
    head = ["operation", "shape", "dtype", "implementation", "batch", "ms", "GB/s", "of copy"]
    rows = [
        [
            *(str(row[key]) for key in ("operation", "shape", "dtype", "implementation", "batch")),
            *(f"{row['ms']:.3f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}"),
        ]
        for row in report["rows"]
    ]
    return lines + table(head, rows, left=4)


def end_to_end_table(report: dict[str, Any]) -> list[str]:
    lines = origin(report)
    bar = report["bar"]
    lines.append(
        f"Seed {report['seed']}, size {report['size']}. Forgotten: forget VQA within {bar['band']:.2f} of chance "
        f"({bar['chance']:.2f}), asked of {bar['samples']} questions every few steps; asking is not counted as time. "
        f"Kept: that, and retain VQA at least {bar['kept']:.0%} of the {100 * bar['vanilla_retain']:.1f} before. Times "
        f"are medians of {report['repeats']} runs, of long ones a single run's."
    )
    head = ["method", "settings", "s until forgotten", "steps", "images", "retain there", "s until kept", "steps"]
    head += ["s in all", "ms/step", "peak MB", "forget", "test", "retain", "real world"]
    rows = []
    for row in report["rows"]:
        reached = row["reached"]
        cells = [row["method"], row["what"]]
        if reached:
            cells += [f"{reached['seconds']:.1f}", str(reached["step"]), str(reached["images"])]
            cells += [f"{100 * reached['retain']:.1f}"]
        else:
            cells += ["-"] * 4
        kept = row["kept"]
        cells += [f"{kept['seconds']:.1f}", str(kept["step"])] if kept else ["-"] * 2
        cells += [f"{row['seconds']:.1f}", f"{row['ms_per_step']:.0f}", f"{row['peak_memory_bytes'] / 1e6:.0f}"]
        cells += [f"{100 * row['final'][cell]:.1f}" for cell in ("forget", "test", "retain", "realworld")]
        rows.append(cells)
    return [*lines, "", *table(head, rows, left=2)]


def cache_table(report: dict[str, Any]) -> list[str]:
    head = ["cache_dtype", "seed", "MB", "forget", "test", "retain", "real world", "s"]
    rows = [
        [row["cache_dtype"], str(row["seed"]), f"{row['cache_bytes'] / 1e6:.1f}"]
        + [f"{100 * row[cell]:.1f}" for cell in ("forget", "test", "retain", "realworld")]
        + [f"{row['seconds']:.0f}"]
        for row in report["rows"]
    ]
    return [*origin(report), *table(head, rows)]


def scaling_table(report: dict[str, Any]) -> list[str]:
    head = ["what grows", "value", "ms/image measured", "GFLOP/image planned", "GFLOP/s", "planned / measured"]
    rows = [
        [
            *(row["axis"], str(row["value"]), f"{row['ms_per_image']:.2f}", f"{row['flops_per_image'] / 1e9:.3f}"),
            *(f"{row['flops_per_image'] / row['ms_per_image'] / 1e6:.1f}", f"{row['predicted_over_measured']:.2f}"),
        ]
        for row in report["rows"]
    ]
    return [*origin(report), report["note"], "", *table(head, rows)]


# Results whose Markdown their own scripts write: what is in it, and the command where the JSON does not name one.
QUALITY = {
    "seeds": ("the demo on three seeds", "python benchmarks/seeds.py"),
    "methods": ("every method on three seeds", "python benchmarks/methods.py --seeds 0 1 2 --jobs 2"),
    "mask": ("what MMUnlearner's mask helps", "python benchmarks/mask.py --seeds 0 1 2 --jobs 2"),
    "ablation": ("site x target", "python benchmarks/ablation.py"),
    "robustness": ("worst-case training, null space, masks, two sites", "python benchmarks/robustness.py"),
}


def quality_table(results: Path) -> list[str]:
    """Links to the results of quality, with where they come from."""
    rows = []
    for name, (what, command) in QUALITY.items():
        file = results / f"{name}.json"
        if file.exists():
            report = json.loads(file.read_text())
            link = f"[results/{name}.md](results/{name}.md)"
            versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
            rows.append([link, what, f"`{report.get('command', command)}`", report["device"], report["date"], versions])
    return table(["table", "what", "command", "machine", "date", "versions"], rows, left=6) if rows else []


SECTIONS: tuple[tuple[str, str, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("step", "One training step", step_table),
    ("end_to_end", "A whole run", end_to_end_table),
    ("cache_dtype", "Teacher cache in fewer bits", cache_table),
    ("scaling", "Scaling", scaling_table),
    ("kernels", "Kernels", kernels_table),
)


def readme(results: Path = HERE / "results") -> str:
    """The text of README.md: a section for each kind of result that is there."""
    reports = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    lines = [INTRODUCTION]
    for kind, title, make in SECTIONS:
        found = [report for report in reports if report.get("benchmark") == kind]
        if found:
            lines += [f"## {title}", ""]
        for report in found:
            lines += [*make(report), ""]
    if quality := quality_table(results):
        lines += ["## Quality", "", "Read with [docs/method.md](../docs/method.md).", "", *quality]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md is out of date")
    arguments = parser.parse_args()
    text = readme()
    if not arguments.check:
        README.write_text(text)
    elif not README.exists() or README.read_text() != text:
        sys.exit("benchmarks/README.md is not what benchmarks/results say: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
