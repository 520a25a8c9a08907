"""DeepSpeed configurations: a preset or file, with `"auto"` filled in from the run's settings.

The settings decide. A DeepSpeed file may repeat them; where it says something else it is refused, early.
"""

import copy
import difflib
import json
from pathlib import Path
from typing import Any

from fastvkd.engines.optimizers import EIGHT_BIT, check_optimizer
from fastvkd.errors import SettingsError
from fastvkd.paths import shipped

PRESETS = shipped("ds_configs")
_OFFLOADS = ("offload_optimizer", "offload_param")
_LARGEST_LAYER = 1 << 30  # elements; buffers for NVMe must hold the largest parameter (13B's embedding has 164 M)


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """A preset of `ds_configs/` by its name, or a JSON file by its path. Raises SettingsError."""
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.json"))}
    path = presets.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, presets, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}? " if near else "; "
        raise SettingsError(f"deepspeed={name_or_path!r}: no such file or preset{hint}Presets: {', '.join(presets)}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: a JSON object is needed, found a {type(config).__name__}")
    return config


def complete_ds_config(
    config: dict[str, Any],
    *,
    micro_batch: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    bf16: bool,
    optim: str,
    quantize_llm: str,
    world_size: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: every `"auto"` filled in, nothing left that contradicts the settings.

    It needs neither model nor device, so a mistake costs no loading time. Raises SettingsError naming the key,
    both values and the mend.
    """
    check_optimizer(optim)
    config = copy.deepcopy(config)
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    _refuse_what_settings_decide(config)
    _fill_in(
        config,
        {
            "train_micro_batch_size_per_gpu": (micro_batch, "per_device_train_batch_size"),
            "gradient_accumulation_steps": (gradient_accumulation_steps, "gradient_accumulation_steps"),
            "train_batch_size": (
                micro_batch * gradient_accumulation_steps * world_size,
                "the product of batch settings",
            ),
            "gradient_clipping": (max_grad_norm, "max_grad_norm"),
            "bf16.enabled": (bf16, "bf16"),
        },
    )
    _check_zero(zero, optim, quantize_llm)
    _complete_zero(zero, on_gpu)
    _refuse_auto(config, "")
    # bitsandbytes' optimisers are tested here, DeepSpeed just does not know them; offload on a machine without a GPU
    # takes torch's AdamW, since DeepSpeed's own would be compiled for minutes.
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": on_gpu}
    config.setdefault("steps_per_print", None)
    return config


def _refuse_what_settings_decide(config: dict[str, Any]) -> None:
    stage = config["zero_optimization"]["stage"]
    if stage not in (0, 1, 2, 3):
        raise SettingsError(f"zero_optimization.stage={stage!r}: allowed are 0, 1, 2, 3")
    for section, setting in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config:
            raise SettingsError(f"the DeepSpeed configuration has a section {section!r}: remove it, {setting} decides")
    if config.pop("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise SettingsError("fp16.enabled=true: Fisher information and small updates underflow in fp16; use bf16=true")


def _fill_in(config: dict[str, Any], from_settings: dict[str, tuple[Any, str]]) -> None:
    """Set every key to its value; SettingsError where the configuration says something else than the setting named."""
    for key, (value, setting) in from_settings.items():
        *parents, last = key.split(".")
        target = config.setdefault(parents[0], {}) if parents else config
        found = target.get(last, "auto")
        if found not in ("auto", value):
            raise SettingsError(f"{key}={found!r} in the DeepSpeed configuration, but {setting}={value!r}: use 'auto'")
        target[last] = value


def _check_zero(zero: dict[str, Any], optim: str, quantize_llm: str) -> None:
    stage = zero["stage"]
    offload_optimizer, offload_param = (_offload(zero, section) for section in _OFFLOADS)
    if offload_param and stage != 3:
        raise SettingsError(f"offload_param needs zero_optimization.stage=3, found {stage}: use zero3_offload")
    if offload_optimizer and stage == 0:
        raise SettingsError("offload_optimizer needs zero_optimization.stage 1, 2 or 3: use zero2_offload_optimizer")
    if offload_optimizer and optim in EIGHT_BIT:
        raise SettingsError(
            f"optim={optim!r} with offload_optimizer: the offloaded step runs on the CPU with its own AdamW; set "
            "optim=adamw_torch, or keep the 8-bit optimiser and use zero2"
        )
    if stage == 3 and quantize_llm != "none":
        raise SettingsError(
            f"quantize_llm={quantize_llm!r} with ZeRO-3: quantised weights cannot be partitioned (transformers skips "
            "it); use zero2 with the truncated LLM, or quantize_llm=none"
        )


def _complete_zero(zero: dict[str, Any], on_gpu: bool) -> None:
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = on_gpu
    if isinstance(zero.get("offload_param"), dict) and zero["offload_param"].get("buffer_size") == "auto":
        zero["offload_param"]["buffer_size"] = _LARGEST_LAYER
    for section in _OFFLOADS:
        if not on_gpu and isinstance(zero.get(section), dict):
            zero[section]["pin_memory"] = False  # pinning is for copies to a GPU


def _offload(zero: dict[str, Any], section: str) -> bool:
    device = (zero.get(section) or {}).get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise SettingsError(f"zero_optimization.{section}.device={device!r}: allowed are none, cpu, nvme")
    if device == "nvme":
        path = Path(zero[section].get("nvme_path") or "")
        if not path.is_dir():
            raise SettingsError(
                f"zero_optimization.{section}.nvme_path={str(path)!r} is no folder: copy ds_configs/zero3_nvme.json, "
                "set it to a folder on a fast local disk, and give the copy's path as `deepspeed`"
            )
    return device != "none"


def _refuse_auto(value: Any, key: str) -> None:
    if value == "auto":
        raise SettingsError(f"{key}='auto' in the DeepSpeed configuration: nothing here fills it in; give a value")
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_auto(inner, f"{key}.{name}" if key else name)
