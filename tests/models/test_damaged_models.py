"""Model folders that are damaged, old, or of another kind: completed from config.json, or refused in one line that
names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from fastvkd.cli import main
from fastvkd.data.texts import refuse_marks
from fastvkd.errors import DataError, ModelError
from fastvkd.models.answers import Query, collate_answers, processor_inputs
from fastvkd.models.folder import identify_base, language_model_sha256
from fastvkd.models.foreign import refuse_quantised
from fastvkd.models.loading import load_config, load_model, load_processor
from fastvkd.models.processing import processed, special_tokens, tokens_and_features
from fastvkd.models.prompts import chat_prompt
from fastvkd.models.visual_path import collate_images
from fastvkd.photos import decode_image
from fastvkd.records import Open, Profile, Questions
from fastvkd.unlearning.answers import read_answers

pytestmark = pytest.mark.fault("damaged model")


def edited(source: Path, to: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model folder in which `change` has had a JSON file."""
    shutil.copytree(source, to)
    content = json.loads((to / file).read_text())
    change(content)
    (to / file).write_text(json.dumps(content))
    return to


def refused(folder: Path, match: str) -> None:
    """Every way into a folder names what is wrong with it."""
    for enter in (identify_base, load_model, lambda path: load_model(path, llm_layers=2)):
        with pytest.raises(ModelError, match=match):
            enter(folder)


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "config cut off": ("config.json", lambda old: old[:20], "config.json: not JSON"),
    "config is a list": ("config.json", lambda old: b"[]", "config.json: holds a list and not an object"),
    "config is no UTF-8": ("config.json", lambda old: b'{"a": "\xff"}', "config.json:1: not UTF-8"),
    "index cut off": (SAFE_WEIGHTS_INDEX_NAME, lambda old: b"{", "index.json: not JSON"),
    "index without its map": (SAFE_WEIGHTS_INDEX_NAME, lambda old: b'{"metadata": {}}', "has no weight_map"),
    "index out of the folder": (
        SAFE_WEIGHTS_INDEX_NAME,
        lambda old: b'{"weight_map": {"a": "../secret.safetensors"}}',
        "no file of its own folder",
    ),
    "shard cut off": ("SHARD", lambda old: old[:-5], "truncated .* download it again"),
    "shard of a Git LFS pointer": (
        "SHARD",
        lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n",
        "git lfs pull",
    ),
    "shard that is empty": ("SHARD", lambda old: b"", "truncated or not a safetensors file"),
    "shard with a broken header": ("SHARD", lambda old: old[:9] + b"\xff" + old[10:], "its header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(llava, tmp_path: Path, kind: str) -> None:
    name, change, match = DAMAGE[kind]
    folder = tmp_path / "model"
    shutil.copytree(llava.folder, folder)
    if name == "SHARD":  # one of the vision tower, which every way in reads
        where = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
        name = next(shard for key, shard in where.items() if "vision_tower" in key)
        match = f"{name}.*{match}"
    file = folder / name
    file.write_bytes(change(file.read_bytes()))
    refused(folder, match)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["{", '{"added_tokens": 3, "image_processor": 3}'])
def test_a_damaged_file_of_the_processor_is_named(llava, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(llava.folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(ModelError, match=name if content == "{" else "cannot be read|names no eos_token"):
        load_processor(tmp_path / "model")


FOREIGN = {
    "a LoRA adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}},
        "holds a LoRA adapter of llava-hf/llava-1.5-7b-hf and no model; make one: fastvkd merge",
    ),
    "the original LLaVA": (
        {"config.json": {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}},
        "original LLaVA format.*llava-hf/llava-1.5-7b-hf",
    ),
    "its later name": ({"config.json": {"model_type": "llava_llama"}}, "original LLaVA format"),
    "llama.cpp's": ({"model.gguf": {}}, "model.gguf holds weights for llama.cpp"),
    "a run": ({"checkpoint-3/visual.safetensors": {}}, "checkpoint-3; a run is made a model folder by fastvkd export"),
    "nothing": ({}, "has no config.json"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_another_kind_of_folder_is(tmp_path: Path, kind: str) -> None:
    files, match = FOREIGN[kind]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    refused(tmp_path, match)
    with pytest.raises(ModelError, match=match):
        load_config(tmp_path)


def test_weights_that_are_quantised_already_are_not_trained(llava, tmp_path: Path) -> None:
    told = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = edited(llava.folder, tmp_path / "model", "config.json", lambda config: config.update(told))
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\).*take the original model"):
        refuse_quantised(folder)


OLD: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no patch size": (
        "processor_config.json",
        lambda c: [c.pop("patch_size"), c.pop("vision_feature_select_strategy")],
    ),
    "no class token": ("processor_config.json", lambda c: c.pop("num_additional_image_tokens")),
    "another strategy": ("config.json", lambda c: c.update(vision_feature_select_strategy="full")),
    "no token to pad with": ("tokenizer_config.json", lambda c: c.pop("pad_token")),
}


