"""Checkpoints of the trained part only. A kill at any moment leaves the last good one; a resume is exact.

A checkpoint folder `checkpoint-<updates>/` holds

- `visual.safetensors`: the trainable weights under their HF live names, in their working dtype;
- `masters.safetensors`: their float32 masters, left out where the weights are float32 themselves;
- `rank-<r>.pt`: optimiser moments and random-number states of one rank;
- `checkpoint.json`: updates done, sampler position, what the run's watch had seen, settings, the run's identity, the
  base model's fingerprint, and SHA-256 of the rest.

No file holds frozen weights. In a run on the visual part these are the LLM's.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvkd.engines.protocol import Engine
from fastvkd.errors import TrainingError, disk_is_full
from fastvkd.models.folder import BaseModel, read_safetensors_header

FORMAT = 1
MANIFEST = "checkpoint.json"
WEIGHTS = "visual.safetensors"
MASTERS = "masters.safetensors"
_UNFINISHED = ".unfinished-"
RUN = "run.json"  # in an output folder: which run it is of
# What a run leaves in its output folder, and another must not take for its own.
_OF_A_RUN = ("checkpoint-*", "best", "trials", "metrics.jsonl", RUN, "trace.json", "tensorboard", "report.*")


@dataclass(frozen=True)
class Resumed:
    """What the loop needs to go on from a checkpoint. `notice` is one line for the user; an exact resume has none.

    watch: as it was saved; {} where nothing was watched.
    """

    updates: int
    sampler: dict[str, Any]
    watch: dict[str, Any]
    settings: dict[str, Any]
    notice: str


def save_checkpoint(
    output_dir: Path,
    engine: Engine,
    *,
    sampler: dict[str, Any],
    settings: dict[str, Any],
    base_model: BaseModel,
    keep: int,
    watch: dict[str, Any] | None = None,
    run: dict[str, str] | None = None,
    beside: dict[str, Tensor] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-<updates>` and of those of fewer updates keep the newest, `keep` in all (0: every
    one); collective over ranks.

    `sampler`, `settings` and `watch` must be JSON values; `run` is the run's identity. `beside`: weights that
    the engine does not train, to lie beside its own. The folder appears under its name only when it is complete and on
    disk. Raises TrainingError, on every rank, when any rank cannot write (no space
    left).
    """
    final = output_dir / f"checkpoint-{engine.updates}"
    unfinished = output_dir / f"{_UNFINISHED}checkpoint-{engine.updates}"
    state = engine.state_dict()
    weights = engine.weights()
    masters = state.pop("masters")

    def prepare() -> None:
        for leftover in output_dir.glob(f"{_UNFINISHED}*"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)

    def write_own_part() -> None:
        _torch_save({"engine": state, "rng": _rng_state(engine.device)}, unfinished / f"rank-{engine.rank}.pt")
        if engine.rank == 0:
            all_weights = {**weights, **(beside or {})}
            save_file({n: t.cpu().contiguous() for n, t in all_weights.items()}, unfinished / WEIGHTS)
            higher = {n: t.cpu().contiguous() for n, t in masters.items() if weights[n].dtype != t.dtype}
            if higher:
                save_file(higher, unfinished / MASTERS)

    def publish() -> None:
        manifest = {
            "format": FORMAT,
            "updates": engine.updates,
            "world_size": engine.world_size,
            "sampler": sampler,
            "watch": watch or {},
            "settings": settings,
            "base_model": dataclasses.asdict(base_model),
            "run": run or {},
            "beside": sorted(beside or {}),
        }
        _publish(unfinished, final, manifest)
        older = [p for p in _checkpoints(output_dir) if _updates_of(p) < engine.updates]
        for old in older[: len(older) + 1 - keep] if keep > 0 else []:
            shutil.rmtree(old)

    _together(engine, prepare if engine.rank == 0 else None, final)
    _together(engine, write_own_part, final)
    _together(engine, publish if engine.rank == 0 else None, final)
    return final


