"""GPU cards: their memory, peak rate and links, and how a user or a driver spells their names."""

import difflib
import re

from fastvkd.devices import GIB
from fastvkd.errors import SettingsError

# What the driver hands out, as torch's `total_memory` has it: less than the name says, by the ECC bits of GDDR6 cards
# (L4, L40S, A10, A40, T4) or by what the driver keeps.
GPU_MEMORY_GIB: dict[str, float] = {
    "A10": 22.5, "A100 40GB": 39.4, "A100 80GB": 79.1, "A40": 45.0, "B200": 178, "GH200": 94.5, "H100": 79.1,
    "H200": 139, "L4": 22.5, "L40S": 45.0, "RTX 3060": 11.7, "RTX 3090": 23.6, "RTX 4070 Ti": 11.7, "RTX 4080": 15.6,
    "RTX 4090": 23.6, "RTX 5080": 15.5, "RTX 5090": 31.4, "RTX 6000 Ada": 47.4, "RTX A6000": 47.4, "T4": 14.8,
    "V100 16GB": 15.8, "V100 32GB": 31.7,
}  # fmt: skip
# Datasheet peak of dense 16-bit matrix products with float32 accumulation, in TFLOP/s (T4 and V100: float16).
GPU_PEAK_TFLOPS: dict[str, float] = {
    "A10": 125, "A100 40GB": 312, "A100 80GB": 312, "A40": 150, "B200": 2250, "GH200": 989, "H100": 989, "H200": 989,
    "L4": 121, "L40S": 362, "RTX 3060": 25, "RTX 3090": 71, "RTX 4070 Ti": 80, "RTX 4080": 97, "RTX 4090": 165,
    "RTX 5080": 113, "RTX 5090": 209, "RTX 6000 Ada": 364, "RTX A6000": 155, "T4": 65, "V100 16GB": 125,
    "V100 32GB": 125,
}  # fmt: skip
# GB/s in one direction between the cards of a node: NVLink where the usual server has it, else PCIe.
GPU_LINK_GB_PER_S: dict[str, float] = {
    "A10": 32, "A100 40GB": 300, "A100 80GB": 300, "A40": 32, "B200": 900, "GH200": 450, "H100": 450, "H200": 450,
    "L4": 32, "L40S": 32, "RTX 3060": 32, "RTX 3090": 32, "RTX 4070 Ti": 32, "RTX 4080": 32, "RTX 4090": 32,
    "RTX 5080": 64, "RTX 5090": 64, "RTX 6000 Ada": 32, "RTX A6000": 32, "T4": 16, "V100 16GB": 150, "V100 32GB": 150,
}  # fmt: skip


def gpu_memory(*, gpu: str | None, memory: str | None) -> int | None:
    """Bytes of a card by its name, or of a size like "24GiB" (GB and G mean the same); None when neither is given."""
    if memory is not None:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)\s*", memory, re.IGNORECASE)
        if match is None:
            raise SettingsError(f"--memory {memory!r}: write a size like 24GiB")
        return int(float(match[1]) * GIB)
    return None if gpu is None else int(GPU_MEMORY_GIB[card_name(gpu)] * GIB)


def card_name(gpu: str) -> str:
    """The table's name of a card, however the user wrote it. Raises SettingsError for an unknown one."""
    simple = {name.replace(" ", "").lower(): name for name in GPU_MEMORY_GIB}
    wanted = re.sub(r"nvidia|geforce|[ _-]", "", gpu.lower())
    if wanted not in simple:
        near = simple[difflib.get_close_matches(wanted, simple, n=1, cutoff=0.0)[0]]
        raise SettingsError(f"--gpu {gpu!r}: unknown card; did you mean {near!r}? Otherwise give --memory 24GiB")
    return simple[wanted]


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a card by its driver's name for it ("NVIDIA H100 80GB HBM3"); None for one not in the table."""
    simple = re.sub(r"[ _-]", "", device_name).lower()
    found = [name for name in GPU_PEAK_TFLOPS if re.sub(r" \d+GB$", "", name).replace(" ", "").lower() in simple]
    return GPU_PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None
