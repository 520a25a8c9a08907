"""`checkpoint.json`, what a checkpoint says of itself: written with a digest of its own, checked where it is read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvkd.errors import TrainingError
from fastvkd.files import json_sha256, read_json_object, sync

FORMAT = 2
_WITHOUT_DIGEST = 1  # the format before, which is still read
MANIFEST = "checkpoint.json"
WEIGHTS = "visual.safetensors"
MASTERS = "masters.safetensors"
_MEND = "delete the folder and resume from an older one"
_TYPES = {int: "a whole number", dict: "an object", list: "a list", str: "a text"}
_NEEDED = {"updates": int, "world_size": int, "sampler": dict, "settings": dict, "base_model": dict, "sha256": dict}
_LATER = {"watch": dict, "run": dict, "forgotten": dict, "beside": list}  # versions before wrote none


def rank_file(rank: int) -> str:
    """The file of one rank's moments and random-number states."""
    return f"rank-{rank}.pt"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write it, of JSON values, with the digest of all that it says."""
    content = {**manifest, "format": FORMAT}
    path = folder / MANIFEST
    path.write_text(json.dumps({**content, "digest": _digest(content)}, indent=1))
    sync(path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json` as a dict, with what versions before left out.

    Raises TrainingError when the folder is not a checkpoint of a known format, or the file is not what was written.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise TrainingError(f"{checkpoint}: no {MANIFEST}, so not a checkpoint; name a folder checkpoint-<step>")
    manifest = read_json_object(path, TrainingError, _MEND)
    form, digest = manifest.get("format"), manifest.pop("digest", None)
    if form not in (FORMAT, _WITHOUT_DIGEST) or not _is(form, int):
        raise TrainingError(f"{path}: format {form!r}, this version reads {_WITHOUT_DIGEST} and {FORMAT}")
    if form == FORMAT and digest != _digest(manifest):
        raise TrainingError(f"{path}: damaged (its digest differs); {_MEND}")
    manifest = {**{key: kind() for key, kind in _LATER.items() if key != "forgotten"}, **manifest}
    for problem in _wrong(manifest):
        raise TrainingError(f"{path}: {problem}; {_MEND}")
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what is said, however it is spelled: as it reads back, for JSON turns keys into texts."""
    return json_sha256(json.loads(json.dumps(content)))


def _wrong(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What no version has written."""
    for key, kind in (_NEEDED | _LATER).items():
        if key not in manifest:
            if key in _NEEDED:
                yield f"has no {key}"
        elif not _is(manifest[key], kind):
            yield f"{key} is not {_TYPES[kind]}"
    for key, least in (("updates", 0), ("world_size", 1)):
        if manifest[key] < least:
            yield f"{key} is {manifest[key]}, less than {least}"
    for key in ("path", "fingerprint"):
        if not _is(manifest["base_model"].get(key), str):
            yield f"base_model has no text {key}"
    alpha = manifest["settings"].get("lora_alpha", 0)
    if not _is(alpha, int) and not isinstance(alpha, float):
        yield "settings.lora_alpha is not a number"
    if not all(_is(name, str) for name in manifest["beside"]):
        yield "beside is not a list of names"
    files = manifest["sha256"]
    for name, digest in files.items():
        if Path(name).name != name:
            yield f"names {name!r}, which is no file of its own folder"
        if not _is(digest, str):
            yield f"has no SHA-256 of {name}"
    for name in (WEIGHTS, *map(rank_file, range(min(manifest["world_size"], len(files) + 1)))):
        if name not in files:
            yield f"has no SHA-256 of {name}"


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