def _publish(unfinished: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give a complete folder its name once all of it is on disk, the manifest with the hashes of the rest last."""
    files = sorted(unfinished.iterdir())
    manifest = {**manifest, "sha256": {file.name: _sha256(file) for file in files}}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in [*files, unfinished / MANIFEST, unfinished]:
        _fsync(file)
    replaced = final.with_name(f"{_UNFINISHED}replaced-{final.name}")
    if final.exists():  # the same step saved again, say by a SIGTERM right after a regular save
        final.rename(replaced)
    unfinished.rename(final)
    _fsync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _together(engine: Engine, work: Any, final: Path) -> None:
    """Run `work` and wait for the other ranks. A disk error on one rank becomes an error on all, and no deadlock."""
    error: Exception | None = None
    if work is not None:
        try:
            work()
        except (OSError, SafetensorError) as caught:
            error = caught
    if engine.any_rank(error is not None):
        shutil.rmtree(final.parent / f"{_UNFINISHED}{final.name}", ignore_errors=True)
        if error is not None and disk_is_full(error):
            reason = "no space left on the device; free some, or lower `save_total_limit`"
        else:
            reason = str(error).splitlines()[0] if error else "another rank could not write; see its message"
        raise TrainingError(f"{final}: cannot be written: {reason}") from error


def _torch_save(content: Any, path: Path) -> None:
    """torch.save that raises the system's own error. By itself it makes a RuntimeError of a full disk."""
    failed: list[OSError] = []

    class Writer(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                done = 0
                while done < len(data):  # a raw write may take a part
                    done += super().write(memoryview(data)[done:])
                return done
            except OSError as error:
                failed.append(error)
                raise

    with Writer(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise failed[0] if failed else error from error


def find_latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; what `resume_from_checkpoint: auto` means."""
    found = _checkpoints(output_dir)
    return found[-1] if found else None


def go_back(output_dir: Path, now: int, then: int, kept_in: Path) -> None:
    """Delete a run's checkpoints from after `then` to `now` updates, and move the one of `then` here from `kept_in`.

    It stays here where it is here already, and is nowhere where it was not kept. For one rank only.
    """
    for checkpoint in _checkpoints(output_dir):
        if then < _updates_of(checkpoint) <= now:
            shutil.rmtree(checkpoint)
    name = f"checkpoint-{then}"
    if (kept_in / name).exists() and not (output_dir / name).exists():
        (kept_in / name).rename(output_dir / name)


def _checkpoints(output_dir: Path) -> list[Path]:
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit() and (p / MANIFEST).is_file()]
    return sorted(found, key=_updates_of)


def _updates_of(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def set_aside(output_dir: Path, *, after: int = -1, delete: bool = False) -> Path | None:
    """Make room for a run: move what an earlier one left in `output_dir` to a new folder `earlier-<n>` in it.

    With `after`, what is of more updates than that, where a run goes on from then. With `delete`, or without a
    checkpoint in it, it is deleted. Returns the folder, or None. For one rank only.
    """
    found = [p for p in _checkpoints(output_dir) if _updates_of(p) > after]
    if after < 0:
        found = [p for pattern in _OF_A_RUN for p in sorted(output_dir.glob(pattern))]
    if delete or not any(p.match("checkpoint-*") or any(p.glob("checkpoint-*")) for p in found):
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    aside = next(p for n in itertools.count(1) if not (p := output_dir / f"earlier-{n}").exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json` as a dict. Raises TrainingError when the folder is not a checkpoint of a known format."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise TrainingError(f"{checkpoint}: no {MANIFEST}, so not a checkpoint; name a folder checkpoint-<step>")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise TrainingError(f"{path}: not JSON ({error}); delete the folder and resume from an older one") from error
    if manifest.get("format") != FORMAT:
        raise TrainingError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def verify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Compare every file with its checksum and return the manifest. Raises TrainingError naming the damaged file."""
    manifest = read_manifest(checkpoint)
    for name, expected in manifest["sha256"].items():
        file = checkpoint / name
        if not file.is_file() or _sha256(file) != expected:
            found = "damaged (its SHA-256 differs)" if file.is_file() else "missing"
            raise TrainingError(f"{file}: {found}; delete the folder {checkpoint.name} and resume from an older one")
    return manifest


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint on the CPU, HF live names, in their working dtype."""
    return load_file(checkpoint / WEIGHTS)


def load_checkpoint(checkpoint: Path, engine: Engine, *, base_model: BaseModel) -> Resumed:
    """Put `engine` (and Python's, NumPy's and torch's random states) where it was; collective over ranks.

    With another world size or engine layout, weights and masters are restored and the moments start from zero; `notice`
    then says so. Raises TrainingError for a damaged checkpoint, other trainable parameters, another optimiser, or a
    base model that is not the one the run started from.
    """
    manifest = verify_checkpoint(checkpoint)
    known = BaseModel(**manifest["base_model"])
    if known.fingerprint != base_model.fingerprint:
        raise TrainingError(
            f"{checkpoint}: trained from {known.path} (fingerprint {known.fingerprint[:12]}), but the base model is "
            f"now {base_model.path} ({base_model.fingerprint[:12]}); give the original as model_name_or_path"
        )
    same_world = manifest["world_size"] == engine.world_size
    own = checkpoint / f"rank-{engine.rank if same_world else 0}.pt"
    part = torch.load(own, map_location="cpu", weights_only=True)
    state = part["engine"]
    not_its_own = set(manifest.get("beside", ()))
    state["masters"] = {name: w for name, w in load_weights(checkpoint).items() if name not in not_its_own}
    if (checkpoint / MASTERS).is_file():
        state["masters"] |= load_file(checkpoint / MASTERS)
    moments_restored = engine.load_state_dict(state)
    if same_world:
        _set_rng_state(part["rng"], engine.device)
    notice = ""
    if not moments_restored:
        notice = (
            f"{checkpoint}: written by {manifest['world_size']} rank(s) with layout {state['layout']!r}, resumed by "
            f"{engine.world_size}: weights and masters are restored, optimiser moments start from zero"
        )
    return Resumed(manifest["updates"], manifest["sampler"], manifest.get("watch", {}), manifest["settings"], notice)


def bytes_per_trainable_parameter(checkpoint: Path) -> float:
    """Size of the checkpoint on disk over the number of trainable weights in it."""
    header, _ = read_safetensors_header(checkpoint / WEIGHTS)
    count = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return sum(file.stat().st_size for file in checkpoint.iterdir()) / count


def _rng_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - third parties use it
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
