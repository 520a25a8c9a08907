"""What fastvkd finds on this machine: versions, devices, optional parts. For `fastvkd env` and bug reports."""

import importlib.util
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from fastvkd.reporting.report import describe_hardware, library_versions

_OPTIONAL = {
    "flash_attn": "attn_implementation: flash_attention_2",
    "liger_kernel": "benchmark comparison",
    "tensorboard": "report_to: tensorboard",
    "wandb": "report_to: wandb",
    "dicebear": "fastvkd demo",
}


def describe() -> str:
    """A few lines of text."""
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


def measured_on(device: torch.device | str) -> dict[str, Any]:
    """`device`, `versions` and `date` of a measurement; they stand at the head of every committed result."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        hardware = describe_hardware()
        name = f"{hardware['cpu']} CPU, {torch.get_num_threads()} of {hardware['cpu_cores']} cores"
    return {"device": name, "versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}
