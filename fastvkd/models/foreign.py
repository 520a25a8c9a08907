"""Folders that hold a model in a form that is not read: each is named, with the way to one that is."""

from pathlib import Path
from typing import Any

from fastvkd.errors import ModelError
from fastvkd.files import read_json_object

ADAPTER = "adapter_config.json"
_MEND = "copy it anew from the original model"
# The JSON files of a model folder that are read on the way to a model and its processor.
_READ = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_ORIGINAL_LLAVA = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen", "LlavaLlamaForCausalLM")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises ModelError, saying what the folder holds instead, where it is none that is read."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: {_without_config(folder)}")
    config = read_json_object(file, ModelError, _MEND)
    if problem := _not_read(config):
        raise ModelError(f"{folder}: {problem}")
    return config


def check_json(folder: Path) -> None:
    """Raises ModelError, naming the file, where a JSON file of a model or of its processor is damaged."""
    for name in _READ:
        if (folder / name).is_file():
            read_json_object(folder / name, ModelError, _MEND)


def _without_config(folder: Path) -> str:
    if (folder / ADAPTER).is_file():
        base = read_json_object(folder / ADAPTER, ModelError, _MEND).get("base_model_name_or_path") or "its base model"
        return f"holds a LoRA adapter of {base} and no model; make one: fastvkd merge {folder} --to NEW_FOLDER"
    if found := sorted(folder.glob("*.gguf")):
        return f"has no config.json; {found[0].name} holds weights for llama.cpp, take the model it was made from"
    if found := sorted(folder.glob("checkpoint-*")):
        return f"has no config.json, but {found[0].name}; a run is made a model folder by fastvkd export"
    return "has no config.json; give the path of a model folder as save_pretrained writes it"


def _not_read(config: dict[str, Any]) -> str | None:
    kinds = {str(config.get("model_type")), *map(str, config.get("architectures") or ())}
    if "mm_vision_tower" in config or kinds & set(_ORIGINAL_LLAVA):
        return (
            "is in the original LLaVA format, which transformers does not read; take the same model in its format, "
            "such as llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b"
        )
    return None


def refuse_quantised(folder: Path) -> None:
    """Raises ModelError for a folder whose weights are quantised: they can be asked, not trained or written back."""
    quantised = read_config(folder).get("quantization_config")
    if quantised:
        kind = (quantised.get("quant_method") if isinstance(quantised, dict) else None) or "bitsandbytes"
        raise ModelError(
            f"{folder}: its weights are quantised already ({kind}), so none can be trained or written back; take the "
            "original model (quantize_llm=nf4 makes it as small while it is trained)"
        )
