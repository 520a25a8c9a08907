"""Checkpoints of the trained part only. A kill at any moment leaves the last good one; a resume is exact.

A checkpoint folder `checkpoint-<updates>/` holds

- `visual.safetensors`: the trainable weights under their HF live names, in their working dtype;
- `masters.safetensors`: their float32 masters, left out where the weights are float32 themselves;
- `rank-<r>.pt`: optimiser moments and random-number states of one rank;
- `checkpoint.json`: updates done, sampler position, what the run's watch had seen, settings, the run's identity, whom
  it is to forget as salted hashes, the base model's fingerprint, SHA-256 of the rest, and a digest of its own.

No file holds frozen weights. In a run on the visual part these are the LLM's.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvkd.engines.hashed_files import save_object, save_tensors
from fastvkd.engines.manifests import MANIFEST, MASTERS, WEIGHTS, rank_file, read_manifest, write_manifest
from fastvkd.engines.protocol import Engine
from fastvkd.errors import ModelError, TrainingError, disk_is_full, one_line
from fastvkd.files import UNFINISHED, delete_folder, delete_unfinished, sync
from fastvkd.models.folder import BaseModel
from fastvkd.models.shards import UNPICKLING_ERRORS, read_safetensors_header

RUN = "run.json"  # in an output folder: which run it is of
# What a run leaves in its output folder beside checkpoints, and another must not take for its own.
_OF_A_RUN = (RUN, "metrics.jsonl", "trace.json", "tensorboard", "report.json", "report.html")
_HASHES = ".sha256-"  # what each rank tells the one that publishes; gone when it is published


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
    forgotten: dict[str, Any] | None = None,
    beside: dict[str, Tensor] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-<updates>` and of those of fewer updates keep the newest, `keep` in all (0: every
    one); collective over ranks.

    `sampler`, `settings`, `watch` and `forgotten` must be JSON values; `run` is the run's identity, `forgotten` says
    whom it is about (`fastvkd.engines.requests.note_of`). `beside`: weights that the engine does not train, to lie
    beside its own. The folder appears under its name only when it is complete and on disk. Raises TrainingError, on
    every rank, when any rank cannot write (no space left).
    """
    about = {**_about(engine, sampler, settings, base_model, watch, run, forgotten), "beside": sorted(beside or {})}
    content = _Content.of(engine)
    content.weights.update(beside or {})
    return _write(output_dir, content, about, keep, engine.any_rank)


class CheckpointWriter:
    """Saves checkpoints, behind the training's back where that is asked for and safe. To be left as a context.

    What a checkpoint holds is copied to host memory first, so it is of one moment. One is written at a time. A kill
    leaves the last complete one, as it does with `save_checkpoint`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fastvkd-checkpoint")
        self._pending: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown()

    def save(self, output_dir: Path, engine: Engine, *, behind: bool, keep: int, **about: Any) -> Path:
        """As `save_checkpoint`; with `behind`, for one rank alone, it returns as soon as all is copied.

        Raises TrainingError also for the last one that was to be written behind, and then writes nothing.
        """
        self.wait()
        if not behind:
            return save_checkpoint(output_dir, engine, keep=keep, **about)
        assert engine.world_size == 1
        content, manifest = _Content.of(engine).copied(), _about(engine, **about)
        self._pending = self._thread.submit(_write, output_dir, content, manifest, keep, bool)
        return output_dir / f"checkpoint-{engine.updates}"

    def wait(self) -> None:
        """Until all that was saved is on disk. Raises TrainingError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


@dataclass(frozen=True)
class _Content:
    """What one rank's part of a checkpoint holds. Its tensors are the engine's own until they are `copied`."""

    rank: int
    updates: int
    own: dict[str, Any]
    weights: dict[str, Tensor]
    masters: dict[str, Tensor]

    @staticmethod
    def of(engine: Engine) -> "_Content":
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # paged moments lie where the host reads them without waiting
        state, weights = engine.state_dict(), engine.weights()
        masters = {n: t for n, t in state.pop("masters").items() if n in weights and weights[n].dtype != t.dtype}
        own = {"engine": state, "rng": _rng_state(engine.device)}
        return _Content(engine.rank, engine.updates, own, weights, masters)

    def copied(self) -> "_Content":
        parts = (_copied(part) for part in (self.own, self.weights, self.masters))
        return _Content(self.rank, self.updates, *parts)


def _copied(value: Any) -> Any:
    """The same in host memory, with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def _about(
    engine: Engine,
    sampler: dict[str, Any],
    settings: dict[str, Any],
    base_model: BaseModel,
    watch: dict[str, Any] | None = None,
    run: dict[str, str] | None = None,
    forgotten: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest, but for the hashes."""
    noted = {} if forgotten is None else {"forgotten": forgotten}
    return {
        "updates": engine.updates,
        "world_size": engine.world_size,
        "sampler": sampler,
        "watch": watch or {},
        "settings": settings,
        "base_model": dataclasses.asdict(base_model),
        "run": run or {},
        **noted,
    }


