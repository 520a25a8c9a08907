"""Which run it is: a hash of its data, of what it aims at, and of its base model. A run is resumed as itself only."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastvkd.data.strangers import read_strangers
from fastvkd.files import json_sha256
from fastvkd.models.folder import identify_base, local_folder
from fastvkd.records import Photo, Profile
from fastvkd.settings import Settings
from fastvkd.unlearning.ingredients import Sources

# Where things lie (their contents count instead), how far and how fast a run goes, and on what: all of it may change
# when a run is resumed. Everything else says what is learned.
_FREE = frozenset(
    """
    model_name_or_path data forget_split retain_split finetune_split reference_model strangers
    output_dir cache_dir cache_dtype teacher
    learning_rate lr_scheduler_type warmup_steps max_steps ends watch_steps max_drift num_train_epochs
    per_device_train_batch_size gradient_accumulation_steps max_grad_norm weight_decay optim
    bf16 attn_implementation gradient_checkpointing compile fused_frozen_ops quantize_llm
    certificate engine deepspeed device save_steps save_total_limit resume_from_checkpoint overwrite_output_dir
    logging_steps prefetch profile report_to
    """.split()
)
_FREE_OF_STRANGER = ("quantize", "device_map")


def identify_run(settings: Settings, sources: Sources) -> dict[str, str]:
    """SHA-256 (hex) by part: `data`, the photos and questions of both sides, strangers and a reference model included;
    `objective`, the settings that say what is learned; `base`, the fingerprint of the base model."""
    contents: list[Any] = [list(map(_content, side)) for side in (sources.forget, sources.retain)]
    if settings.strangers is not None:
        contents.append([list(map(_key, photos)) for photos in read_strangers(settings.strangers)])
    if settings.forget_target == "reference" and settings.reference_model is not None:
        contents.append(identify_base(local_folder(settings.reference_model)).fingerprint)
    return {
        "data": json_sha256(contents),
        "objective": json_sha256(objective(settings.to_dict())),
        "base": sources.base.fingerprint,
    }


def objective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a run (also of an earlier version) those that say what is learned."""
    kept = {key: value for key, value in settings.items() if key not in _FREE}
    if "stranger" in kept:
        kept["stranger"] = {key: value for key, value in kept["stranger"].items() if key not in _FREE_OF_STRANGER}
    return kept


def difference(then: Mapping[str, Any], identity: Mapping[str, str], settings: Settings) -> str | None:
    """In what the run of a checkpoint (content of checkpoint.json) is another than this one; None: it is the same, or
    it is of a version that noted no identity."""
    known, before, now = then.get("run") or {}, then["settings"], settings.to_dict()
    if known.get("base", identity["base"]) != identity["base"]:
        return f"another base model ({then['base_model']['path']})"
    if known.get("objective", identity["objective"]) != identity["objective"]:
        one, other = objective(before), objective(now)
        keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
        return "another objective (" + ", ".join(f"{key}={_short(one.get(key))}" for key in keys) + ")"
    if known.get("data", identity["data"]) != identity["data"]:
        return f"other data (data={before.get('data')}, {before.get('forget_split')}, {before.get('retain_split')})"
    return None


def _content(profile: Profile) -> list[Any]:
    questions = [dataclasses.asdict(profile.visual), dataclasses.asdict(profile.textual)]
    return [profile.entity, list(map(_key, profile.photos)), *questions]


def _key(photo: Photo) -> str:
    return photo.key


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
