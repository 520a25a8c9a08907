"""Checkpoints: exact resume after SIGKILL, damage and wrong bases refused, old ones pruned, only the visual part."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastvkd.engines import checkpoints
from fastvkd.engines.checkpoints import CheckpointWriter, find_latest, load_checkpoint, save_checkpoint
from fastvkd.engines.hashed_files import save_object, save_tensors
from fastvkd.engines.local import LocalEngine
from fastvkd.engines.manifests import MANIFEST, read_manifest, write_manifest
from fastvkd.errors import ModelError, TrainingError
from fastvkd.models.folder import BaseModel, identify_base, local_folder

BASE = BaseModel("base", "f" * 64)


def tiny_engine(dtype=torch.bfloat16, optim="adamw_8bit", hidden=128):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, hidden), nn.LayerNorm(hidden), nn.Dropout(0.1), nn.Linear(hidden, 64)).to(
        dtype
    )
    return LocalEngine(
        list(module.named_parameters()),
        module=module,
        optim=optim,
        learning_rate=1e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        warmup_steps=3,
        max_steps=30,
        lr_scheduler_type="cosine",
        device=torch.device("cpu"),
    )


def train_to(engine, updates):
    # All three global generators take part, so a resume that forgot one would show.
    while engine.updates < updates:
        x = torch.randn(8, 64) * random.random() + float(np.random.rand())  # noqa: NPY002
        module = engine.forward_module
        engine.backward(module(x.to(next(module.parameters()).dtype)).float().square().mean())
        engine.step()


def save(engine, folder, keep=2, base=BASE):
    return save_checkpoint(
        folder, engine, sampler={"at": engine.updates}, settings={"a": 1}, base_model=base, keep=keep
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "lion_8bit", "ademamix_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_from_disk_is_bit_exact(tmp_path, dtype, optim):
    def run(stop_at):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        engine = tiny_engine(dtype, optim)
        train_to(engine, 4)
        if stop_at:
            folder = save(engine, tmp_path)
            random.seed(99)  # whatever happens in between must not matter
            torch.manual_seed(99)
            engine = tiny_engine(dtype, optim)
            resumed = load_checkpoint(folder, engine, base_model=BASE)
            assert (resumed.updates, resumed.sampler, resumed.settings, resumed.notice) == (4, {"at": 4}, {"a": 1}, "")
        train_to(engine, 9)
        return engine.state_dict()["masters"]

    straight, resumed = run(stop_at=False), run(stop_at=True)
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


CHILD = """
import sys, random, torch, numpy as np
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoints import tiny_engine, train_to, save, BASE
from fastvkd.engines.checkpoints import CheckpointWriter, find_latest, load_checkpoint
out, writer = Path(sys.argv[1]), CheckpointWriter()
random.seed(1); np.random.seed(1)
engine = tiny_engine()
latest = find_latest(out)
if latest: load_checkpoint(latest, engine, base_model=BASE)
while engine.updates < 30:
    train_to(engine, engine.updates + 1)
    if len(sys.argv) > 2:
        writer.save(out, engine, behind=True, keep=2, sampler={{}}, settings={{}}, base_model=BASE)
    else:
        save(engine, out)
    print(engine.updates, flush=True)
