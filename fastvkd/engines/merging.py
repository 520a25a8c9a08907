"""Merges a low-rank adapter of PEFT into its base: an ordinary model folder, from which can then be unlearned.

The base's own files are copied and the adapted tensors overwritten in place, one at a time, as in `exporting`. PEFT is
not needed. W becomes W + s B A, with s = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (LoRA, arXiv
2106.09685; rsLoRA, arXiv 2312.03732).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvkd.engines.exporting import (
    MERGED,
    copy_others,
    copy_shards,
    history_of,
    match_keys,
    read_from,
    replace_tensor,
)
from fastvkd.errors import ModelError, TrainingError
from fastvkd.files import new_folder, read_json_object, refuse_filled
from fastvkd.models.folder import local_folder
from fastvkd.models.foreign import ADAPTER, read_config, refuse_quantised
from fastvkd.models.lora import merged_weight
from fastvkd.models.shards import header_of, read_safetensors_header, read_tensor, shards_of

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Merged:
    """What `merge` did. `tensors` counts those that the adapter changed."""

    folder: Path
    base: Path
    tensors: int


@dataclass(frozen=True)
class _Adapter:
    """What an adapter does: `pairs` are names of A and B in `file` by the weight they add to; `whole` are names of
    tensors that take another's place."""

    file: Path
    pairs: dict[str, tuple[str, str]]
    whole: dict[str, str]
    config: Mapping[str, Any]

    def applied(self, weight: str, original: Tensor) -> Tensor:
        """The weight as the adapted model has it."""
        if weight in self.whole:
            return read_tensor(self.file, self.whole[weight])
        a, b = (read_tensor(self.file, name) for name in self.pairs[weight])
        if a.dim() != 2 or (len(b), a.shape[1]) != tuple(original.shape) or len(a) != b.shape[1]:
            raise ModelError(
                f"{self.file}: B {tuple(b.shape)} times A {tuple(a.shape)} does not fit {weight} "
                f"{tuple(original.shape)}; name the adapter's own base with --base"
            )
        alpha = float(self.config["lora_alpha"])
        return merged_weight(
            original, a, b, alpha=alpha * math.sqrt(len(a)) if self.config.get("use_rslora") else alpha
        )


def merge(adapter: Path, to: Path, *, base: Path | None = None) -> Merged:
    """Write base and adapter as one model folder; whole tensors that the adapter holds take the place of the base's.
    The base's record of earlier requests comes along (`history_of`); whether an adapter has brought somebody back,
    nobody knows before the new model is judged.

    Raises ModelError for what is no LoRA adapter, for kinds that are not merged (DoRA, layers with ranks or alphas of
    their own, embeddings), for a base that does not fit or is quantised; TrainingError for a folder `to` that is not
    empty or that another process writes to, and for a full disk.
    """
    told = _read_adapter(adapter)
    named = base or told.config.get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{adapter / ADAPTER}: names no base_model_name_or_path; name its folder with --base")
    base = local_folder(str(named))
    read_config(base)
    refuse_quantised(base)
    refuse_filled(to, "--to", "merge into a new one")
    for inside in (base, adapter):
        if to.resolve().is_relative_to(inside.resolve()):
            raise TrainingError(f"{to}: lies inside {inside}; merge into a folder elsewhere")
    history = history_of(base)
    with new_folder(to, "--to", "the base model's size is needed") as folder:
        count = _write(told, base, folder)
        record = {"adapter": str(adapter), "base": str(base), "history": history}
        (folder / MERGED).write_text(json.dumps(record, indent=1) + "\n")
    return Merged(to, base, count)


def _write(adapter: _Adapter, base: Path, folder: Path) -> int:
    shards = shards_of(base)
    keys = {key for shard in shards for key in header_of(shard)}
    weight_of = {key: name for name, key in match_keys([*adapter.pairs, *adapter.whole], keys).items()}
    targets, _ = copy_shards(shards, folder)
    for target in targets:
        header, data_start = read_safetensors_header(target)
        with target.open("r+b") as file:
            for key in header.keys() & weight_of.keys():
                original = read_from(file, key, header[key], data_start, target)
                changed = adapter.applied(weight_of[key], original)
                replace_tensor(file, key, header[key], data_start, changed, target)
            file.flush()
            os.fsync(file.fileno())
    copy_others(base, folder, shards)
    return len(weight_of)


def _read_adapter(folder: Path) -> _Adapter:
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{folder}: no {ADAPTER}; give the folder of an adapter that PEFT has saved")
    config = read_json_object(folder / ADAPTER, ModelError, "save the adapter again")
    for problem in _unmergeable(config):
        raise ModelError(f"{folder / ADAPTER}: {problem}; merge it with PEFT (merge_and_unload, save_pretrained)")
    file = next((f for f in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if f.is_file()), None)
    if file is None:
        raise ModelError(f"{folder}: no adapter_model.safetensors and no adapter_model.bin; copy the adapter whole")
    names = {name.removeprefix(_PREFIX): name for name in header_of(file)}
    pairs: dict[str, tuple[str, str]] = {}
    whole: dict[str, str] = {}
    for name, stored in names.items():
        if name.endswith(_A) and name.removesuffix(_A) + _B in names:
            layer = name.removesuffix(_A)
            pairs[f"{layer}.weight"] = (stored, names[layer + _B])
        elif name.endswith(_B) and name.removesuffix(_B) + _A in names:
            continue
        elif "lora_" in name or not name.endswith((".weight", ".bias")):
            raise ModelError(f"{file}: {name} is of a kind that is not merged; merge it with PEFT (merge_and_unload)")
        else:
            whole[name] = stored
    if not pairs and not whole:
        raise ModelError(f"{file}: holds no adapter; save it again")
    return _Adapter(file, pairs, whole, config)


def _unmergeable(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r} and only LORA is merged"
    if config.get("use_dora"):
        yield "use_dora=true (DoRA) is not merged"
    if config.get("alpha_pattern"):
        yield "alpha_pattern, other alphas for some layers, is not merged"
    if config.get("fan_in_fan_out"):
        yield "fan_in_fan_out=true, for layers that store their weight transposed, is not merged"
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        yield f"lora_alpha is {alpha!r} and no number"
