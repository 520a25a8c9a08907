"""The kernel benchmark runs on a CPU, says that it measures the twin, and prints no row where the gate is red."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--shapes", "CLIP-L/14-336", "--batches", "1", "--seconds", "0.01"]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import sys; sys.argv[1:] = {list(arguments)}; {code}"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_rows_on_a_cpu(tmp_path):
    report_file = tmp_path / "kernels.json"
    script = "import runpy; runpy.run_path('benchmarks/kernels.py', run_name='__main__')"
    done = run(script, *SMALL, "--operations", "mse", "swiglu", "--json", str(report_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU: 'ours' is the plain-torch twin" in done.stdout
    report = json.loads(report_file.read_text())
    found = {(row["operation"], row["implementation"]) for row in report["rows"]}
    names = ("eager", "ours (torch twin)", "torch.compile")
    assert found == {(operation, name) for operation in ("mse", "swiglu") for name in names}
    assert report["copy_gb_per_s"] > 0 and all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_a_red_gate_prints_no_row(tmp_path):
    report_file = tmp_path / "kernels.json"
    wrong = (
        "import runpy, fastvkd_kernels as k; true = k.visual_distill_loss;"
        "k.visual_distill_loss = lambda **b: [2 * x for x in r] if isinstance(r := true(**b), tuple) else 2 * r;"
        "runpy.run_path('benchmarks/kernels.py', run_name='__main__')"
    )
    done = run(wrong, *SMALL, "--no-compile", "--operations", "mse", "--json", str(report_file))
    assert done.returncode == 1 and "gate is red: loss: error" in done.stdout, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert report["rows"] == [] and len(report["gate_failed"]) == 1