@pytest.mark.parametrize("kind", OLD)
def test_what_older_folders_leave_out_is_taken_from_config(llava, tmp_path: Path, kind: str) -> None:
    """Photo and answers of unlike length go through the model, so tokens and features agree."""
    folder = edited(llava.folder, tmp_path / "model", *OLD[kind])
    processor, model = load_processor(folder), load_model(folder)
    (image,) = tiny.photos((16, 16))
    batch = collate_answers(processor, [(image, "who ?", "A"), (image, "who ?", "A B C")], (0, 1), (True, False))
    assert torch.isfinite(read_answers(model, batch).log_probabilities()).all()


def test_a_tokenizer_without_an_end_is_refused(llava, tmp_path: Path) -> None:
    folder = edited(llava.folder, tmp_path / "model", "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(ModelError, match=r"tokenizer_config.json names no eos_token"):
        load_processor(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(vision_feature_layer=99), "vision_feature_layer is 99, but the tower has 4 hidden states"),
        (lambda c: c.update(architectures=3, mm_vision_tower="a"), "original LLaVA format"),
        (lambda c: c["text_config"].update(num_attention_heads=0), "its config cannot be read"),
        (lambda c: c["text_config"].update(vocab_size="x"), "its config cannot be read"),
        (lambda c: c["vision_config"].update(patch_size=0), "cannot be loaded"),
        (lambda c: c.update(vision_config=[]), "its config cannot be read"),
    ],
)
def test_a_config_with_values_that_cannot_be(
    llava, tmp_path: Path, change: Callable[[Any], object], match: str
) -> None:
    folder = edited(llava.folder, tmp_path / "model", "config.json", change)
    with pytest.raises(ModelError, match=match):
        load_model(folder)


STRANGE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another image token": ("config.json", lambda c: c.update(image_token_index=1), "disagree on the image token"),
    "fewer words than tokens": (
        "config.json",
        lambda c: c["text_config"].update(vocab_size=8),
        r"token ids up to \d+, but the model's vocabulary \(vocab_size\) has 8",
    ),
    "another size": (
        "processor_config.json",
        lambda c: c["image_processor"].update(crop_size={"height": 24, "width": 24}, size={"height": 24, "width": 24}),
        r"photos of 24 x 24 pixels, the vision tower takes 16 x 16.*preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_processor_of_another_model_is_refused(llava, tmp_path: Path, kind: str) -> None:
    file, change, match = STRANGE[kind]
    with pytest.raises(ModelError, match=match):
        load_processor(edited(llava.folder, tmp_path / "model", file, change))


def test_every_family_fits_its_own_processor(case) -> None:
    """What is completed and checked changes nothing where nothing is missing."""
    processor = load_processor(case.folder)
    (image,) = tiny.photos((16, 16))
    asked = ([(image, tiny.QUESTION, "A")], (0,), (True,))
    one, other = (collate_answers(p, *asked).inputs["input_ids"] for p in (processor, case.processor))
    assert torch.equal(one, other)


def test_tokens_and_features_that_disagree_are_said_in_one_line() -> None:
    with (
        pytest.raises(ModelError, match=r"disagree on the visual tokens .*processor_config.json"),
        tokens_and_features(),
    ):
        raise ValueError("Image features and image tokens do not match, tokens: 140, features: 36864")
    with pytest.raises(ValueError, match="something else"), tokens_and_features():
        raise ValueError("something else")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no images') }}",
        "{{ 'User: ' + messages[0]['content'] }}",
        "{{ messages[0].a.b }}",
        "{% if",
        "",
    ],
)
def test_a_template_that_cannot_be_rendered(llava, tmp_path: Path, template: str) -> None:
    processor = load_processor(llava.folder)
    processor.chat_template = template or "{{ '' }}"
    with pytest.raises(ModelError, match=r"chat template .*use the chat_template.jinja that belongs to this model"):
        chat_prompt(processor, "who ?", image=True)


