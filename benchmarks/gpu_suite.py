"""Everything that needs a GPU, in one command of at most nine minutes, without network: does this installation work,
and how fast is it?

    python benchmarks/gpu_suite.py --out out/gpu-suite

Each part runs in a process of its own with a time limit; one that fails or cannot run here leaves its reason and does
not stop the others. After every part `gpu-suite.json` and `gpu-suite.md` are written anew. Exit code 1: a part failed.
With `--device cpu` those parts run that a CPU can run, made tiny: a rehearsal, whose figures say nothing.
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


def needs(*modules: str, device: str = "cuda") -> Callable[[], str | None]:
    """The reason why a part that imports `modules` cannot run on `device`; None when it can."""

    def missing() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        unseen = no_gpu() if device == "cuda" else None
        return unseen or (f"not installed: {', '.join(absent)}" if absent else None)

    return missing


def command(
    arguments: Sequence[str], seconds: float, log: Path, *, device: str = "cuda", good: Sequence[int] = (0,)
) -> str:
    """Run a command of ours from the repository root; returns its output. Raises PartFailedError with the last line
    where its exit code is none of `good`."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        tools = Path(sys.executable).parent  # ninja, for DeepSpeed's one compiled operation
        environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{tools}{os.pathsep}{environment['PATH']}"}
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
    if code not in good:
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


def tiny_model(folder: Path, seconds: float, family: str, size: str = "small") -> Path:
    """A random model of a family in a tiny world, both made when they are first asked for."""
    world = folder / f"world-{size}"
    make = [sys.executable, "benchmarks/tiny_world.py", str(world), "--family", family, "--size", size]
    command(make, seconds, folder / f"world-{family}-{size}.log")
    return world / f"model-{family}"


