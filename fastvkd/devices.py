"""The device that a command runs on, and the memory that it took."""

import resource
import sys

import torch

from fastvkd.errors import SettingsError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises SettingsError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device={name!r}: allowed are auto, cpu, cuda, cuda:<n>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device={name}: torch {torch.__version__} sees no GPU; set device=cpu")
    return device


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: allocated on the GPU, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def questions_at_once(tokens: int, layers: int, kv_width: int, bytes_per_value: int) -> int:
    """How many questions of so many tokens are asked in one pass: 64, or as many as 2 GiB of keys and values hold.

    An LLM of 7B keeps half a megabyte a token: 64 questions about photos would take more than a card has beside it.
    """
    return max(1, min(64, 2 * 1024**3 // (2 * tokens * layers * kv_width * bytes_per_value)))