def encoded(image: Image.Image) -> bytes:
    import io

    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_a_photo_that_the_processor_refuses_is_named() -> None:
    """Qwen-VL takes no photo 400 times as wide as high: wherever it is met, its row is named."""
    config, processor = tiny.qwen2_5_vl()
    thin = decode_image(encoded(Image.new("RGB", (4000, 10))), "forget.jsonl:7 (thin.png)")
    (good,) = tiny.photos((16, 16))
    ways = (
        lambda: collate_answers(processor, [(good, "who ?", "A"), (thin, "who ?", "A")], (0, 1), (True, True)),
        lambda: collate_images(processor, config, [good, thin]),
        lambda: processed(processor.image_processor, images=[thin], return_tensors="pt"),
    )
    for way in ways:
        with pytest.raises(
            DataError, match=r"forget.jsonl:7 \(thin.png\): the model's processor refuses the photo .*400"
        ):
            way()


@pytest.mark.parametrize("augmented", [False, True])
def test_training_names_a_photo_that_the_processor_refuses(tmp_path: Path, augmented: bool, capsys) -> None:
    """Also where what is refused is noise of the photo's size, or a view of it."""
    config, processor = tiny.qwen2_5_vl()
    tiny.randomised(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    for side, size in (("forget", (4000, 10)), ("retain", (16, 16))):
        Image.new("RGB", size, "red").save(data / f"{side}.png")
        line = {"image": f"{side}.png", "entity": side, "question": "who ?", "answer": "A"}
        (data / f"{side}.jsonl").write_text(json.dumps(line) + "\n")
    told = [f"model_name_or_path={tmp_path / 'model'}", f"data={data}", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    told += ["max_steps=1", "per_device_train_batch_size=2", "sites=projector", f"augment={str(augmented).lower()}"]
    assert main(["train", *told]) == 2
    assert "forget.jsonl:1 (forget.png): the model's processor refuses the photo" in capsys.readouterr().err
    assert main(["data", "check", str(data), "--model", str(tmp_path / "model")]) == 2
    assert "problem: " + str(data / "forget.jsonl:1 (forget.png): the model's processor") in capsys.readouterr().out


def test_inputs_that_no_photo_explains_are_a_matter_of_the_model() -> None:
    _, processor = tiny.llava()
    with pytest.raises(ModelError, match="refuses its inputs"):
        processor_inputs(
            processor, [Query("<image> <image> who ?", ()), Query("who ?", ())], [3, 4], torch.device("cpu")
        )  # type: ignore[list-item]


def test_a_special_token_in_a_text_names_its_row() -> None:
    _, processor = tiny.llava()
    marks = special_tokens(processor)
    assert processor.tokenizer.eos_token in marks and processor.image_token in marks
    answer = f"A {processor.tokenizer.eos_token} B"
    texts = Questions(generation=(Open("who ?", answer),))
    refuse_marks([Profile("ann", (), textual=Questions(generation=(Open("who ?", "A"),)), source="a:1")], marks)
    with pytest.raises(DataError, match="a:2: the answer"):
        refuse_marks([Profile("ann", (), textual=texts, source="a:2")], marks)


@pytest.fixture(scope="module")
def pickled(llava, tmp_path_factory) -> SimpleNamespace:
    """The LLaVA with its weights in two `.bin` files."""
    folder = tmp_path_factory.mktemp("bin") / "model"
    shutil.copytree(llava.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {
        key: value for file in sorted(llava.folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2]), 1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return SimpleNamespace(folder=folder, original=llava.folder)


@pytest.mark.parametrize("layers", [None, 2])
def test_weights_in_bin_files_are_read(pickled, layers: int | None) -> None:
    one, other = (load_model(folder, llm_layers=layers).state_dict() for folder in (pickled.folder, pickled.original))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_model_is_the_same_in_bin_files(pickled) -> None:
    assert identify_base(pickled.folder).fingerprint == identify_base(pickled.original).fingerprint
    assert language_model_sha256(pickled.folder) == language_model_sha256(pickled.original)


class _Runs:
    """What a pickle could do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "make", [lambda trace: {"weight": _Runs(trace)}, lambda _: [1, 2], lambda _: {"weight": "text"}]
)
def test_a_bin_file_that_holds_anything_else_is_refused(pickled, tmp_path: Path, make: Callable) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pickled.folder, folder)
    torch.save(make(tmp_path / "was-here"), folder / "pytorch_model-00001-of-00002.bin")
    refused(folder, "pytorch_model-00001-of-00002.bin: .*take safetensors")
    assert not (tmp_path / "was-here").exists()
