"""What stands in the way of a model folder, seen from the names of its files: said before anything is downloaded into
memory."""

from pathlib import Path
from typing import Any

from fastvkd.errors import ModelError
from fastvkd.files import read_json_object

_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"


def notes_on(model_name_or_path: str) -> list[str]:
    """What a user should know of a local model folder, a line each; [] for a sound one and for what is no folder.

    Weights that are quantised already, adapters without their base, weights in pickles, and shards that are missing.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        return []
    notes = []
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = _json(adapter).get("base_model_name_or_path", "its base model")
        notes.append(f"{folder}: an adapter of {base}; merge it: fastvkd merge {folder} --to NEW_FOLDER")
    quantised = _json(folder / "config.json").get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method") or "bitsandbytes"
        notes.append(
            f"{folder}: its weights are quantised already ({kind}), so export cannot write into them and the figures "
            "above, of weights that are not, are too high; take the original model"
        )
    pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
    if not (folder / _INDEX).is_file() and not (folder / _ONE).is_file():
        if pickles and pickles[0].suffix != ".bin":
            notes.append(f"{folder}: weights in {pickles[0].name} only; write them once with save_pretrained")
        elif not pickles and not adapter.is_file():
            notes.append(f"{folder}: no weights in it, neither {_ONE} nor {_INDEX}; training needs them")
    elif (folder / _INDEX).is_file():
        from fastvkd.models.shards import weight_map_of  # late: it imports torch

        named = sorted(set(weight_map_of(folder / _INDEX).values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            notes.append(f"{folder}: {len(missing)} of {len(named)} shards are missing, first {missing[0]}; copy them")
    return notes


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelError, "copy it anew") if path.is_file() else {}
