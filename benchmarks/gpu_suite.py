"""Everything that needs a GPU, in one command of at most nine minutes, without network: does this installation work,
and how fast is it?

    python benchmarks/gpu_suite.py --out out/gpu-suite

Each part runs in a process of its own with a time limit; one that fails or cannot run here leaves its reason and does
not stop the others. After every part `gpu-suite.json` and `gpu-suite.md` are written anew. Exit code 1: a part failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY_WORLD = """
import json, sys
from pathlib import Path
from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.demo.model import Shape, build_model, build_processor
folder = Path(sys.argv[1])
shape = Shape(image_size=64, vision_width=128, vision_layers=4, llm_width=256, llm_layers=4)
for split, count in (("forget", 4), ("retain", 12)):
    lines = []
    for i in range(count):
        dead_leaves((64, 64), (count, i)).save(folder / f"{split}-{i}.png")
        name = f"{split}-{i}"
        lines.append(dict(image=f"{name}.png", entity=name, question="Who is this?", answer=f"Person {i}"))
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
from fastvkd.data.sources import read_forget_retain
forget, retain = read_forget_retain(str(folder), "forget", "retain")
processor = build_processor(forget + retain, shape)
build_model(processor, shape, seed=0).save_pretrained(folder / "model")
processor.save_pretrained(folder / "model")
"""


@dataclass(frozen=True)
class Part:
    """One measurement. `missing()`: why it cannot run here, or None; `run(folder, seconds)`: its figures."""

    name: str
    seconds: int
    missing: Callable[[], str | None]
    run: Callable[[Path, float], dict[str, Any]]


class PartFailedError(Exception):
    """A part ran and did not succeed; the message says how."""


def no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def needs(*modules: str) -> Callable[[], str | None]:
    """The reason why a part that imports `modules` and wants a GPU cannot run; None when it can."""

    def missing() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return no_gpu() or (f"not installed: {', '.join(absent)}" if absent else None)

    return missing


def command(arguments: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command of ours from the repository root; returns its output. Raises PartFailedError with the last line."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a launcher's children too
            process.wait()
            code = None
    text = log.read_text(errors="replace")
    if code != 0:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
        what = f"ran past {seconds:.0f} s" if code is None else f"exit code {code}"
        raise PartFailedError(f"{what}; {last.strip()[:300]} (see {log.name})")
    return text


def gpu_tests(folder: Path, seconds: float) -> dict[str, Any]:
    # tests of optional parts that are not installed cannot be collected; they are no test of the GPU
    ignored = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    files = sorted({str(f) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()})
    # Most of their time is compiling, on the host.
    several = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    start = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    text = command([*start, *several, *ignored, *files], seconds, folder / "gpu-tests.log")
    return {"files": len(files), "summary": text.strip().splitlines()[-1]}


def measured(arguments: Sequence[str], seconds: float, file: Path) -> dict[str, Any]:
    """The JSON that a benchmark writes to `file`: where it fails or runs out of time, what it measured until then."""
    file.unlink(missing_ok=True)
    try:
        command([sys.executable, *arguments, "--json", str(file)], seconds, file.with_suffix(".log"))
    except PartFailedError as error:
        if not file.exists() or not (report := json.loads(file.read_text()))["rows"]:
            raise
        return {**report, "incomplete": str(error)}
    return json.loads(file.read_text())


def kernels(folder: Path, seconds: float) -> dict[str, Any]:
    options = ["--device", "cuda", "--batches", "8", "--seconds", "0.1", "--shapes", "LLaVA-13B", "LLaVA-7B"]
    report = measured(["benchmarks/kernel_speed.py", *options], seconds, folder / "kernels.json")
    if report["gate_failed"]:
        raise PartFailedError(f"less accurate than eager code: {report['gate_failed']} (see kernels.log)")
    return report


def step(preset: str) -> Callable[[Path, float], dict[str, Any]]:
    def run(folder: Path, seconds: float) -> dict[str, Any]:
        options = ["--preset", preset, "--device", "cuda", "--repetitions", "5"]
        return measured(["benchmarks/step.py", *options], seconds, folder / f"step-{preset}.json")

    return run


def tiny_run(folder: Path, seconds: float, name: str, launcher: Sequence[str], *settings: str) -> dict[str, Any]:
    """Twelve steps of unlearning on a small random model; returns the last step's figures."""
    world = folder / "world"
    if not (world / "model" / "config.json").exists():
        world.mkdir(parents=True, exist_ok=True)
        command([sys.executable, "-c", TINY_WORLD, str(world)], seconds, folder / "world.log")
    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    optim = "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adamw_torch"
    common = {
        "model_name_or_path": world / "model", "data": world, "forget_split": "forget", "retain_split": "retain",
        "output_dir": output, "sites": "llm:2", "max_steps": 12, "per_device_train_batch_size": 8, "bf16": "true",
        "optim": optim, "logging_steps": 4, "learning_rate": "1e-4",
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in common.items()]
    command([*launcher, "fastvkd/train.py", *overrides, *settings], seconds, folder / f"{name}.log")
    return {"optim": optim, **json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])}


