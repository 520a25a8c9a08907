"""Turns a run into an ordinary model folder: the base's own files, with only the trained weights' bytes replaced.

Nothing is loaded as a model. The file system copies the shards, sharing blocks copy-on-write where it can. Trained
tensors are then overwritten in place, one at a time, under the keys of the base. Low-rank adapters and sines are merged
into the weights that they belong to.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvkd.engines.checkpoints import find_newest, load_weights, trained_shapes, verify_checkpoint
from fastvkd.engines.manifests import WEIGHTS
from fastvkd.errors import ModelError, TrainingError, one_line
from fastvkd.files import new_folder, read_json, read_json_object, refuse_filled
from fastvkd.models import lora, sine
from fastvkd.models.folder import identify_base
from fastvkd.models.foreign import refuse_quantised
from fastvkd.models.shards import read_bin, read_safetensors_header, shards_of, write_index
from fastvkd.settings import Settings

RECORD = "unlearning.json"  # in an exported folder: which run made it
MERGED = "merged_adapter.json"  # in a merged folder: what was merged into what, and the base's history
_FICLONE = 0x40049409  # ioctl: let two files share their blocks until one of them is written
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Other copies of the weights in the base folder: they hold the knowledge that was removed, so they stay behind.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
# What fastvkd says of a model, which is not true of one made of it; `history_of` keeps what matters of it.
CERTIFICATE = "certificate.json"
_STATEMENTS = {
    *("README.md", RECORD, CERTIFICATE, "run.json", "metrics.jsonl", "report.json", "report.html"),
    *("results.json", "samples.jsonl", "attacks.json", "attacks.jsonl"),
}
_SKIPPED_FOLDERS = {".git", ".cache"}


@dataclass(frozen=True)
class Exported:
    """What `export` did. `tensors` counts those replaced; `left_out` are files of the base that are not copied: other
    copies of its weights, and what fastvkd stated about it; `reflinked` says whether files share blocks with the base.
    """

    folder: Path
    rewritten_shards: list[str]
    copied_shards: list[str]
    tensors: int
    left_out: list[str]
    reflinked: bool

    @property
    def statements(self) -> list[str]:
        """Of `left_out`, what fastvkd stated about the base."""
        return [name for name in self.left_out if name in _STATEMENTS]


def export(run_dir: Path, to: Path, *, model_card: str, base: Path | None = None) -> Exported:
    """Write the trained model as a folder that `from_pretrained` loads.

    `run_dir` is a run's output folder (its newest checkpoint is taken) or one checkpoint. `base` says where the base
    model lies if it was moved. `model_card` becomes README.md; unlearning.json says which settings made the model
    (`read_record`), and in its `history` which requests the base had met before (`history_of`). What fastvkd stated
    about the base, such as its certificate, is not copied. Whom the run was about stands there as salted hashes
    (`fastvkd.engines.requests`). Weights that training did not change keep the base's exact
    bits, also when the run worked in a coarser dtype than the base is stored in. Peak memory is two copies of the
    largest visual tensor in float32.

    Raises TrainingError for a damaged or missing checkpoint, a folder `to` that is not empty, and a full disk;
    ModelError when the base is not the one that the run started from, or has no tensor for a trained weight.
    """
    checkpoint = run_dir if run_dir.name.startswith("checkpoint-") else find_newest(run_dir)
    if checkpoint is None:
        raise TrainingError(f"{run_dir}: no checkpoint-<step> folder in it; give the output_dir of a training run")
    manifest = verify_checkpoint(checkpoint)
    base = base or Path(manifest["base_model"]["path"])
    refuse_quantised(base)
    if identify_base(base).fingerprint != manifest["base_model"]["fingerprint"]:
        raise ModelError(f"{base}: is not the base model that {checkpoint} was trained from; name that one with --base")
    refuse_filled(to, "--to", "export to a new one")
    if to.resolve().is_relative_to(base.resolve()):
        raise TrainingError(f"{to}: lies inside the base model's folder; export elsewhere")

    with new_folder(to, "--to", f"the base has {_size(base):,} bytes") as folder:
        alpha = float(manifest["settings"].get("lora_alpha", 0))
        exported = _write(checkpoint, base, folder, to, model_card, lora_alpha=alpha)
        kept = ("updates", "settings", "base_model", "forgotten")
        record = {key: manifest[key] for key in kept if key in manifest} | {
            "edited": sorted(lora.adapted(manifest["beside"])),
            "history": history_of(base),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return exported


def read_record(model_folder: Path) -> dict[str, Any] | None:
    """What `export` noted in a model folder: "updates", "settings" of the run, "base_model", "forgotten" (whom, as
    salted hashes), "edited" (the LLM's tensors that its scrub changed) and "history" (see `history_of`; versions before
    had none of these three); None in other folders.

    Raises ModelError when the file is not what `export` writes.
    """
    path = model_folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path, ModelError, "export the run again, or delete the file")
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ModelError(f"{path}: no settings in it; export the run again, or delete the file")
    return record


def history_of(base: Path) -> list[dict[str, Any]]:
    """The records of the runs that made `base`, the first one first, and under "certificate" how each was judged where
    its folder has a certificate; of a merged folder those of what the adapter was merged into; [] of a model that
    fastvkd did not make. Raises ModelError for a damaged record."""
    record = read_record(base)
    if record is None:  # a folder exported from a merged one may have both files, and its own record is the newer
        merged = base / MERGED
        mend = "merge the adapter again"
        found = read_json_object(merged, ModelError, mend).get("history", []) if merged.is_file() else []
        if not isinstance(found, list):
            raise ModelError(f"{merged}: history is no list; {mend}")
        return found
    earlier = record.pop("history", [])
    paper = base / CERTIFICATE
    if paper.is_file():
        record["certificate"] = read_json(paper, ModelError, "judge the model again, or delete the file")
    return [*earlier, record]


def edited_of(model: Path) -> list[str]:
    """The LLM's tensors, by live name, that the scrubs of all runs that made a model folder have changed, sorted.

    Raises ModelError for a damaged record.
    """
    try:
        return sorted({name for record in history_of(model) for name in record.get("edited", ())})
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{model / RECORD}: what it notes of edits cannot be read ({one_line(error, 80)}); export the run again"
        ) from error


def settings_of(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings to judge a model by (splits, thresholds): those of the run in its record, else the defaults."""
    return Settings().to_dict() if record is None else record["settings"]


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights, adapters merged, into its base `model`, loaded whole or as far as they reach.

    Raises TrainingError for a damaged checkpoint, ModelError when `model` lacks one of the weights.
    """
    manifest = verify_checkpoint(checkpoint)
    own = model.state_dict()
    refuse_misfits(checkpoint, {name: list(tensor.shape) for name, tensor in own.items()})
    alpha = float(manifest["settings"].get("lora_alpha", 0))
    weights = sine.merged(lora.merged(load_weights(checkpoint), own.__getitem__, alpha=alpha), own.__getitem__)
    model.load_state_dict(weights, strict=False)


def refuse_misfits(checkpoint: Path, own: Mapping[str, Sequence[int]]) -> None:
    """Raises ModelError where a checkpoint has a weight, or an adapter of one, that does not fit the model whose shapes
    by live name are `own`."""
    trained = trained_shapes(checkpoint)
    adapters: dict[str, tuple[str, ...]] = {**lora.adapted(trained), **sine.modulated(trained)}
    parts = {part for pair in adapters.values() for part in pair}
    mend = "load the base model that the run started from"
    for name in sorted({*adapters, *(name for name in trained if name not in parts)}):
        if name not in own:
            raise ModelError(f"{checkpoint}: the model has no {name}; {mend}")
        shapes, expected = [trained.get(part) for part in adapters.get(name, (name,))], list(own[name])
        if len(shapes) == 2:  # B A of an adapter: (out, r) and (r, in)
            a, b = shapes
            whole = a is not None and b is not None and len(a) == len(b) == 2 and 0 < a[0] == b[1]
            shapes = [[b[0], a[1]] if whole else None]  # type: ignore[index]
        if shapes != [expected]:
            raise ModelError(f"{checkpoint}: what it has of {name} is not of the model's shape {expected}; {mend}")


def _write(checkpoint: Path, base: Path, folder: Path, to: Path, model_card: str, *, lora_alpha: float) -> Exported:
    shards = shards_of(base)
    targets, reflinked = copy_shards(shards, folder)
    headers = {target: read_safetensors_header(target) for target in targets}
    trained_shapes(checkpoint)  # names the file if it is none of weights
    with safe_open(checkpoint / WEIGHTS, "pt") as weights:
        adapters: dict[str, tuple[str, ...]] = {**lora.adapted(weights.keys()), **sine.modulated(weights.keys())}
        parts = {part for pair in adapters.values() for part in pair}
        names = [*(name for name in weights.keys() if name not in parts), *adapters]  # noqa: SIM118 - not a dict
        disk_keys = match_keys(names, {key for header, _ in headers.values() for key in header})
        live_of = {key: name for name, key in disk_keys.items()}
        stored = {
            key: entry["shape"] for header, _ in headers.values() for key, entry in header.items() if "shape" in entry
        }
        refuse_misfits(checkpoint, {name: stored[key] for name, key in disk_keys.items()})
        rewritten: list[str] = []
        copied: list[str] = []
        for shard, target in zip(shards, targets, strict=True):
            header, data_start = headers[target]
            keys = [key for key in header if key in live_of]
            (rewritten if keys else copied).append(target.name)
            if keys:
                with target.open("r+b") as file:
                    for key in keys:
                        name = live_of[key]
                        if name in adapters:
                            own = [weights.get_tensor(part) for part in adapters[name]]
                            original = read_from(file, key, header[key], data_start, shard)
                            trained = _merge(original, own, lora_alpha)
                        else:
                            trained = weights.get_tensor(name)
                        replace_tensor(file, key, header[key], data_start, trained, shard)
                    file.flush()
                    os.fsync(file.fileno())
    left_out = copy_others(base, folder, shards)
    (folder / "README.md").write_text(model_card)
    return Exported(to, rewritten, copied, len(names), left_out, reflinked)


def copy_shards(shards: list[Path], folder: Path) -> tuple[list[Path], bool]:
    """Copies of the weight files in `folder`, `.bin` files as safetensors with an index; and whether all share their
    blocks with the originals."""
    targets: list[Path] = []
    weight_map: dict[str, str] = {}
    reflinked = True
    for shard in shards:
        if shard.suffix != ".bin":
            targets.append(folder / shard.name)
            reflinked &= copy_file(shard, targets[-1])
            continue
        targets.append(folder / shard.with_suffix(".safetensors").name.replace("pytorch_model", "model"))
        tensors = {name: tensor.contiguous().clone() for name, tensor in read_bin(shard).items()}  # none shares memory
        save_file(tensors, targets[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, targets[-1].name)
        reflinked = False
    if len(set(weight_map.values())) > 1:
        write_index(folder, weight_map)
    return targets, reflinked


def copy_others(base: Path, folder: Path, shards: list[Path]) -> list[str]:
    """Copies what else a model folder holds; returns what is left out (`Exported.left_out`)."""
    left_out: list[str] = []
    shard_names = {shard.name for shard in shards}
    for source, relative in _files(base):
        if relative in shard_names:
            continue
        if relative in _STATEMENTS:
            if relative not in ("README.md", RECORD):  # the new model has its own
                left_out.append(relative)
            continue
        if relative.endswith(".bin.index.json") and any(shard.suffix == ".bin" for shard in shards):
            continue  # there is one of safetensors now
        if source.suffix in _WEIGHT_SUFFIXES or relative.endswith(".bin.index.json"):
            left_out.append(relative)
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, target)
    return left_out


def _merge(original: Tensor, parts: list[Tensor], lora_alpha: float) -> Tensor:
    """A weight with what was trained beside it: the two halves of an adapter, or a sine."""
    if len(parts) == 1:
        return sine.modulated_weight(original, *parts)
    a, b = parts
    return lora.merged_weight(original, a, b, alpha=lora_alpha)


def read_from(file: Any, key: str, entry: dict[str, Any], data_start: int, shard: Path) -> Tensor:
    """One tensor of an open shard, as it is stored."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelError(f"{shard}: {key} is stored as {entry['dtype']}; export needs a base in F32, F16 or BF16")
    begin, end = entry["data_offsets"]
    file.seek(data_start + begin)
    return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).view(entry["shape"])


