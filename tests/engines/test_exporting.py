"""An exported folder is the base, bit for bit, but for the visual weights that training moved."""

import gc
import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from fastvkd.engines.checkpoints import save_checkpoint
from fastvkd.engines.exporting import copy_file, export, match_keys, read_record
from fastvkd.engines.local import LocalEngine
from fastvkd.engines.manifests import WEIGHTS, read_manifest, write_manifest
from fastvkd.errors import ModelError, TrainingError
from fastvkd.models.folder import identify_base
from fastvkd.reporting.model_card import run_card
from fastvkd.settings import load_settings

OLD = {"model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector."}
OLD |= {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
NEW = {"model.vision_tower.": "model.vision_tower.vision_model."}
LIVE: dict[str, str] = {}


def spelled(name, spelling):
    for live, disk in spelling.items():
        if name.startswith(live):
            return disk + name[len(live) :]
    return name


def tiny_llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    return Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def write_base(folder, spelling, dtype):
    """Save a tiny LLaVA in several shards under the given key spelling, as hub checkpoints come."""
    folder.mkdir(parents=True)
    model = tiny_llava().to(dtype)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    visual = [n for n in state if "vision_tower" in n or "projector" in n]
    language = [n for n in state if n not in visual]
    weight_map = {}
    for shard, part in enumerate([[*visual, language[0]], language[1:12], language[12:]]):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        save_file({spelled(n, spelling): state[n].contiguous() for n in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys((spelled(n, spelling) for n in part), name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "preprocessor_config.json").write_text('{"crop_size": 16}')
    (folder / "pytorch_model.bin").write_bytes(b"the knowledge that was removed")
    (folder / "chat").mkdir()
    (folder / "chat" / "template.jinja").write_text("USER")
    return folder


def train(base, out, dtype, steps=3):
    """A few real steps on the tower and projector, with half of every weight masked. Returns the live model."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    named = [(n, p) for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n]
    model.requires_grad_(False)
    masks = {}
    for name, parameter in named:
        parameter.requires_grad_(True)
        masks[name] = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5
        parameter.register_hook(lambda grad, mask=masks[name]: grad * mask)
    engine = LocalEngine(
        named,
        module=model,
        optim="adamw_8bit",
        learning_rate=3e-3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        warmup_steps=0,
        max_steps=10,
        lr_scheduler_type="constant",
        device=torch.device("cpu"),
    )
    for _ in range(steps):
        engine.backward(logits(model).float().square().mean())
        engine.step()
    save_checkpoint(out, engine, sampler={}, settings={}, base_model=identify_base(base), keep=2)
    return model, masks


def logits(model):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    ids = torch.tensor([[1, 3, 3, 3, 3, 5, 6]] * 2)
    return model(input_ids=ids, pixel_values=pixels).logits


def tensors_of(folder):
    return {k: t for shard in sorted(folder.glob("*.safetensors")) for k, t in load_file(shard).items()}


@pytest.mark.parametrize("spelling", [OLD, NEW, LIVE], ids=["old", "new", "live"])
@pytest.mark.parametrize(
    ("stored", "worked"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_only_trained_weights_differ_from_the_base_and_the_export_computes_what_the_live_model_does(
    tmp_path, spelling, stored, worked
):
    base = write_base(tmp_path / "base", spelling, stored)
    before = {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}
    live, masks = train(base, tmp_path / "run", worked)
    done = export(tmp_path / "run", tmp_path / "merged", model_card="# unlearned\n")

    old, new = tensors_of(base), tensors_of(tmp_path / "merged")
    assert list(old) == list(new)
    moved = 0
    for name in live.state_dict():
        key = spelled(name, spelling)
        same = old[key].reshape(-1).view(torch.uint8) == new[key].reshape(-1).view(torch.uint8)
        same = same.view(*old[key].shape, -1).all(-1)
        if name in masks:
            assert same[~masks[name]].all(), name
            moved += int((~same).sum())
        else:
            assert same.all(), name
    assert moved > 5000
    assert len(done.rewritten_shards) == 1 and len(done.copied_shards) == 2 and done.tensors == len(masks)
    assert {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()} == before

    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=worked)
    tolerance = 0 if stored == worked else 1e-5  # fp16 cannot hold the smallest bf16 values
    torch.testing.assert_close(logits(reloaded), logits(live), rtol=0, atol=tolerance)


def test_all_other_files_come_along_but_stale_weights_do_not(tmp_path):
    base = write_base(tmp_path / "base", OLD, torch.float32)
    train(base, tmp_path / "run", torch.float32, steps=1)
    done = export(tmp_path / "run" / "checkpoint-1", tmp_path / "merged", model_card="# card\n")
    assert done.left_out == ["pytorch_model.bin"]
    merged = {p.relative_to(tmp_path / "merged").as_posix() for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    expected = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert merged == expected - {"pytorch_model.bin"} | {"README.md", "unlearning.json"}
    assert read_record(base) is None
    record = read_record(tmp_path / "merged")
    assert record is not None and record["updates"] == 1
    assert record["base_model"]["fingerprint"] == identify_base(base).fingerprint
    assert (tmp_path / "merged" / "README.md").read_text() == "# card\n"
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_copy_shares_nothing_writable_with_a_linked_cache_file(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(random.Random(0).randbytes(3_000_001))
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    copy_file(link, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert copy.read_bytes() == blob.read_bytes()
    assert not copy.is_symlink() and copy.stat().st_ino != blob.stat().st_ino and copy.stat().st_nlink == 1
    with copy.open("r+b") as file:
        file.write(b"changed")
    assert blob.read_bytes()[:7] != b"changed"


MEASURE = """
import resource, sys
from pathlib import Path
from fastvkd.engines.exporting import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(Path(sys.argv[1]), Path(sys.argv[2]), model_card="")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    base = write_base(tmp_path / "base", OLD, torch.float32)
    train(base, tmp_path / "run", torch.float32, steps=1)
    # 400 MB of language model beside 1 MB of visual weights, as tensors of an extra shard.
    big = {f"language_model.model.extra.{i}": torch.ones(25_000_000) for i in range(4)}
    shard = base / "model-00003-of-00003.safetensors"
    save_file(load_file(shard) | big, shard)
    del big
    gc.collect()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    manifest = read_manifest(checkpoint)
    manifest["base_model"]["fingerprint"] = identify_base(base).fingerprint
    write_manifest(checkpoint, manifest)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "merged")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(child.stdout) < 50e6
    assert (tmp_path / "merged" / shard.name).stat().st_size > 400e6


def test_what_cannot_be_exported_is_refused(tmp_path):
    base = write_base(tmp_path / "base", OLD, torch.float32)
    train(base, tmp_path / "run", torch.float32, steps=1)
    with pytest.raises(TrainingError, match="no checkpoint-<step> folder"):
        export(tmp_path, tmp_path / "merged", model_card="")
    with pytest.raises(TrainingError, match="lies inside the base"):
        export(tmp_path / "run", base / "merged", model_card="")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TrainingError, match="not an empty folder"):
        export(tmp_path / "run", tmp_path / "full", model_card="")
    (base / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ModelError, match="is not the base model that"):
        export(tmp_path / "run", tmp_path / "merged", model_card="")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".unfinished*"))