def local_run(folder: Path, seconds: float) -> dict[str, Any]:
    return tiny_run(folder, seconds, "local", [sys.executable], "device=cuda")


def deepspeed_run(folder: Path, seconds: float) -> dict[str, Any]:
    """ZeRO-2 on one GPU, started by DeepSpeed's own launcher."""
    launcher = shutil.which("deepspeed")
    start = [launcher] if launcher else [sys.executable, "-m", "deepspeed.launcher.runner"]
    settings = ["engine=deepspeed", "deepspeed=zero2", "device=cuda"]
    return tiny_run(folder, seconds, "deepspeed", [*start, "--num_gpus", "1"], *settings)


PARTS = (  # what is worth most comes first; their seconds fit the time of all together
    Part("gpu tests", 120, needs("pytest", "hypothesis"), gpu_tests),
    Part("step llava-1.5-13b", 140, no_gpu, step("llava-1.5-13b")),
    Part("kernels", 60, no_gpu, kernels),
    Part("step llava-1.5-7b", 90, no_gpu, step("llava-1.5-7b")),
    Part("unlearning, local engine", 40, needs("tokenizers"), local_run),
    Part("unlearning, deepspeed", 60, needs("tokenizers", "deepspeed"), deepspeed_run),
)
MINUTES = 8.5


def run_parts(
    parts: Sequence[Part], folder: Path, *, seconds: float, skipped: Sequence[str] = (), about: dict[str, Any]
) -> dict[str, Any]:
    """Run `parts` in order within `seconds`; the report is on disk after each of them.

    A part may take its own seconds and what those before it, or later ones that cannot run, leave of theirs.
    """
    report: dict[str, Any] = {"benchmark": "gpu_suite", **about, "parts": {}}
    end = time.monotonic() + seconds
    reasons = {part.name: "left out by --skip" if part.name in skipped else part.missing() for part in parts}
    for number, part in enumerate(parts):
        started = time.monotonic()
        left = end - started
        later = sum(other.seconds for other in parts[number + 1 :] if reasons[other.name] is None)
        reason = reasons[part.name]
        if reason is None and left < 20:
            reason = f"no time left of {seconds / 60:.0f} minutes"
        entry: dict[str, Any] = {"status": "skipped", "reason": reason}
        if reason is None:
            try:
                entry = {"status": "passed", "result": part.run(folder, min(left, max(part.seconds, left - later)))}
            except (PartFailedError, OSError, ValueError, KeyError, IndexError) as error:
                entry = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - started, 1)
        report["parts"][part.name] = entry
        print(f"{part.name}: {entry['status']}{' (' + entry['reason'] + ')' if 'reason' in entry else ''}", flush=True)
        (folder / "gpu-suite.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu-suite.md").write_text(markdown(report))
    return report


def markdown(report: dict[str, Any]) -> str:
    from tables import kernels_table, step_table  # beside this script

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# GPU suite: {report['device']}, {report['date']}", "", versions, ""]
    lines += ["| part | outcome | seconds | |", "|---|---|---:|---|"]
    for name, entry in report["parts"].items():
        said = entry.get("reason", "")
        if entry["status"] == "passed":
            result = entry["result"]
            said = result.get("summary") or (f"loss {result['loss']:.4g}" if "loss" in result else "table below")
            said += f"; incomplete: {result['incomplete']}" if "incomplete" in result else ""
        lines.append(f"| {name} | {entry['status']} | {entry['seconds']} | {said} |")
    for name, entry in report["parts"].items():
        if entry["status"] != "passed":
            continue
        if name.startswith("step"):
            lines += ["", f"## {name}", "", *step_table(entry["result"])]
        elif name == "kernels":
            lines += ["", f"## {name}", "", *kernels_table(entry["result"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-suite"), help="folder of the report and the logs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--skip", nargs="*", default=[], choices=[part.name for part in PARTS])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    from fastvkd.environment import measured_on

    chosen = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    about = {**measured_on("cuda" if torch.cuda.is_available() else "cpu"), "command": " ".join(sys.argv)}
    report = run_parts(
        chosen, arguments.out.resolve(), seconds=60 * arguments.minutes, skipped=arguments.skip, about=about
    )
    print(f"{arguments.out / 'gpu-suite.md'}")
    sys.exit(1 if any(entry["status"] == "failed" for entry in report["parts"].values()) else 0)


if __name__ == "__main__":
    main()
