"""Start the real DeepSpeed launcher, and find the processes that it started."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "fastvkd" / "train.py"


def kind_of_cpu(cpuinfo: str | None = None) -> str:
    """A short name for this kind of processor, its model and what it can do; or for the one that `cpuinfo` describes,
    as Linux does in /proc/cpuinfo."""
    if cpuinfo is None:
        source = Path("/proc/cpuinfo")
        cpuinfo = source.read_text() if source.is_file() else f"model {platform.machine()} {platform.processor()}"
    lasting = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    lines = [line for line in cpuinfo.split("\n\n")[0].splitlines() if line.startswith(lasting)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def start(script: Path, *arguments: str, log: Path, ranks: int = 2) -> subprocess.Popen:
    """`deepspeed --num_gpus RANKS script arguments...` on the CPU; its output goes to `log`."""
    tools = Path(sys.executable).parent  # deepspeed, and ninja for its one compiled operation
    port = 20000 + (os.getpid() * 7 + time.monotonic_ns() // 1000) % 20000
    command = [str(tools / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port), str(script), *arguments]
    environment = {"DS_ACCELERATOR": "cpu", "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT)


def launch(script: Path, *arguments: str, log: Path, ranks: int = 2) -> str:
    """Run to the end, which must be a good one, and return the output."""
    launcher = start(script, *arguments, log=log, ranks=ranks)
    try:
        code = launcher.wait(timeout=800)
    finally:
        kill_tree(launcher)
    assert code == 0, log.read_text()[-8000:]
    return log.read_text()


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The ranks that run `train.py`, in order."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        rank = next((a for a in process.cmdline() if a.startswith("--local_rank=")), None)
        if rank is not None and str(TRAIN) in process.cmdline():
            found[rank] = process
    return [found[rank] for rank in sorted(found)]


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and to all that it started, at once."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        if one.is_running():
            one.kill()
    process.wait()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> None:
    """Return as soon as `happened()`; fail when the process ends or the time passes before that."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
