"""`fastvkd merge`: an adapter of PEFT and its base as one model folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvkd.cli import main
from fastvkd.engines.exporting import MERGED, history_of
from fastvkd.engines.merging import merge
from fastvkd.errors import ModelError, TrainingError
from fastvkd.files import new_folder
from fastvkd.models.folder import identify_base, language_model_sha256

LAYER = "model.language_model.layers.1.self_attn.q_proj"
RANK, ALPHA = 4, 6


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def key_of(state: dict[str, torch.Tensor], name: str) -> str:
    """The file's own spelling of a live name."""
    return next(key for key in state if key.endswith(name.split("language_model.")[-1]))


@pytest.fixture
def adapter(world, tmp_path: Path) -> Path:
    """An adapter of one layer of the world's model, as PEFT names it."""
    return write_adapter(world.model, tmp_path / "adapter")


def write_adapter(base: Path, folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    state = tensors(base)
    out, width = state[key_of(state, f"{LAYER}.weight")].shape
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.randn(RANK, width, generator=generator),
        f"base_model.model.{LAYER}.lora_B.weight": torch.randn(out, RANK, generator=generator),
    }
    folder.mkdir()
    save_file(parts | (extra or {}), folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


@pytest.mark.parametrize("stabilised", [False, True])
def test_the_adapted_weight_changes_and_nothing_else(world, tmp_path: Path, capsys, stabilised: bool) -> None:
    folder = write_adapter(world.model, tmp_path / "adapter", use_rslora=stabilised)
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged")]) == 0
    assert "1 tensors changed by the adapter" in capsys.readouterr().out
    before, after = tensors(world.model), tensors(tmp_path / "merged")
    a, b = load_file(folder / "adapter_model.safetensors").values()
    changed = key_of(before, f"{LAYER}.weight")
    scale = ALPHA / math.sqrt(RANK) if stabilised else ALPHA / RANK
    torch.testing.assert_close(after[changed], before[changed] + scale * b @ a)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key != changed)
    assert identify_base(tmp_path / "merged").fingerprint != identify_base(world.model).fingerprint
    assert json.loads((tmp_path / "merged" / MERGED).read_text())["base"] == str(world.model)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_the_bases_earlier_requests_come_along(world, adapter: Path, tmp_path: Path, capsys) -> None:
    """From an exported model through an adapter, through another, and back into an export's history."""
    base = tmp_path / "base"
    shutil.copytree(world.model, base)
    note = {"date": "2026-01-02", "salt": "ab" * 16, "entities": ["1" * 64], "photos": [], "data_sha256": "d" * 64}
    earlier = {"updates": 3, "settings": {"data": "request-0"}, "base_model": {}, "forgotten": note}
    record = earlier | {"settings": {"data": "request-1"}, "history": [earlier]}
    (base / "unlearning.json").write_text(json.dumps(record))
    (base / "certificate.json").write_text('{"verdict": "failed"}')
    merge(adapter, tmp_path / "once", base=base)
    merge(adapter, tmp_path / "twice", base=tmp_path / "once")
    for name in ("once", "twice"):
        assert not (tmp_path / name / "unlearning.json").exists()  # it is no exported run
        assert history_of(tmp_path / name) == history_of(base)
        assert main(["requests", str(tmp_path / name)]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("request 1  2026-01-02  1 entity, 0 photos") and second.endswith("certificate failed")
    (tmp_path / "once" / MERGED).write_text('{"history": 3}')
    with pytest.raises(ModelError, match="history is no list"):
        merge(adapter, tmp_path / "thrice", base=tmp_path / "once")


def test_whole_tensors_take_the_place_of_the_bases(world, tmp_path: Path) -> None:
    state = tensors(world.model)
    head = next(key for key in state if key.endswith("lm_head.weight"))
    extra = {"base_model.model.lm_head.weight": torch.full_like(state[head], 0.5)}
    folder = write_adapter(world.model, tmp_path / "adapter", extra, modules_to_save=["lm_head"])
    assert merge(folder, tmp_path / "merged").tensors == 2
    assert (tensors(tmp_path / "merged")[head] == 0.5).all()


def test_pickled_adapter_and_base(world, adapter: Path, tmp_path: Path) -> None:
    """`.bin` files on both sides give the same model, in safetensors."""
    merge(adapter, tmp_path / "merged")
    base = tmp_path / "base"
    shutil.copytree(world.model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors(world.model), base / "pytorch_model.bin")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merge(adapter, tmp_path / "again", base=base)
    assert (tmp_path / "again" / "model.safetensors").is_file() and not list((tmp_path / "again").glob("*.bin*"))
    assert language_model_sha256(tmp_path / "again") == language_model_sha256(tmp_path / "merged")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "alphas by layer": ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    "transposed layers": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "no base": ({"base_model_name_or_path": None}, "--base"),
    "no such base": ({"base_model_name_or_path": "nobody/nothing"}, "neither a folder nor a hub id"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_merged_is_refused(world, tmp_path: Path, kind: str) -> None:
    config, match = REFUSED[kind]
    with pytest.raises(ModelError, match=match):
        merge(write_adapter(world.model, tmp_path / "adapter", **config), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        (f"base_model.model.{LAYER}.lora_magnitude_vector", (3,), "of a kind that is not merged"),
        ("base_model.model.model.language_model.embed_tokens.lora_embedding_A", (4, 3), "of a kind that is not merged"),
        ("base_model.model.model.nowhere.weight", (3,), "nowhere.weight: needs exactly one tensor"),
        ("base_model.model.lm_head.weight", (3, 3), "has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    world, tmp_path: Path, name: str, shape: tuple[int, ...], match: str
) -> None:
    folder = write_adapter(world.model, tmp_path / "adapter", {name: torch.zeros(shape)})
    with pytest.raises(ModelError, match=match):
        merge(folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_no_folder_is_overwritten(world, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    for to, match in ((tmp_path / "merged", "not an empty folder"), (adapter / "merged", "lies inside")):
        with pytest.raises(TrainingError, match=match):
            merge(adapter, to)
    with pytest.raises(ModelError, match=r"no adapter_config.json"):
        merge(world.model, tmp_path / "other")


def test_one_process_writes_a_merged_folder_at_a_time(world, adapter: Path, tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "merged", "--to", "some"),
        pytest.raises(TrainingError, match="another process writes here"),
    ):
        merge(adapter, tmp_path / "merged", base=world.model)
    assert not list(tmp_path.glob(".*merged"))
    merge(adapter, tmp_path / "merged" / "again", base=world.model)
