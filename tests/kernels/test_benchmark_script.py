"""The kernel benchmark runs on a CPU, says that it measures the twin, and prints no row where the gate is red."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--shapes", "CLIP-L/14-336", "--batches", "1", "--seconds", "0.01"]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv[1:] = {list(arguments)}; sys.path[0] = 'benchmarks'; {code}",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_rows_on_a_cpu(tmp_path):
    report_file = tmp_path / "kernels.json"
    script = "import runpy; runpy.run_path('benchmarks/kernel_speed.py', run_name='__main__')"
    done = run(script, *SMALL, "--operations", "mse", "swiglu", "--json", str(report_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU: 'ours' is the plain-torch twin" in done.stdout
    report = json.loads(report_file.read_text())
    found = {(row["operation"], row["implementation"]) for row in report["rows"]}
    names = ("eager", "ours (torch twin)", "torch.compile")
    assert found == {(operation, name) for operation in ("mse", "swiglu") for name in names}
    assert report["versions"]["torch"] and report["date"] and "--operations mse swiglu" in report["command"]
    assert report["copy_gb_per_s"] > 0 and all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_rows_are_on_disk_before_the_run_is_over(tmp_path):
    report_file = tmp_path / "kernels.json"
    stopped = (
        "import runpy, torch; torch.compile = lambda *_, **__: 1 / 0;"
        "runpy.run_path('benchmarks/kernel_speed.py', run_name='__main__')"
    )
    done = run(stopped, *SMALL, "--operations", "mse", "rms_norm", "--json", str(report_file))
    assert "ZeroDivisionError" in done.stderr
    assert json.loads(report_file.read_text())["copy_gb_per_s"] > 0
    stopped = stopped.replace("lambda *_, **__: 1 / 0", "lambda function, **_: lambda *_: 1 / 0")
    done = run(stopped, *SMALL, "--operations", "mse", "rms_norm", "--json", str(report_file))
    assert "ZeroDivisionError" in done.stderr
    rows = json.loads(report_file.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["eager", "ours (torch twin)"]


def test_a_gpus_time_is_taken_with_all_launches_queued_behind_a_wait(monkeypatch):
    spec = importlib.util.spec_from_file_location("gauges", ROOT / "benchmarks" / "gauges.py")
    clock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clock)
    did = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            did.append("event")

        def elapsed_time(self, stop):
            return 0.05

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("wait for the GPU"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: did.append(cycles))

    def work():
        time.sleep(2e-3)  # what the host takes to launch it
        did.append("work")

    launch = clock.launch_seconds(work)
    assert launch >= 2e-3
    did.clear()
    assert clock.gpu_milliseconds(work, launch, before=lambda: did.append("flush")) == 0.05
    flush, cycles, *rest = did
    assert flush == "flush" and rest == ["event", "work", "event", "wait for the GPU"]
    assert cycles >= 2 * 2e-3 * 2e9  # twice as long as launching takes, on a GPU of 2 GHz


@pytest.mark.slow
def test_a_red_gate_prints_no_row(tmp_path):
    report_file = tmp_path / "kernels.json"
    wrong = (
        "import runpy, fastvkd_kernels as k; true = k.visual_distill_loss;"
        "k.visual_distill_loss = lambda **b: [2 * x for x in r] if isinstance(r := true(**b), tuple) else 2 * r;"
        "runpy.run_path('benchmarks/kernel_speed.py', run_name='__main__')"
    )
    done = run(wrong, *SMALL, "--no-compile", "--operations", "mse", "--json", str(report_file))
    assert done.returncode == 1 and "gate is red: loss: error" in done.stdout, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert report["rows"] == [] and len(report["gate_failed"]) == 1
