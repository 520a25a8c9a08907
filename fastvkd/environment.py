"""What fastvkd finds on this machine: versions, devices, optional parts. torch is imported only where it is asked."""

import atexit
import importlib.util
import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

_OPTIONAL = {
    "flash_attn": "attn_implementation: flash_attention_2",
    "liger_kernel": "benchmark comparison",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "dicebear": "fastvkd demo",
}


def describe() -> str:
    """A few lines of text, for `fastvkd env` and bug reports."""
    import torch

    lines = [f"{name:14} {version}" for name, version in library_versions().items()]
    lines.append(f"{'platform':14} {platform.platform()}, {os.cpu_count()} cores")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(
                f"{f'cuda:{i}':14} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}"
            )
    else:
        lines.append(f"{'gpu':14} none seen by torch {torch.__version__}")
    for module, purpose in _OPTIONAL.items():
        found = "installed" if importlib.util.find_spec(module) else "not installed"
        lines.append(f"{module:14} {found} ({purpose})")
    return "\n".join(lines)


def measured_on(device: "torch.device | str") -> dict[str, Any]:
    """`device`, `versions` and `date` of a measurement; they stand at the head of every committed result."""
    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        hardware = describe_hardware()
        name = f"{hardware['cpu']} CPU, {torch.get_num_threads()} of {hardware['cpu_cores']} cores"
    return {"device": name, "versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("fastvkd", "torch", "transformers", "triton", "deepspeed", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_hardware() -> dict[str, Any]:
    """`cpu` (name), `cpu_cores` (that this process may use), `memory_bytes`, `gpu` (name or None)."""
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu,
        "cpu_cores": cores,
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def end_process(code: int) -> NoReturn:
    """End a rank with `code` after its exit handlers, without taking the interpreter apart.

    DeepSpeed keeps the job's process groups alive to the end, and with them Gloo's threads. One that still holds a
    tensor then asks for the lock of an interpreter that is gone, which aborts the process after all work is done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