def test_a_trained_weight_without_its_tensor_in_the_base_is_refused():
    with pytest.raises(ModelError, match=r"model\.visual\.x: needs exactly one tensor.*found none"):
        match_keys(["model.visual.x"], {"visual.y"})
    with pytest.raises(ModelError, match="found several"):
        match_keys(["model.visual.x"], {"visual.x", "model.visual.x"})
    assert match_keys(["model.visual.blocks.0.w"], {"visual.blocks.0.w"}) == {
        "model.visual.blocks.0.w": "visual.blocks.0.w"
    }


def test_what_was_said_of_the_base_is_not_said_of_the_new_model(tmp_path):
    """Its certificate and record become history, with those before; the card tells of them."""
    base, out = tmp_path / "base", tmp_path / "run"
    write_base(base, NEW, torch.float32)
    before = {"updates": 3, "settings": {"data": "request-0"}, "base_model": {"path": "p", "fingerprint": "0"}}
    record = before | {"settings": {"data": "request-1", "forget_split": "forget_5"}, "history": [before]}
    (base / "unlearning.json").write_text(json.dumps(record))
    statements = ["certificate.json", "report.json", "results.json", "attacks.json", "samples.jsonl", "metrics.jsonl"]
    for name in statements:
        (base / name).write_text('{"verdict": "passed"}')
    model = tiny_llava()
    engine = LocalEngine(
        [(name, p) for name, p in model.named_parameters() if "projector" in name],
        module=model,
        optim="adamw_torch",
        learning_rate=1e-3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
        warmup_steps=0,
        max_steps=1,
        lr_scheduler_type="constant",
        device=torch.device("cpu"),
    )
    settings = load_settings(None, {"model_name_or_path": str(base), "data": "request-2"}).to_dict()
    save_checkpoint(out, engine, sampler={}, settings=settings, base_model=identify_base(base), keep=1)
    done = export(out, tmp_path / "new", model_card=run_card(out))
    assert not any((tmp_path / "new" / name).exists() for name in statements)
    assert set(statements) <= set(done.left_out)
    found = read_record(tmp_path / "new")
    assert found is not None and found["settings"]["data"] == "request-2"
    assert [one["settings"]["data"] for one in found["history"]] == ["request-0", "request-1"]
    assert [one.get("certificate") for one in found["history"]] == [None, {"verdict": "passed"}]
    card = (tmp_path / "new" / "README.md").read_text()
    assert "Nobody has evaluated this model yet" in card and "## Certificate" not in card
    assert "| `request-1` | `forget_5` | vkd | 3 | passed |" in card and "| `request-0` |" in card


@pytest.mark.parametrize("kind", ["another shape", "half an adapter", "an adapter that does not fit", "text"])
def test_a_checkpoint_of_other_weights_is_one_line_and_leaves_nothing(tmp_path, kind):
    base = write_base(tmp_path / "base", OLD, torch.float32)
    train(base, tmp_path / "run", torch.float32, steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    weights = load_file(checkpoint / WEIGHTS)
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    if kind == "another shape":
        weights[name] = torch.zeros(3, 3)
    else:
        del weights[name]
        weights[name.removesuffix("weight") + "lora_A"] = torch.zeros(2, 7)
    if kind == "an adapter that does not fit":
        weights[name.removesuffix("weight") + "lora_B"] = torch.zeros(7, 2)
    save_file(weights, checkpoint / WEIGHTS)
    if kind == "text":
        (checkpoint / WEIGHTS).write_text("text")
    manifest = read_manifest(checkpoint)
    manifest["sha256"][WEIGHTS] = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    write_manifest(checkpoint, manifest)
    with pytest.raises((ModelError, TrainingError), match="checkpoint-1") as error:
        export(tmp_path / "run", tmp_path / "merged", model_card="")
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()