def _write(
    output_dir: Path, content: _Content, manifest: dict[str, Any], keep: int, any_rank: Callable[[bool], bool]
) -> Path:
    final = output_dir / f"checkpoint-{content.updates}"
    unfinished = output_dir / f"{UNFINISHED}{final.name}"

    def prepare() -> None:
        delete_unfinished(output_dir)  # of a run that was killed while saving or deleting
        unfinished.mkdir(parents=True)

    def write_own_part() -> None:
        name = rank_file(content.rank)
        hashes = {name: save_object(content.own, unfinished / name)}
        if content.rank == 0:
            hashes[WEIGHTS] = save_tensors(content.weights, unfinished / WEIGHTS)
            if content.masters:
                hashes[MASTERS] = save_tensors(content.masters, unfinished / MASTERS)
        (unfinished / f"{_HASHES}{content.rank}").write_text(json.dumps(hashes))

    def publish() -> None:
        _publish(unfinished, final, manifest)
        older = [p for p in _checkpoints(output_dir) if _updates_of(p) < content.updates]
        for old in older[: max(0, len(older) + 1 - keep)] if keep > 0 else []:
            delete_folder(old)

    first = content.rank == 0
    _together(any_rank, prepare if first else None, final)
    _together(any_rank, write_own_part, final)
    _together(any_rank, publish if first else None, final)
    return final