writer.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
def test_sigkill_at_random_steps_then_auto_resume_ends_at_the_same_bits(tmp_path, behind):
    command = [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent))]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True)
    how = ["behind"] if behind else []
    kills = random.Random(7)
    for _ in range(2):
        killed = [*command, str(tmp_path / "killed"), *how]
        with subprocess.Popen(killed, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(kills.randrange(3, 9)):
                child.stdout.readline()
            os.kill(child.pid, signal.SIGKILL)
    assert 0 < int(find_latest(tmp_path / "killed").name[11:]) < 30
    subprocess.run([*command, str(tmp_path / "killed"), *how], check=True, capture_output=True)
    for file in (checkpoints.WEIGHTS, checkpoints.MASTERS):
        a, b = (load_file(tmp_path / run / "checkpoint-30" / file) for run in ("straight", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["checkpoint-29", "checkpoint-30"]


def test_a_kill_while_writing_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    engine = tiny_engine()
    train_to(engine, 1)
    good = save(engine, tmp_path)
    train_to(engine, 2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(engine, tmp_path)
    assert find_latest(tmp_path) == good
    load_checkpoint(good, tiny_engine(), base_model=BASE)
    save(engine, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_files_are_those_of_safetensors_and_hashed_as_they_are_written(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7, 4096).T,
        "c": torch.randn(2500, 1700),
        "s": torch.tensor(1.5),
    }
    for name, content in (("weights", tensors), ("one", {"s": tensors["s"]})):
        found = save_tensors(content, tmp_path / name)
        save_file({n: t.contiguous() for n, t in content.items()}, tmp_path / "theirs")
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs").read_bytes()
        assert found == checkpoints._sha256(tmp_path / name)
    assert save_object({"moments": tensors, 1: "x"}, tmp_path / "object") == checkpoints._sha256(tmp_path / "object")
    again = torch.load(tmp_path / "object", weights_only=True)["moments"]
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


def test_nothing_is_read_back_to_be_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_sha256", None)
    save(tiny_engine(), tmp_path)


def test_a_checkpoint_written_behind_is_that_of_its_moment(tmp_path, monkeypatch):
    """Training goes on while it is written, and nothing of what follows is in it."""
    going_on, publish = threading.Event(), checkpoints._publish
    monkeypatch.setattr(checkpoints, "_publish", lambda *a: (going_on.wait(60), publish(*a)))

    def run(behind):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        engine = tiny_engine()
        train_to(engine, 4)
        about = {"sampler": {"at": 4}, "settings": {"a": 1}, "base_model": BASE}
        with CheckpointWriter() as writer:
            folder = writer.save(tmp_path / str(behind), engine, behind=behind, keep=2, **about)
            if behind:
                train_to(engine, 6)
                assert not folder.exists()
                going_on.set()
                writer.wait()
        return folder

    behind = run(True)
    straight = run(False)
    for file in (checkpoints.WEIGHTS, checkpoints.MASTERS):
        assert (behind / file).read_bytes() == (straight / file).read_bytes()
    parts = [torch.load(folder / "rank-0.pt", weights_only=True) for folder in (behind, straight)]
    assert str(parts[0]) == str(parts[1])
    load_checkpoint(behind, tiny_engine(), base_model=BASE)


def test_what_could_not_be_written_behind_is_an_error_of_the_next_save(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    engine, about = tiny_engine(), {"sampler": {}, "settings": {}, "base_model": BASE}
    with CheckpointWriter() as writer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save_tensors", full)
            writer.save(tmp_path, engine, behind=True, keep=2, **about)
            with pytest.raises(TrainingError, match="no space left on the device; free some"):
                writer.wait()
        assert not list(tmp_path.iterdir())
        writer.wait()  # said once
        assert writer.save(tmp_path, engine, behind=False, keep=2, **about).exists()


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path):
    engine = tiny_engine()
    for updates in (8, 9, 10):
        train_to(engine, updates)
        save(engine, tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}
    assert find_latest(tmp_path).name == "checkpoint-10"
    assert find_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 9])
def test_none_goes_before_there_are_more_than_are_to_be_kept(tmp_path, keep):
    engine = tiny_engine()
    for updates in range(1, 7):
        train_to(engine, updates)
        save(engine, tmp_path, keep=keep)
        newest = range(max(1, updates - keep + 1), updates + 1)
        assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{number}" for number in newest}


def test_a_kill_while_old_ones_are_deleted_leaves_no_half_of_one(tmp_path, monkeypatch):
    engine = tiny_engine()
    for updates in (1, 2):
        train_to(engine, updates)
        save(engine, tmp_path, keep=2)
    train_to(engine, 3)

    def killed(folder, *_, **__):
        (Path(folder) / checkpoints.WEIGHTS).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(engine, tmp_path, keep=2)
    for folder in tmp_path.glob("checkpoint-*"):
        checkpoints.verify_checkpoint(folder)
    assert find_latest(tmp_path).name == "checkpoint-3"
    train_to(engine, 4)
    save(engine, tmp_path, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("file", ["visual.safetensors", "masters.safetensors", "rank-0.pt"])
def test_one_flipped_bit_is_found(tmp_path, file):
    engine = tiny_engine()
    folder = save(engine, tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(TrainingError, match=rf"{file}: damaged.*delete the folder checkpoint-0"):
        load_checkpoint(folder, engine, base_model=BASE)
    (folder / file).unlink()
    with pytest.raises(TrainingError, match=f"{file}: missing"):
        load_checkpoint(folder, engine, base_model=BASE)


def test_one_flipped_bit_of_the_manifest_is_found(tmp_path):
    folder = save(tiny_engine(), tmp_path)
    file, whole = folder / MANIFEST, read_manifest(folder)
    content = file.read_bytes()
    for place in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            found = read_manifest(folder)
        except TrainingError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert found == whole, flipped.decode()


def without_digest(folder):
    """The manifest as the version before wrote it, whose mistakes no digest finds."""
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": 1}
    manifest.pop("digest", None)
    return manifest


def test_a_manifest_of_the_version_before_is_read(tmp_path):
    folder = save(tiny_engine(), tmp_path)
    whole = read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(without_digest(folder)))
    assert read_manifest(folder) == whole | {"format": 1}
    load_checkpoint(folder, tiny_engine(), base_model=BASE)
    (folder / MANIFEST).write_text(json.dumps(without_digest(folder) | {"format": 2}))
    with pytest.raises(TrainingError, match="its digest differs"):
        read_manifest(folder)


WRONG = [
    *(
        ({key: None}, f"has no {key}")
        for key in ("updates", "world_size", "sampler", "settings", "base_model", "sha256")
    ),
    ({"updates": "4"}, "updates is not a whole number"),
    ({"updates": True}, "updates is not a whole number"),
    ({"updates": -1}, "updates is -1, less than 0"),
    ({"world_size": 0}, "world_size is 0, less than 1"),
    ({"world_size": 10**30}, "has no SHA-256 of rank-1.pt"),
    ({"settings": []}, "settings is not an object"),
    ({"settings": {"lora_alpha": "x"}}, "settings.lora_alpha is not a number"),
    ({"base_model": {"path": "x"}}, "base_model has no text fingerprint"),
    ({"base_model": {"path": 3, "fingerprint": "x"}}, "base_model has no text path"),
    ({"sha256": {"../x": "0"}}, "which is no file of its own folder"),
    ({"sha256": {"rank-0.pt": "0" * 64}}, "has no SHA-256 of visual.safetensors"),
    ({"sha256": {"visual.safetensors": 1, "rank-0.pt": "0"}}, "has no SHA-256 of visual.safetensors"),
    ({"watch": 3}, "watch is not an object"),
    ({"beside": [3]}, "beside is not a list of names"),
    ({"forgotten": []}, "forgotten is not an object"),
    ({"format": 3}, "format 3, this version reads 1 and 2"),
    ({"format": True}, "format True, this version reads 1 and 2"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_what_a_manifest_must_say_is_asked_where_it_is_read(tmp_path, change, said):
    folder = save(tiny_engine(), tmp_path)
    manifest = without_digest(folder) | change
    (folder / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))
    for read in (read_manifest, lambda folder: load_checkpoint(folder, tiny_engine(), base_model=BASE)):
        with pytest.raises(TrainingError) as error:
            read(folder)
        assert str(error.value).startswith(f"{folder / MANIFEST}: ") and said in str(error.value)


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    folder = save(tiny_engine(torch.float32), tmp_path)
    assert not (folder / checkpoints.MASTERS).exists()
    save_tensors({"0.weight": torch.zeros(128, 64)}, folder / checkpoints.MASTERS)
    engine = tiny_engine(torch.float32)
    load_checkpoint(folder, engine, base_model=BASE)
    assert engine.weights()["0.weight"].any()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(TrainingError, match="no space left on the device; free some") as error:
        save(tiny_engine(), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_other_world_size_restores_weights_and_masters_and_says_that_moments_are_reset(tmp_path):
    engine = tiny_engine()
    train_to(engine, 3)
    folder = save(engine, tmp_path)
    part = torch.load(folder / "rank-0.pt", weights_only=True)
    part["engine"] |= {"layout": "zero2", "world_size": 2}
    torch.save(part, folder / "rank-0.pt")
    manifest = read_manifest(folder)
    manifest["world_size"] = 2
    manifest["sha256"] |= {f"rank-{rank}.pt": checkpoints._sha256(folder / "rank-0.pt") for rank in range(2)}
    shutil.copy(folder / "rank-0.pt", folder / "rank-1.pt")
    write_manifest(folder, manifest)
    other = tiny_engine()
    notice = load_checkpoint(folder, other, base_model=BASE).notice
    assert "2 rank(s)" in notice and "moments start from zero" in notice
    assert other.updates == 3 and not other.state_dict()["moments"]
    masters = other.state_dict()["masters"]
    assert all(torch.equal(masters[n], m) for n, m in engine.state_dict()["masters"].items())


def test_checkpoint_size_is_the_visual_part_only(tmp_path):
    sizes = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        engine = tiny_engine(optim=optim, hidden=4096)
        train_to(engine, 1)
        sizes[optim] = checkpoints.bytes_per_trainable_parameter(save(engine, tmp_path / optim))
    # bf16 weight + float32 master + moments
    assert sizes["adamw_torch"] == pytest.approx(2 + 4 + 8, rel=0.02)
    assert sizes["adamw_8bit"] == pytest.approx(2 + 4 + 2 + 8 / 256, rel=0.03)


def write_model(folder, seed=0, shards=1, change=None):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava", "hidden": 8}')
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(4)}
    if change:
        tensors[change][0, 0] += 1
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = names[shard::shards]
        save_file({n: tensors[n] for n in part}, folder / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_fingerprint_knows_a_model_by_its_weights_not_by_its_files(tmp_path):
    original = identify_base(write_model(tmp_path / "a")).fingerprint
    assert identify_base(write_model(tmp_path / "b", shards=2)).fingerprint == original
    assert identify_base(write_model(tmp_path / "c", seed=1)).fingerprint != original
    assert identify_base(write_model(tmp_path / "d", change="layer.2.weight")).fingerprint != original
    (tmp_path / "a" / "config.json").write_text('{"hidden": 9}')
    assert identify_base(tmp_path / "a").fingerprint != original


def test_a_wrong_base_model_is_refused(tmp_path):
    engine = tiny_engine()
    base = identify_base(write_model(tmp_path / "a"))
    folder = save(engine, tmp_path / "run", base=base)
    load_checkpoint(folder, engine, base_model=base)
    with pytest.raises(TrainingError, match="give the original as model_name_or_path"):
        load_checkpoint(folder, engine, base_model=identify_base(write_model(tmp_path / "b", seed=1)))


def test_a_model_is_a_folder_or_a_hub_id(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="/no/such/folder: neither a folder nor a hub id"):
        local_folder("/no/such/folder")


def test_folders_that_are_no_model_or_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        identify_base(tmp_path)
    model = write_model(tmp_path / "m", shards=2)
    (model / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no file model-1\.safetensors"):
        identify_base(model)
    (model / "model-1.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        identify_base(model)
    with pytest.raises(TrainingError, match="not a checkpoint"):
        load_checkpoint(tmp_path, tiny_engine(), base_model=BASE)


def replaced(folder, name, content):
    """Another file in a checkpoint, with the right hash: only its content can tell."""
    (folder / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, folder / name)
    manifest = read_manifest(folder)
    manifest["sha256"][name] = checkpoints._sha256(folder / name)
    write_manifest(folder, manifest)


def part_with(folder, **changes):
    part = torch.load(folder / "rank-0.pt", weights_only=True)
    return part | {key: part[key] | change if isinstance(change, dict) else change for key, change in changes.items()}


OTHER_PARTS = {
    "a list": lambda folder: [1, 2],
    "a tensor": lambda folder: torch.zeros(3),
    "no pickle": lambda folder: b"text",
    "a pickle that ends early": lambda folder: (folder / "rank-0.pt").read_bytes()[:-300],
    "nothing": lambda folder: {},
    "an engine that is a list": lambda folder: part_with(folder, engine=[]),
    "no names": lambda folder: part_with(folder, engine={"names": None}),
    "names that are numbers": lambda folder: part_with(folder, engine={"names": [1, 2]}),
    "updates that are a text": lambda folder: part_with(folder, engine={"updates": "4"}),
    "moments that are a list": lambda folder: part_with(folder, engine={"moments": [1]}),
    "random states that are a text": lambda folder: part_with(folder, rng="x"),
    "a random state that is a number": lambda folder: part_with(folder, rng={"python": 3}),
    "torch's random state of another size": lambda folder: part_with(folder, rng={"torch": torch.zeros(3)}),
    "NumPy's random state cut": lambda folder: part_with(folder, rng={"numpy": ("MT19937",)}),
}


@pytest.mark.parametrize("kind", OTHER_PARTS)
def test_a_rank_file_of_another_kind_is_one_line(tmp_path, kind):
    folder = save(tiny_engine(), tmp_path)
    replaced(folder, "rank-0.pt", OTHER_PARTS[kind](folder))
    with pytest.raises(TrainingError, match=r"rank-0\.pt: .*delete the folder checkpoint-0") as error:
        load_checkpoint(folder, tiny_engine(), base_model=BASE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["visual.safetensors", "masters.safetensors"])
@pytest.mark.parametrize("kind", ["text", "other names", "another shape", "a shape that would be spread"])
def test_weights_of_another_kind_are_one_line(tmp_path, file, kind):
    folder = save(tiny_engine(), tmp_path)
    weights = load_file(folder / file)
    name = next(iter(weights))
    if kind == "other names" and file == checkpoints.WEIGHTS:
        weights["other"] = weights.pop(name)
    elif kind == "other names":
        weights["other"] = weights[name].clone()
    elif kind == "another shape":
        weights[name] = torch.zeros(3, 3)
    else:
        weights[name] = weights[name].reshape(-1)[:1]
    save_file(weights, tmp_path / "new")
    replaced(folder, file, b"text" if kind == "text" else (tmp_path / "new").read_bytes())
    if kind == "other names" and file == checkpoints.WEIGHTS:  # the master stands in for the weight that is not there
        replaced(folder, checkpoints.MASTERS, (tmp_path / "new").read_bytes())
    with pytest.raises(TrainingError, match=r"\.safetensors") as error:
        load_checkpoint(folder, tiny_engine(), base_model=BASE)
    assert "\n" not in str(error.value)