def replace_tensor(file: Any, key: str, entry: dict[str, Any], data_start: int, trained: Tensor, shard: Path) -> None:
    original = read_from(file, key, entry, data_start, shard)
    if trained.shape != original.shape:
        raise ModelError(f"{shard}: {key} has shape {entry['shape']}, the trained weight {list(trained.shape)}")
    stored = trained.to(original.dtype)
    if not torch.isfinite(stored).all():
        raise ModelError(f"{key}: a trained value does not fit the base's {entry['dtype']}; was training stable?")
    # A run in bf16 from an fp16 base starts from rounded weights. A weight that did not move gets its own bits back.
    stored = torch.where(original.to(trained.dtype) == trained, original, stored)
    file.seek(data_start + entry["data_offsets"][0])
    file.write(stored.contiguous().view(torch.uint8).numpy().tobytes())


def match_keys(live_names: list[str], disk_keys: set[str]) -> dict[str, str]:
    """Live parameter name -> key in the base's files, in either spelling.

    Older files say `vision_tower.vision_model.encoder...`, newer ones `model.vision_tower.encoder...` or a mix. Without
    the leading `model.` and the inner `vision_model` both are the same name. `language_model.model.layers...`,
    `model.layers...` and `model.language_model.layers...` are the same from `layers` on. Raises ModelError when a name
    has no key, or more than one.
    """
    by_canonical: dict[str, list[str]] = {}
    for key in sorted(disk_keys):
        by_canonical.setdefault(_canonical(key), []).append(key)
    matched = {}
    for name in live_names:
        keys = by_canonical.get(_canonical(name), [])
        if len(keys) != 1:
            found = f"several: {', '.join(keys)}" if keys else "none"
            raise ModelError(f"{name}: needs exactly one tensor in the base model's files, found {found}")
        matched[name] = keys[0]
    return matched


def _canonical(name: str) -> str:
    parts = name.split(".")
    while parts[0] in ("model", "language_model", "text_model"):
        parts = parts[1:]
    first, *rest = parts
    return ".".join([first, *(part for part in rest if part != "vision_model")])


def copy_file(source: Path, target: Path) -> bool:
    """Copy without passing the data through this process. True if the blocks are shared copy-on-write (a reflink).

    The copy is never a hard or symbolic link: writing to it must not reach the base, even where the base's file is a
    link into a download cache.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return True
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                raise
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= done
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 24)
    return False


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not _SKIPPED_FOLDERS.intersection(relative.parts):
            yield path, relative.as_posix()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path, _ in _files(folder))
