"""How whole models are brought onto a device: their dtype, their quantisation, and what memory they are spread over.

Training says all of this in its settings. The commands that only ask a model take a default that fits the card, and
say so on one line.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fastvkd.devices import QUANTIZED_BYTES, WORKING_BYTES, pick_device, usable_bytes, warn_of_slow_bfloat16
from fastvkd.errors import SettingsError
from fastvkd.models.foreign import read_config
from fastvkd.models.loading import VISUAL_KEY, ModelPath, Quantize, load_model
from fastvkd.models.shards import header_of, shards_of
from fastvkd.options import LoadOptions, Quantized

log = logging.getLogger("fastvkd")

Scattered = Literal["", "cards", "host"]
_NOT_ROUNDED = ("lm_head.", "embed_tokens.")


@dataclass(frozen=True)
class Loading:
    """How models are loaded. `spread`: over all cards and then host memory, as accelerate's device_map="auto", `room`
    bytes of each card being kept free."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    quantize: Quantize | None = None
    spread: bool = False
    room: int = WORKING_BYTES

    def model(self, folder: ModelPath) -> PreTrainedModel:
        """The whole model of a folder, in evaluation mode."""
        return load_model(folder, **self.arguments())

    def visual_part(self, folder: ModelPath) -> PreTrainedModel:
        """Tower and projector alone, which nothing rounds or spreads."""
        return load_model(folder, dtype=self.dtype, device=self.device, llm_layers=0)

    def arguments(self) -> dict[str, Any]:
        """Those of `load_model`."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "quantize_llm": self.quantize,
            "spread": self.room if self.spread else None,
        }

    def scattered(self, folder: Path) -> Scattered:
        """Where the weights of that model will lie, if not on one device."""
        if not self.spread or self.device.type != "cuda":
            return ""
        cards = _cards()
        room = sum(usable_bytes(card) - self.room for card in cards)
        if weight_bytes(folder, self.dtype.itemsize, self.quantize) > room:
            return "host"
        return "cards" if len(cards) > 1 else ""

    def described(self) -> dict[str, str]:
        """What results state; `device_map` changes no figure, the others do."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantize": self.quantize or "none",
            "device_map": "auto" if self.spread else "none",
        }


def loading_of(options: LoadOptions, folder: Path) -> Loading:
    """How a command loads a model, one at a time.

    In bfloat16 on a GPU and in float32 on a CPU, unless the options say otherwise.
    """
    device = pick_device(options.device)
    bf16 = options.bf16 or (device.type == "cuda" and not options.fp32)
    dtype = torch.bfloat16 if bf16 else torch.float32
    warn_of_slow_bfloat16(device, dtype)
    anywhere = options.device in ("auto", "cuda")
    if options.device_map == "auto":
        if not anywhere:
            raise SettingsError(f"--device-map auto goes over all cards: leave out --device {options.device}")
        return Loading(device, dtype, _named(options.quantize), spread=True)
    return fitting(folder, device, dtype, options.quantize, anywhere=anywhere)


def fitting(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantized,
    *,
    anywhere: bool = False,
    option: str = "--quantize ",
    spread_option: str = "--device-map auto",
    room: int = WORKING_BYTES,
) -> Loading:
    """`quantize` as it is named; `auto` is the first that fits: the models as they are, over all cards where `anywhere`
    allows others than `device`, in nf4, and over the cards and host memory. All but the first are said on one line.

    It goes by the size of the card and not by what is free on it, so that the same command gives the same figures.
    room: bytes beside the weights.
    """
    if quantize != "auto" or device.type != "cuda":
        return Loading(device, dtype, _named(quantize))
    whole, rounded = (weight_bytes(folder, dtype.itemsize, kind) + room for kind in (None, "nf4"))
    card = torch.cuda.get_device_properties(device).total_memory
    if whole <= usable_bytes(card):
        return Loading(device, dtype)
    cards = _cards()
    kind = str(dtype).removeprefix("torch.")
    needs = f"{folder.name} in {kind} needs {whole / 1e9:.0f} GB; this card has {card / 1e9:.0f}"
    if anywhere and whole - room <= sum(usable_bytes(card) - room for card in cards):
        log.warning("%s: spread over %d cards, as %s", needs, len(cards), spread_option)
        return Loading(device, dtype, spread=True, room=room)
    if rounded <= usable_bytes(card):
        log.warning("%s: loaded in nf4, as %snf4 (%s is exact, and slower)", needs, option, spread_option)
        return Loading(device, dtype, "nf4")
    log.warning("%s, too few also for nf4: spread over cards and host memory, as %s", needs, spread_option)
    return Loading(device, dtype, spread=True, room=room)


def _cards() -> list[int]:
    """Bytes of every GPU."""
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _named(quantize: Quantized) -> Quantize | None:
    return None if quantize == "auto" or quantize == "none" else quantize


def weight_bytes(folder: Path, itemsize: int, quantize: Quantize | None = None) -> int:
    """Bytes of a model folder's weights once they are loaded, by what its safetensors files say of themselves.

    Of the LLM the matrices of the layers are quantised, not embeddings and head. A folder that holds quantised weights
    already is as large as its files.
    """
    stored = bool(read_config(folder).get("quantization_config"))
    total = 0.0
    for shard in shards_of(folder):
        for name, entry in header_of(shard).items():
            begin, end = entry["data_offsets"]
            visual_or_end = VISUAL_KEY.search(name) or any(part in name for part in _NOT_ROUNDED)
            if stored:
                total += end - begin
            elif quantize is None or visual_or_end or len(entry["shape"]) < 2:
                total += math.prod(entry["shape"]) * itemsize
            else:
                total += math.prod(entry["shape"]) * QUANTIZED_BYTES[quantize]
    return int(total)