def tiny_run(
    folder: Path, seconds: float, name: str, launcher: Sequence[str], device: str, *settings: str, family: str = "llava"
) -> dict[str, Any]:
    """Twelve steps of unlearning on a small random model; returns its figures and those of the last step."""
    model = tiny_model(folder, seconds, family)
    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    common = {
        "model_name_or_path": model, "data": model.parent, "output_dir": output, "device": device,
        "max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 4,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in common.items()]
    started = time.monotonic()
    arguments = [*launcher, "fastvkd/train.py", *overrides, *settings]
    command(arguments, seconds, folder / f"{name}.log", device=device)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = (next(line for line in which if "loss" in line) for which in (lines, reversed(lines)))
    return {"command_seconds": round(time.monotonic() - started, 1), "first_loss": first["loss"], **last}


def explicit() -> list[str]:
    """Settings of a run inside the LLM, in bf16, with 8-bit moments where they are installed."""
    optim = "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adamw_torch"
    return ["sites=llm:2", "bf16=true", "learning_rate=1e-4", "forget_target=noise", f"optim={optim}"]


Run = Callable[[Path, float], dict[str, Any]]


def local_run(device: str, name: str, *settings: str, family: str = "llava") -> Run:
    def run(folder: Path, seconds: float) -> dict[str, Any]:
        return tiny_run(folder, seconds, name, [sys.executable], device, *settings, family=family)

    return run


def deepspeed_run(device: str, preset: str) -> Run:
    """One rank, started by DeepSpeed's own launcher."""

    def run(folder: Path, seconds: float) -> dict[str, Any]:
        beside = Path(sys.executable).with_name("deepspeed")
        launcher = shutil.which("deepspeed") or (str(beside) if beside.exists() else None)
        start = [launcher] if launcher else [sys.executable, "-m", "deepspeed.launcher.runner"]
        settings = ["engine=deepspeed", f"deepspeed={preset}", *explicit()]
        return tiny_run(folder, seconds, preset, [*start, "--num_gpus", "1"], device, *settings)

    return run


def eval_and_attack(device: str) -> Run:
    """What a user does after a run: export, `fastvkd eval`, and relearning from all photos but those held out."""

    def run(folder: Path, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        trained, merged = folder / "before-eval", folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        tiny_run(folder, seconds, trained.name, [sys.executable], device, *explicit())
        model = tiny_model(folder, seconds, "llava")
        figures: dict[str, Any] = {}

        def fastvkd(name: str, *arguments: str, good: Sequence[int] = (0,)) -> None:
            started = time.monotonic()
            start = [sys.executable, "-m", "fastvkd.cli", name, *arguments]
            command(start, max(1.0, end - started), folder / f"{name}.log", device=device, good=good)
            figures[f"{name}_seconds"] = round(time.monotonic() - started, 1)

        fastvkd("export", "--run", str(trained), "--to", str(merged))
        on = ["--model", str(merged), "--data", str(model.parent), "--device", device]
        on += [] if device == "cpu" else ["--bf16"]  # without instructions for it a CPU takes minutes
        evaluated, attacked = folder / "eval", folder / "attack"
        for old in (evaluated, attacked):  # what is kept there would not be measured again
            shutil.rmtree(old, ignore_errors=True)
        unscored = [name for name in ("rouge_score", "nltk") if importlib.util.find_spec(name) is None]
        if unscored:
            figures["eval"] = f"left out: not installed: {', '.join(unscored)}"
        else:
            fastvkd("eval", *on, "--out", str(evaluated))
            figures["cells"] = json.loads((evaluated / "results.json").read_text())["cells"]
        few = [
            "--kind",
            "relearn",
            "--shares",
            "1.0",
            "--steps",
            "0",
            "2",
            "--seeds",
            "0",
            "--variants",
            "redrawn_projector",
            "--learning-rates",
            "1e-3",
        ]
        # a random model may miss the thresholds, which is exit code 1
        fastvkd("attack", *on, "--before", str(model), *few, "--out", str(attacked), good=(0, 1))
        rows = json.loads((attacked / "attacks.json").read_text())["relearning"]
        return {**figures, "relearning": [row["auc"] for row in rows]}

    return run


def quantised(device: str) -> Run:
    def run(folder: Path, seconds: float) -> dict[str, Any]:
        model = tiny_model(folder, seconds, "llava", "small" if device == "cpu" else "wide")
        images = [str(file) for file in sorted(model.parent.glob("forget-*-0.png"))]
        return measured(
            ["benchmarks/quantised.py", str(model), *images, "--device", device], seconds, folder / "quantised.json"
        )

    return run


def optimizer_step(device: str) -> Run:
    def run(folder: Path, seconds: float) -> dict[str, Any]:
        options = ["--preset", "tiny" if device == "cpu" else "llava-1.5-13b", "--device", device]
        return measured(["benchmarks/optimizer_step.py", *options], seconds, folder / "optimizer.json")

    return run


def parts_on(device: str) -> tuple[Part, ...]:
    """What is worth most comes first; their seconds fit the time of all together."""
    tiny, eight_bit = needs("tokenizers", device=device), needs("tokenizers", "bitsandbytes", device=device)
    launched = needs("tokenizers", "deepspeed", device=device)
    qwen = local_run(device, "qwen", *explicit(), family="qwen2_5_vl")
    paged = local_run(device, "paged", *explicit(), "optim=paged_adamw_8bit")
    return (
        Part("gpu tests", 75, needs("pytest", "hypothesis"), gpu_tests),
        Part("step llava-1.5-13b", 125, no_gpu, step("llava-1.5-13b")),
        Part("kernels", 55, no_gpu, kernels),
        Part("optimizer step", 30, needs("bitsandbytes", device=device), optimizer_step(device)),
        Part("unlearning, local engine", 30, tiny, local_run(device, "local")),
        Part("unlearning, ZeRO-2", 35, launched, deepspeed_run(device, "zero2")),
        Part("unlearning, ZeRO-3", 55, launched, deepspeed_run(device, "zero3")),
        Part("unlearning, Qwen2.5-VL", 30, tiny, qwen),
        Part("unlearning, paged moments", 25, eight_bit, paged),
        Part("nf4 and int8", 30, eight_bit, quantised(device)),
        Part("eval and attack", 45, tiny, eval_and_attack(device)),
    )


PARTS = parts_on("cuda")
MINUTES = 9


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


def brief(result: dict[str, Any]) -> str:
    """The figures of a part by name, lists and texts left out; "table below" where there are none."""
    shown = {key: value for key, value in result.items() if isinstance(value, int | float)}
    if "rows" in result or not shown:
        return "table below"
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items())


def rows_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Any rows as a table; the first column is text."""
    from tables import table  # beside this script

    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in head] for row in rows]
    return table(head, cells)


def markdown(report: dict[str, Any]) -> str:
    from tables import kernels_table, step_table  # beside this script

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# GPU suite: {report['device']}, {report['date']}", "", versions, ""]
    lines += ["| part | outcome | seconds | |", "|---|---|---:|---|"]
    for name, entry in report["parts"].items():
        said = entry.get("reason", "")
        if entry["status"] == "passed":
            result = entry["result"]
            said = result.get("summary") or brief(result)
            said += f"; incomplete: {result['incomplete']}" if "incomplete" in result else ""
        lines.append(f"| {name} | {entry['status']} | {entry['seconds']} | {said} |")
    for name, entry in report["parts"].items():
        if entry["status"] != "passed":
            continue
        if name.startswith("step "):
            lines += ["", f"## {name}", "", *step_table(entry["result"])]
        elif name == "kernels":
            lines += ["", f"## {name}", "", *kernels_table(entry["result"])]
        elif "rows" in entry["result"]:
            lines += ["", f"## {name}", "", *rows_table(entry["result"]["rows"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-suite"), help="folder of the report and the logs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--skip", nargs="*", default=[], choices=[part.name for part in PARTS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses what it can")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    from fastvkd.environment import measured_on

    chosen = [part for part in parts_on(arguments.device) if arguments.parts is None or part.name in arguments.parts]
    about = {**measured_on("cuda" if torch.cuda.is_available() else "cpu"), "command": " ".join(sys.argv)}
    report = run_parts(
        chosen, arguments.out.resolve(), seconds=60 * arguments.minutes, skipped=arguments.skip, about=about
    )
    print(f"{arguments.out / 'gpu-suite.md'}")
    sys.exit(1 if any(entry["status"] == "failed" for entry in report["parts"].values()) else 0)


if __name__ == "__main__":
    main()
