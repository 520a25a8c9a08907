"""Truncated loading reads only what it needs, knows old and new tensor names, and fails in one line."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, PreTrainedModel
from transformers.image_processing_backends import PilBackend

from fastvkd.cli import main
from fastvkd.data.check import check_data
from fastvkd.errors import ModelError
from fastvkd.models import families, loading
from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import VISUAL_KEY, load_config, load_model, load_processor
from fastvkd.models.visual_path import VisualPath, collate_images
from fastvkd.planning.architecture import architecture_of

INDEX = "model.safetensors.index.json"


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def features(model, case, site):
    return VisualPath(model, [site])(collate_images(case.processor, case.config, tiny.photos((20, 20))))[
        site
    ].gathered()


def is_above(name: str, layers: int) -> bool:
    """Whether a tensor of the tiny LLaVA serves only what comes after `layers` decoder layers."""
    found = re.search(r"language_model\.(?:model\.)?layers\.(\d+)", name)
    return int(found[1]) >= layers if found else "lm_head" in name or name.endswith("language_model.norm.weight")


@pytest.mark.parametrize("how", ["removed", "corrupted"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_shards_that_hold_only_layers_above_are_never_opened(llava, tmp_path, layers, how):
    folder = copied(llava.folder, tmp_path)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    wanted = {file for name, file in weight_map.items() if not is_above(name, layers)}
    unwanted = set(weight_map.values()) - wanted
    assert len(unwanted) >= 2, "no shard holds upper layers alone: the test would prove nothing"
    for file in unwanted:
        (folder / file).unlink() if how == "removed" else (folder / file).write_bytes(b"not a safetensors file")
    found = features(load_model(folder, llm_layers=layers), llava, f"llm:{layers}")
    assert torch.equal(found, features(llava.model, llava, f"llm:{layers}"))
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_nothing_above_is_built(llava):
    full = dict(llava.model.named_parameters())
    for layers in range(tiny.DEPTH + 1):
        model = load_model(llava.folder, llm_layers=layers)
        found = dict(model.named_parameters())
        assert set(found) == {name for name in full if not is_above(name, layers)}
        assert all(torch.equal(found[name], full[name]) for name in found)
        assert type(model) is type(llava.model) and not model.training
        assert model.config.text_config.num_hidden_layers == layers
    assert llava.config.text_config.num_hidden_layers == tiny.DEPTH


def test_a_truncated_model_can_be_copied_and_moved(llava):
    """A teacher is a copy of the student; nothing in the copy points back at the original."""
    model = load_model(llava.folder, llm_layers=1)
    twin = copy.deepcopy(model).to(torch.float64)
    assert {p.dtype for p in twin.parameters()} == {torch.float64} and model.dtype == torch.float32
    assert (features(twin, llava, "llm:1") - features(model, llava, "llm:1")).abs().max() < 1e-5
    assert list(model.state_dict()) == [name for name in llava.model.state_dict() if not is_above(name, 1)]


def test_a_single_file_serves_as_well(case):
    model = load_model(case.folder, llm_layers=1)
    full = dict(case.model.named_parameters())
    assert all(torch.equal(p, full[name]) for name, p in model.named_parameters())
    assert not any(
        "lm_head" in name or ".layers.1." in name for name, p in model.named_parameters() if "vis" not in name
    )


def test_the_whole_model_is_loaded_unchanged(case):
    model = load_model(case.folder)
    full = dict(case.model.named_parameters())
    assert set(dict(model.named_parameters())) == set(full)
    assert all(torch.equal(p, full[name]) for name, p in model.named_parameters())


def test_dtype_and_attention_are_passed_on(llava):
    model = load_model(llava.folder, llm_layers=1, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.config._attn_implementation == "eager"
    assert features(model, llava, "llm:1").dtype == torch.bfloat16


def test_tensor_names_of_older_releases_are_known(llava, tmp_path):
    """The spelling of checkpoints that have been on the hub since 2023."""
    folder = copied(llava.folder, tmp_path)
    old = {}
    for name, tensor in llava.model.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.").replace("lm_head", "language_model.lm_head")
        old[name] = tensor.clone()
    assert "language_model.model.layers.3.mlp.up_proj.weight" in old and "language_model.lm_head.weight" in old
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    for layers in (0, 2, None):
        model = load_model(folder, llm_layers=layers)
        site = f"llm:{layers or 0}"
        assert torch.equal(features(model, llava, site), features(llava.model, llava, site))


@pytest.mark.parametrize("layers", [2, None])
def test_a_missing_tensor_is_an_error_and_no_random_weight(llava, tmp_path, layers):
    folder = copied(llava.folder, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    name = next(key for key in index["weight_map"] if key.endswith("layers.1.mlp.fc1.weight"))
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 tensors are missing, first '.*fc1.weight'"):
        load_model(folder, llm_layers=layers)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_shard_is_named(llava, tmp_path):
    folder = copied(llava.folder, tmp_path)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = next(file for name, file in weight_map.items() if name.endswith("multi_modal_projector.linear_1.weight"))
    (folder / shard).unlink()
    with pytest.raises(ModelError) as error:
        load_model(folder, llm_layers=1)
    assert shard in one_line(error)


def test_bad_folders_are_errors_of_one_line(llava, tmp_path):
    with pytest.raises(ModelError) as error:
        load_model(tmp_path / "nowhere")
    assert "nowhere" in one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_processor(tmp_path / "empty")
    folder = copied(llava.folder, tmp_path)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError) as error:
        load_config(folder)
    one_line(error)
    (folder / "config.json").write_text('{"model_type": "lava"}')
    with pytest.raises(ModelError, match="did you mean 'llava'") as error:
        load_model(folder)
    one_line(error)


def test_weights_without_safetensors_cannot_be_truncated(llava, tmp_path):
    folder = copied(llava.folder, tmp_path)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        load_model(folder, llm_layers=1)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder, llm_layers=1)


@pytest.mark.parametrize("layers", [-1, tiny.DEPTH + 1])
def test_llm_layers_out_of_range(llava, layers):
    with pytest.raises(ModelError, match=f"allowed are 0 to {tiny.DEPTH}"):
        load_model(llava.folder, llm_layers=layers)


def test_a_processor_survives_saving(case):
    """Also without torchvision, for families whose processor would like to treat videos too."""
    processor = load_processor(case.folder)
    images = tiny.photos((24, 20), (40, 20))
    saved, loaded = (collate_images(p, case.config, images).inputs for p in (case.processor, processor))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_a_folder_without_processor_says_so(llava, tmp_path):
    folder = copied(llava.folder, tmp_path)
    for file in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / file).unlink()
    with pytest.raises(ModelError, match="processor"):
        load_processor(folder)


@pytest.mark.parametrize("layers", [2, None])
def test_under_zero3_no_device_map_is_asked_for_and_buffers_are_moved(llava, monkeypatch, layers):
    """transformers raises for a device map then. The device `meta` stands in for a GPU."""
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def as_with_zero3(cls, *args, device_map=None, **kwargs):
        if device_map is not None:
            raise ValueError("DeepSpeed Zero-3 is not compatible with passing a `device_map`.")
        return from_pretrained(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(as_with_zero3))
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    model = load_model(llava.folder, llm_layers=layers, device="meta")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}  # DeepSpeed's affair


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantising_a_whole_model_rounds_the_matrices_of_its_llm_alone(case, kind):
    model = load_model(case.folder, quantize_llm=kind)
    decoder = set(map(id, families.language_model(model, family_of(model)).modules()))
    linear = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    rounded = {id(m) in decoder: type(m).__name__ == linear for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert rounded == {True: True, False: False}
    full = dict(case.model.named_parameters())
    visual = [(name, p) for name, p in model.named_parameters() if VISUAL_KEY.search(name)]
    assert visual and all(torch.equal(p, full[name]) for name, p in visual)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantising_leaves_the_visual_part_alone(llava, kind, avx512bf16):
    model = load_model(llava.folder, llm_layers=2, quantize_llm=kind)
    linear = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "Linear" in type(m).__name__}
    assert kinds and all((kind == linear) == ("language_model" in name) for name, kind in kinds.items())
    full = dict(llava.model.named_parameters())
    chosen = visual_parameters(model, family_of(model), "vision+projector")
    assert all(torch.equal(p, full[name]) for name, p in chosen)
    train_only(model, [p for _, p in chosen])
    with torch.no_grad():  # as a teacher looks first
        seen = features(model, llava, "llm:2")
    found, exact = features(model, llava, "llm:2"), features(llava.model, llava, "llm:2")
    assert torch.equal(found, seen)
    assert 0 < (found - exact).abs().mean() < 0.2 * exact.std()
    found.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in chosen)


def test_an_unknown_quantisation_is_refused(llava):
    with pytest.raises(ModelError, match="nf4"):
        load_model(llava.folder, quantize_llm="int3")


def test_images_are_resized_by_pillow_whatever_is_installed(llava, monkeypatch):
    tokenizer = load_processor(llava.folder).tokenizer
    other = SimpleNamespace(image_processor=object(), tokenizer=tokenizer)  # as of torchvision
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda path: other)
    found = load_processor(llava.folder)
    assert found.tokenizer is tokenizer and isinstance(found.image_processor, PilBackend)


@pytest.mark.parametrize(("max_pixels", "tokens"), [(None, [48, 25]), (1024, [12, 16]), (256, [2, 4])])
def test_max_pixels_limit_the_visual_tokens_of_a_photo(tmp_path, max_pixels, tokens):
    config, processor = tiny.qwen2_5_vl()
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    limited = load_processor(tmp_path, max_pixels=max_pixels)
    batch = collate_images(limited, config, tiny.photos((64, 48), (40, 40)))
    assert batch.token_images.bincount().tolist() == tokens
    # so the teacher's cache, which is named by this text, is another one
    text = processor.image_processor.to_json_string()
    assert (limited.image_processor.to_json_string() == text) == (max_pixels is None)
    largest = architecture_of(config.to_dict(), max_pixels=max_pixels or 64 * 16 * 16).visual_tokens
    assert largest >= max(tokens) and (max_pixels is None or largest * 64 <= max_pixels)


def test_max_pixels_are_refused_where_they_mean_nothing(llava, tmp_path):
    with pytest.raises(ModelError, match="max_pixels=4096 is for Qwen-VL"):
        load_processor(llava.folder, max_pixels=4096)
    config, processor = tiny.qwen2_5_vl()
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="one visual token shows 64 pixels"):
        load_processor(tmp_path, max_pixels=63)


def test_data_check_names_the_photo_with_the_most_visual_tokens(tmp_path, capsys):
    config, processor = tiny.qwen2_5_vl()
    model, data = tmp_path / "model", tmp_path / "data"
    config.save_pretrained(model)
    processor.save_pretrained(model)
    data.mkdir()
    for side, (image,) in (("forget", tiny.photos((16, 16))), ("retain", tiny.photos((96, 64)))):
        image.save(data / f"{side}.png")
        row = {"image": f"{side}.png", "entity": side, "question": "who is this person ?", "answer": "A"}
        (data / f"{side}.jsonl").write_text(json.dumps(row) + "\n")

    def most(**told) -> str:
        return next(note for note in check_data(data, model=str(model), **told).notes if "most" in note)

    assert "retain.jsonl:1" in most() and most().endswith("the one with the most visual tokens, 96")
    assert most(max_pixels=1024).endswith("tokens, 12")
    main(["data", "check", str(data), "--model", str(model), "--max-pixels", "1024"])
    assert "most visual tokens, 12" in capsys.readouterr().out


def test_what_is_quantised_already_is_not_quantised_again(llava, tmp_path):
    folder = copied(llava.folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already"):
        load_model(folder, quantize_llm="nf4")
