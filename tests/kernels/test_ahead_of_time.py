"""Every kernel compiles for every GPU target without spilling a register, and the committed results say the same.

Compilation runs in a process of its own: where TRITON_INTERPRET is set there is nothing to compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(
    scope="module",
    params=[{"sm_90"}, pytest.param(TARGETS - {"sm_90"}, marks=pytest.mark.proof)],
    ids=["H100", "other targets"],
)
def compiled(request, tmp_path_factory) -> tuple[set[str], list[dict]]:
    """Some targets, and what every kernel and variant came to when compiled for them."""
    report = tmp_path_factory.mktemp("aot") / "aot.json"
    run(sys.executable, "benchmarks/aot_kernels.py", "--targets", *sorted(request.param), "--json", str(report))
    return request.param, json.loads(report.read_text())["entries"]


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())


def name_of(entry: dict) -> tuple:
    return entry["kernel"], entry["H"], entry["variant"], entry["target"]


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(compiled):
    targets, entries = compiled
    assert {entry["target"] for entry in entries} == targets
    sources = (ROOT / "kernels" / "fastvkd_kernels").glob("*.py")
    kernels = {
        line[4:].split("(")[0] for path in sources for line in path.read_text().splitlines() if "_kernel(" in line
    }
    kernels = {name for name in kernels if name.isidentifier()}
    assert len(kernels) >= 11
    for target in targets:
        assert {entry["kernel"] for entry in entries if entry["target"] == target} == kernels
        assert {4096, 5120} <= {entry["H"] for entry in entries if entry["target"] == target}
    assert [entry for entry in entries if entry["spills"] != 0] == []
    assert all(0 < entry["registers"] <= 255 for entry in entries if entry["target"] != "gfx942")


@pytest.mark.slow
def test_rows_are_read_once_in_16_byte_loads(compiled):
    """bf16 rows of 4,096 by 256 threads: a thread reads 32 bytes of hidden and of target each, and writes 32."""
    targets, entries = compiled
    found = [
        (entry["loads_16"], entry["stores_16"])
        for entry in entries
        if entry["kernel"] == "distill_rows_kernel"
        and entry["H"] == 4096
        and entry["variant"].endswith("bf16, bf16 target, mapped + weights + repel")
        and entry["target"] in ("sm_80", "sm_90")
    ]
    assert found == [(4, 2)] * 3 * len(targets & {"sm_80", "sm_90"})  # three distances


@pytest.mark.slow
def test_committed_results_are_up_to_date(compiled, committed):
    targets, entries = compiled
    there = {name_of(entry): entry for entry in committed["entries"] if entry["target"] in targets}
    assert there == {name_of(entry): entry for entry in entries}


def test_committed_results_are_of_every_target(committed):
    # tests/benchmarks/test_tables.py holds the table in docs/kernels.md to the committed results.
    assert {entry["target"] for entry in committed["entries"]} == TARGETS
    code = "import aot_kernels as aot; print(sorted(aot.TARGETS))"
    assert run(sys.executable, "-c", code, cwd=ROOT / "benchmarks").strip() == str(sorted(TARGETS))


def test_bfloat16_is_rounded_to_nearest():
    """What the interpreted suites assume of compiled code (kernel_gate.round_bfloat16_as_hardware_does)."""
    code = (
        "import aot_kernels as aot, triton;"
        "from triton.compiler import ASTSource;"
        "launch = [l for l in aot.recorded_launches() if l.kernel.fn.__name__ == 'distill_rows_kernel'][0];"
        "compiled = triton.compile(ASTSource(launch.kernel, *aot.specialise(launch)), target=aot.TARGETS['sm_80'],"
        " options=dict(launch.options));"
        "print('cvt.rn.bf16' in compiled.asm['ptx'])"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT / "benchmarks").strip() == "True"


def test_a_spill_would_be_seen():
    """The same reading of the machine code, with too few registers allowed on purpose."""
    code = (
        "import aot_kernels as aot, triton;"
        "from triton.compiler import ASTSource;"
        "launch = [l for l in aot.recorded_launches() if l.kernel.fn.__name__ == 'rms_norm_backward_kernel'][0];"
        "compiled = triton.compile(ASTSource(launch.kernel, *aot.specialise(launch)), target=aot.TARGETS['sm_90'],"
        " options={**launch.options, 'maxnreg': 24});"
        "print(aot.usage(compiled, aot.TARGETS['sm_90'])['spills'])"
    )
    assert int(run(sys.executable, "-c", code, cwd=ROOT / "benchmarks")) > 0