def _publish(unfinished: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give a complete folder its name once all of it is on disk, the manifest with the hashes of the rest last."""
    hashes: dict[str, str] = {}
    for told in sorted(unfinished.glob(f"{_HASHES}*")):
        hashes |= json.loads(told.read_text())
        told.unlink()
    write_manifest(unfinished, {**manifest, "sha256": dict(sorted(hashes.items()))})
    sync(unfinished)
    replaced = final.with_name(f"{UNFINISHED}replaced-{final.name}")
    if final.exists():  # the same step saved again, say by a SIGTERM right after a regular save
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    if replaced.exists():
        delete_folder(replaced)


def _together(any_rank: Callable[[bool], bool], work: Callable[[], None] | None, final: Path) -> None:
    """Run `work` and wait for the other ranks. A disk error on one rank becomes an error on all, and no deadlock."""
    error: Exception | None = None
    if work is not None:
        try:
            work()
        except OSError as caught:
            error = caught
    if any_rank(error is not None):
        delete_folder(final.parent / f"{UNFINISHED}{final.name}", ignore_errors=True)
        if error is not None and disk_is_full(error):
            reason = "no space left on the device; free some, or lower `save_total_limit`"
        else:
            reason = str(error).splitlines()[0] if error else "another rank could not write; see its message"
        raise TrainingError(f"{final}: cannot be written: {reason}") from error


def find_latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; what `resume_from_checkpoint: auto` means."""
    found = _checkpoints(output_dir)
    return found[-1] if found else None


def find_newest(output_dir: Path) -> Path | None:
    """As `find_latest`, for whoever goes on from it: an older one is not taken for the newest.

    Raises TrainingError where a folder of more updates, with files of ours, has lost its manifest. No kill leaves one
    like that behind.
    """
    latest = find_latest(output_dir)
    done = -1 if latest is None else _updates_of(latest)
    for path in sorted(output_dir.glob("checkpoint-*")):
        ours = any((path / name).is_file() for name in (WEIGHTS, rank_file(0)))
        if path.name[11:].isdigit() and _updates_of(path) > done and ours:
            raise TrainingError(
                f"{path}: has no {MANIFEST}, so part of it was lost; copy it anew, or delete the folder to go on "
                f"{'from the beginning' if latest is None else f'from {latest.name}'}"
            )
    return latest


def go_back(output_dir: Path, now: int, then: int, kept_in: Path) -> None:
    """Delete a run's checkpoints from after `then` to `now` updates, and move the one of `then` here from `kept_in`.

    It stays here where it is here already, and is nowhere where it was not kept. For one rank only.
    """
    for checkpoint in _checkpoints(output_dir):
        if then < _updates_of(checkpoint) <= now:
            delete_folder(checkpoint)
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

    With `after`, the checkpoints of more updates than that, where a run goes on from then. With `delete` it is deleted;
    so is the beginning of a run that has no checkpoint. What no run has written stays where it is. Returns the folder,
    or None. For one rank only.
    """
    found = [checkpoint for checkpoint in _checkpoints(output_dir) if _updates_of(checkpoint) > after]
    if after < 0:
        found += [folder for name in ("best", "trials") if _checkpoints(folder := output_dir / name)]
        has_checkpoints = bool(found)
        if has_checkpoints or (output_dir / RUN).is_file():
            found += [path for name in _OF_A_RUN if (path := output_dir / name).exists()]
        delete = delete or not has_checkpoints
    if delete or not found:
        for path in found:
            delete_folder(path) if path.is_dir() else path.unlink()
        return None
    aside = next(p for n in itertools.count(1) if not (p := output_dir / f"earlier-{n}").exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


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
    """The trained weights of a checkpoint on the CPU, HF live names, in their working dtype. Raises TrainingError where
    the file holds something else."""
    return _load_tensors(checkpoint / WEIGHTS)


def trained_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """The shapes of the trained weights by their names; only a header is read. Raises as `load_weights` does."""
    return _shapes(checkpoint / WEIGHTS)


def _load_tensors(file: Path) -> dict[str, Tensor]:
    _shapes(file)  # names the file if it is damaged
    return load_file(file)


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        header, _ = read_safetensors_header(file)
    except (ModelError, OSError) as error:
        raise _of_another_kind(file, one_line(error)) from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


# What of `Engine.state_dict` lies in a rank's file.
_OF_AN_ENGINE = {"names": list, "optim": str, "updates": int, "world_size": int, "layout": str}


def _read_part(file: Path) -> dict[str, Any]:
    """What one rank wrote for itself. Raises TrainingError where the file holds anything else."""
    try:
        part = torch.load(file, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise _of_another_kind(file, one_line(error, 120)) from error
    if not isinstance(part, dict) or not all(isinstance(part.get(key), dict) for key in ("engine", "rng")):
        raise _of_another_kind(file, "no engine and rng in it")
    state = part["engine"]
    for key, kind in _OF_AN_ENGINE.items():
        if not isinstance(state.get(key), kind):
            raise _of_another_kind(file, f"engine has no {key} of the type {kind.__name__}")
    if not all(isinstance(name, str) for name in state["names"]):
        raise _of_another_kind(file, "the names of parameters are no texts")
    if not isinstance(state.get("moments", 0), dict | None):
        raise _of_another_kind(file, "the moments are of no optimiser")
    return part


def _of_another_kind(file: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{file}: is not what a checkpoint holds ({what}); delete the folder {file.parent.name} and resume from an "
        "older one"
    )


def load_checkpoint(checkpoint: Path, engine: Engine, *, base_model: BaseModel) -> Resumed:
    """Put `engine` (and Python's, NumPy's and torch's random states) where it was; collective over ranks.

    With another world size or engine layout, weights and masters are restored and the moments start from zero; `notice`
    then says so. Raises TrainingError for a damaged checkpoint, other trainable parameters, another optimiser, or a
    base model that is not the one the run started from.
    """
    manifest = verify_checkpoint(checkpoint)
    known = BaseModel(manifest["base_model"]["path"], manifest["base_model"]["fingerprint"])
    if known.fingerprint != base_model.fingerprint:
        raise TrainingError(
            f"{checkpoint}: trained from {known.path} (fingerprint {known.fingerprint[:12]}), but the base model is "
            f"now {base_model.path} ({base_model.fingerprint[:12]}); give the original as model_name_or_path"
        )
    same_world = manifest["world_size"] == engine.world_size
    own = checkpoint / rank_file(engine.rank if same_world else 0)
    part = _read_part(own)
    state = part["engine"]
    not_its_own = set(manifest["beside"])
    state["masters"] = {name: w for name, w in load_weights(checkpoint).items() if name not in not_its_own}
    if MASTERS in manifest["sha256"]:
        masters = _load_tensors(checkpoint / MASTERS)
        for name, master in masters.items():
            if name not in state["masters"] or state["masters"][name].shape != master.shape:
                raise _of_another_kind(checkpoint / MASTERS, f"{name} is no weight of {WEIGHTS}, or of another shape")
        state["masters"] |= masters
    moments_restored = engine.load_state_dict(state)
    if same_world:
        try:
            _set_rng_state(part["rng"], engine.device)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise _of_another_kind(own, f"random-number states: {one_line(error, 120)}") from error
    notice = ""
    if not moments_restored:
        notice = (
            f"{checkpoint}: written by {manifest['world_size']} rank(s) with layout {state['layout']!r}, resumed by "
            f"{engine.world_size}: weights and masters are restored, optimiser moments start from zero"
        )
    return Resumed(manifest["updates"], manifest["sampler"], manifest["watch"], manifest["settings"], notice)


def bytes_per_trainable_parameter(checkpoint: Path) -> float:
    """Size of the checkpoint on disk over the number of trainable weights in it."""
    count = sum(map(math.prod, trained_shapes(checkpoint).values()))
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
