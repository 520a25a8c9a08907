"""The device that a command runs on, and the memory that it took."""

import gc
import logging
import os
import resource
import sys
import warnings
from pathlib import Path

import torch

from fastvkd.errors import SettingsError

log = logging.getLogger("fastvkd")

GIB = 1024**3
# Of a card's memory, what the caching allocator cannot use for want of a piece that is long enough.
FRAGMENTATION = 0.04
# This much of a card stays free: CUDA context, cuBLAS workspaces.
RESERVED_BYTES = 800 * 1024**2
# What is done in batches takes no more than so many this much at once, or one of them.
WORKING_BYTES = 2 * GIB
# A quantised weight. NF4: one float32 absmax per 64 weights; int8's, one a row, are too few to count.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there while the driver's kernel module is loaded


def pick_device(name: str) -> torch.device:
    """The device of that name, made torch's current one; `auto` is the GPU if there is one.

    Triton's and bitsandbytes' kernels run on the current device, whatever device their tensors are on. Where a GPU is
    there but torch cannot use it, `auto` says why on one line before it takes the CPU. Raises SettingsError for a
    device that is not there.
    """
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise SettingsError(f"device={name!r}: allowed are auto, cpu, cuda, cuda:<n>") from error
    if device.type != "cuda":
        return device
    usable, why = _cuda_usable()
    if usable:
        if device.index is not None:
            if device.index >= torch.cuda.device_count():
                last = torch.cuda.device_count() - 1
                raise SettingsError(f"device={name}: there is no such GPU; allowed are cuda:0 to cuda:{last}")
            torch.cuda.set_device(device)
        return device
    if name != "auto":
        raise SettingsError(f"device={name}: torch {torch.__version__} {why or 'sees no GPU'}; set device=cpu")
    if why:
        log.warning(
            "torch %s %s; going on with the CPU, which device=cpu does without this line", torch.__version__, why
        )
    return torch.device("cpu")


def warn_of_slow_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    """Say on one line that torch has no instructions for bfloat16 on this CPU, and goes through it value by value."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        log.warning("torch has no fast bfloat16 on this CPU: matrix products take some 50 times as long as float32's")


def free_memory() -> None:
    """Of models and tensors to which nothing points any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cuda_usable() -> tuple[bool, str]:
    """Whether torch can use a GPU, and why not where one is there (else "")."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return usable, ""
    said = next((" ".join(str(one.message).split()) for one in caught if "driver" in str(one.message)), "")
    if not said and not _NVIDIA_DRIVER.exists():
        return False, ""
    if torch.version.cuda is None:
        return False, "is built without CUDA and cannot use this machine's GPU; install torch's CUDA wheels"
    said = f" ({said.partition(' (')[0]})" if said else ""
    return False, f"cannot use this machine's GPU{said}; update its driver to one for CUDA {torch.version.cuda}"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: allocated on the GPU, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_bytes(card_bytes: float) -> int:
    """What of a card's memory tensors can take."""
    return int(card_bytes * (1 - FRAGMENTATION)) - RESERVED_BYTES


def at_once(bytes_each: float, most: int = 64) -> int:
    """How many things of `bytes_each` are worked on in one pass: `most`, or as many as `WORKING_BYTES` hold."""
    return max(1, min(most, int(WORKING_BYTES // bytes_each)))


def keys_and_values_bytes(tokens: int, layers: int, kv_width: int, itemsize: int) -> int:
    """What an LLM keeps of a text while it answers."""
    return 2 * tokens * layers * kv_width * itemsize


def decoder_pass_bytes(tokens: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """What a decoder takes of a text at the peak of a pass without gradient, in a layer's gated MLP: embeddings, the
    layer's input, the hidden state before and behind the norm, positions; and three of the MLP's width."""
    return tokens * (5 * hidden + 3 * intermediate) * itemsize


def packed_pass_bytes(tokens: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """The same where every text has an attention mask of its own, as a bool and in the working dtype."""
    return decoder_pass_bytes(tokens, hidden, intermediate, itemsize) + tokens**2 * (1 + itemsize)


def tower_pass_bytes(tokens: int, hidden: int, intermediate: int, itemsize: int, kept: int) -> int:
    """What a tower takes of an image's tokens at the peak of a pass without gradient: hidden states, three of the MLP's
    width, and the outputs of `kept` blocks, which LLaVA keeps all to take its features from one of them."""
    return tokens * ((2 + kept) * hidden + 3 * intermediate) * itemsize


def questions_at_once(tokens: int, layers: int, kv_width: int, bytes_per_value: int) -> int:
    """How many questions of so many tokens are asked in one pass: 64, or as many as 2 GiB of keys and values hold.

    An LLM of 7B keeps half a megabyte a token: 64 questions about photos would take more than a card has beside it.
    """
    return at_once(keys_and_values_bytes(tokens, layers, kv_width, bytes_per_value))
