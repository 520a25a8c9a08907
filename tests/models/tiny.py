"""Tiny random models and processors of every family, built in code: nothing is downloaded.

`BUILDERS[model_type]()` gives (config, processor); `PLACES[model_type]` says where the model keeps its parts, written
down a second time so that the tests do not believe the table they test.
"""

import io
from types import SimpleNamespace

import numpy as np
import torch
import transformers.models.smolvlm.processing_smolvlm as smolvlm_processing
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from fastvkd.models.loading import image_only
from fastvkd.records import Photo

DEPTH, TOWER_DEPTH, SIDE, PATCH = 4, 3, 16, 4
QUESTION, ANSWER = "who is this person ?", " A B C"
_WORDS = f"USER ASSISTANT user assistant : . , \n {QUESTION} {ANSWER} answer en the photo".split(" ")
_LLM = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": TOWER_DEPTH,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SQUARE = {"height": SIDE, "width": SIDE}
_GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def places(blocks="vision_tower.encoder.layers", llm="language_model", projector="multi_modal_projector"):
    return SimpleNamespace(blocks=blocks, llm=llm, projector=projector)


PLACES = {
    "llava": places(),
    "llava_next": places(),
    "llava_onevision": places(),
    "qwen2_vl": places("visual.blocks", projector="visual.merger"),
    "qwen2_5_vl": places("visual.blocks", projector="visual.merger"),
    "qwen3_vl": places("visual.blocks", projector="visual.merger"),
    "internvl": places("vision_tower.encoder.layer"),
    "idefics3": places("vision_model.encoder.layers", "text_model", "connector"),
    "smolvlm": places("vision_model.encoder.layers", "text_model", "connector"),
    "gemma3": places(),
    "paligemma": places(),
}


def template(image: str) -> str:
    """A chat template in the manner of the Qwen and LLaVA ones: image first, then the question."""
    return (
        "{% for m in messages %}{{ '<s>' + m['role'] + ' : ' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}"
    )


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; the `special` tokens get the ids 4, 5, ... behind <pad>, <s>, </s> and <unk>."""
    words = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *special, *_WORDS]))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    fast.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in special]})
    return fast


def llava(feature_layer=-2, **text):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**(_LLM | text)),
        image_token_id=4,
        vision_feature_layer=feature_layer,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE)
    processor = LlavaProcessor(
        images,
        tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def llava_next():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**_LLM),
        image_token_id=4,
        image_grid_pinpoints=_GRID,
        vision_feature_layer=-2,
    )
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE, image_grid_pinpoints=_GRID)
    processor = LlavaNextProcessor(
        images,
        tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return config, processor


def llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=Qwen2Config(**_LLM),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=_GRID,
    )
    processor = image_only(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_GRID),
        tokenizer("<image>", "<video>"),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    processor.patch_size = PATCH
    return config, processor


def _qwen(config_class, processor_class, vision, patch=PATCH):
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    config = config_class(
        vision_config={
            "depth": TOWER_DEPTH,
            "num_heads": 2,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        text_config=_LLM | {"rope_parameters": _MROPE, "tie_word_embeddings": False},
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE},
    )
    processor = image_only(processor_class)(
        images, tokenizer(*special), chat_template=template("<|vision_start|><|image_pad|><|vision_end|>")
    )
    return config, processor


def qwen2_vl():
    return _qwen(Qwen2VLConfig, Qwen2VLProcessor, {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2})


def qwen2_5_vl():
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "window_size": 4 * PATCH,  # windows smaller than the image, so that patches really change places
        "fullatt_block_indexes": [1],
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLProcessor, vision)


def qwen3_vl():
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen(Qwen3VLConfig, Qwen3VLProcessor, vision)


def internvl():
    config = InternVLConfig(
        vision_config=_TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=Qwen2Config(**_LLM),
        image_token_id=4,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    processor = image_only(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer(*named.values(), **named),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    return config, processor


def _idefics(config_class, processor_class, images_class, **processors):
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>"]
    special += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    config = config_class(
        vision_config=_TOWER, text_config=LlamaConfig(**_LLM), image_token_id=4, scale_factor=2, pad_token_id=0
    )
    images = images_class(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return config, processor_class(
        images, tokenizer(*special), image_seq_len=4, chat_template=template("<image>"), **processors
    )


def idefics3():
    return _idefics(Idefics3Config, Idefics3Processor, Idefics3ImageProcessorPil)


def smolvlm():
    # the processor insists on num2words, which it uses for videos only
    smolvlm_processing.num2words = smolvlm_processing.num2words or str
    return _idefics(SmolVLMConfig, image_only(SmolVLMProcessor), SmolVLMImageProcessorPil, video_processor=None)


def gemma3():
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False),
        # sliding and full layers, and a window smaller than the image
        text_config=_LLM
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3, "query_pre_attn_scalar": 8},
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
        mm_tokens_per_image=4,
    )
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=_SQUARE),
        tokenizer(*named.values(), **named),
        chat_template=template("<start_of_image>"),
        image_seq_length=4,
    )
    return config, processor


def paligemma():
    images = SiglipImageProcessorPil(size=_SQUARE)
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(images, tokenizer("<image>", image_token="<image>"))
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False, projection_dim=32).to_dict(),
        text_config=_LLM | {"model_type": "gemma", "vocab_size": len(processor.tokenizer)},
        image_token_index=4,
        projection_dim=32,
    )
    return config, processor


BUILDERS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
}


def photos(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Random RGB images of these (width, height)s."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def as_photo(image: Image.Image, source: str = "photo") -> Photo:
    """The image as a file would hold it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return Photo(file.getvalue(), source)


def noise(side: int, seed: int) -> Photo:
    """A square photo of random pixels."""
    values = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return as_photo(Image.fromarray(values.numpy()), str(seed))


def randomised(config, seed: int = 0) -> torch.nn.Module:
    """A model whose weights are all random: the usual initialisation leaves features so small that all are equal."""
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def places_in_part_away() -> dict[str, str]:
    """A device_map of the LLaVA with the second layer and the head on disk, as they would be in host memory beside a
    GPU."""
    decoder = "model.language_model"
    here = ["model.vision_tower", "model.multi_modal_projector"]
    here += [f"{decoder}.{name}" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")]
    here += [f"{decoder}.layers.{k}" for k in range(2, DEPTH)]
    return dict.fromkeys(here, "cpu") | dict.fromkeys([f"{decoder}.layers.1", "lm_head"], "disk")
