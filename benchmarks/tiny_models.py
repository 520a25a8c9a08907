"""The demo's model in other families: as small, with the same tokenizer, from transformers' own classes.

A photo of the demo becomes 16 visual tokens where four patches make one, 36 where it enters whole and as a crop.
"""

from collections.abc import Iterable
from typing import Any

import torch
import transformers.models.smolvlm.processing_smolvlm as smolvlm_processing
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from fastvkd.demo.model import (
    LLAVA,
    Blueprint,
    Shape,
    build_tokenizer,
    chat_template,
    ending_answers,
    language_model_sizes,
)
from fastvkd.demo.visual_input import VisualInput
from fastvkd.models.loading import image_only
from fastvkd.records import Profile

# SmolVLM's processor insists on num2words, which it uses for videos only.
smolvlm_processing.num2words = smolvlm_processing.num2words or str

_MERGE = 2  # so many patches a side become one visual token, in the families that merge


class Crops(VisualInput):
    """Photos enter as (N, crops, 3, S, S), and every crop is the whole photo."""

    crops = 1

    def photos_of(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(0, 1)[:: self.crops]  # SmolVLM's processor takes all photos for those of one prompt

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixels[:, None].expand(-1, self.crops, -1, -1, -1)}


class WholeAndCrop(Crops):
    """LLaVA-NeXT and LLaVA-OneVision: tokens of the whole photo, then those of its only crop with `image_newline`s."""

    crops = 2

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        vision = model.config.vision_config
        self.side = vision.image_size // vision.patch_size

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        sizes = torch.tensor([pixels.shape[-2:]]).expand(len(pixels), -1)
        return {**super().inputs(pixels), "image_sizes": sizes}


class Patches(VisualInput):
    """Qwen-VL: one long sequence of patches, those of a visual token side by side, and 3-D positions."""

    def positions_of(self, encoded: Any) -> Any:
        visual = (encoded["input_ids"] == self.image_token_id).int()
        positions, _ = self.model.model.get_rope_index(
            encoded["input_ids"], mm_token_type_ids=visual, image_grid_thw=encoded["image_grid_thw"]
        )
        return positions[:, 0].numpy()

    def photos_of(self, pixel_values: Tensor) -> Tensor:
        patch, frames = self._patch
        grid = pixel_values.view(-1, self.side, self.side, _MERGE, _MERGE, 3, frames, patch, patch)[:, ..., 0, :, :]
        return grid.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(len(grid), 3, *(2 * [self.side * _MERGE * patch]))

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        (patch, frames), count = self._patch, len(pixels)
        grid = pixels.view(count, 3, self.side, _MERGE, patch, self.side, _MERGE, patch)
        grid = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(*(6 * [-1]), frames, -1, -1)
        grids = torch.tensor([[1, _MERGE * self.side, _MERGE * self.side]]).expand(count, -1)
        return {"pixel_values": grid.reshape(-1, 3 * frames * patch * patch), "image_grid_thw": grids}

    @property
    def _patch(self) -> tuple[int, int]:
        vision = self.model.config.vision_config
        return vision.patch_size, vision.temporal_patch_size


def _tower(shape: Shape, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.vision_width,
        "intermediate_size": 3 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.image_size,
        "patch_size": patch,
    }


def _square(shape: Shape) -> dict[str, int]:
    return {"height": shape.image_size, "width": shape.image_size}


def _merged_patch(shape: Shape) -> int:
    """Smaller than LLaVA's, as they are merged."""
    return 3 * shape.patch_size // 4


def _merged_tokens(shape: Shape) -> int:
    return (shape.image_size // _merged_patch(shape) // _MERGE) ** 2


def _whole_patch(shape: Shape) -> int:
    """Larger than LLaVA's, as photos enter twice."""
    return 3 * shape.patch_size // 2


def _random(config: Any, processor: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return ending_answers(AutoModelForImageTextToText.from_config(config), processor.tokenizer)


def _id(processor: Any, token: str) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(token))


def _internvl_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    return image_only(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size=_square(shape), crop_to_patches=True, min_patches=1, max_patches=4),
        build_tokenizer(profiles, *named.values(), **named),
        image_seq_length=_merged_tokens(shape),
        chat_template=chat_template("<IMG_CONTEXT>"),
    )


def _internvl(processor: Any, shape: Shape, seed: int) -> Any:
    vision = _tower(shape, _merged_patch(shape))
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, layer_scale_init_value=1.0).to_dict(),
        text_config=Qwen2Config(**language_model_sizes(processor.tokenizer, shape)).to_dict(),
        image_token_id=_id(processor, "<IMG_CONTEXT>"),
        image_seq_length=_merged_tokens(shape),
        downsample_ratio=1 / _MERGE,
        tie_word_embeddings=False,
    )
    return _random(config, processor, seed)


def _smolvlm_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>"]
    longest = {"longest_edge": shape.image_size}
    return image_only(SmolVLMProcessor)(
        SmolVLMImageProcessorPil(size=longest, max_image_size=longest),
        build_tokenizer(profiles, *special),
        image_seq_len=_merged_tokens(shape),
        chat_template=chat_template("<image>"),
        video_processor=None,
    )


def _smolvlm(processor: Any, shape: Shape, seed: int) -> Any:
    sizes = language_model_sizes(processor.tokenizer, shape)
    config = SmolVLMConfig(
        vision_config=_tower(shape, _merged_patch(shape)),
        text_config=LlamaConfig(**sizes).to_dict(),
        image_token_id=_id(processor, "<image>"),
        scale_factor=_MERGE,
        pad_token_id=sizes["pad_token_id"],
        tie_word_embeddings=False,
    )
    return _random(config, processor, seed)


def _qwen_processor(processor_class: Any, profiles: Iterable[Profile], shape: Shape) -> Any:
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    pixels = shape.image_size**2
    return image_only(processor_class)(
        Qwen2VLImageProcessorPil(
            patch_size=_merged_patch(shape),
            merge_size=_MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": pixels, "longest_edge": pixels},
        ),
        build_tokenizer(profiles, *special),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen(config_class: Any, processor: Any, shape: Shape, seed: int, **vision: Any) -> Any:
    pairs = shape.llm_width // shape.heads // 2  # of rotated dimensions, shared out to time, height and width
    third = pairs // 3
    sections = [pairs - 2 * third, third, third]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    config = config_class(
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "intermediate_size": 3 * shape.vision_width,
            "num_heads": shape.heads,
            "patch_size": _merged_patch(shape),
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": shape.llm_width,
            **vision,
        },
        text_config=language_model_sizes(processor.tokenizer, shape)
        | {"rope_parameters": rope, "head_dim": shape.llm_width // shape.heads},
        image_token_id=_id(processor, "<|image_pad|>"),
        video_token_id=_id(processor, "<|video_pad|>"),
        vision_start_token_id=_id(processor, "<|vision_start|>"),
        vision_end_token_id=_id(processor, "<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return _random(config, processor, seed)


def _qwen2_5_vl_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    return _qwen_processor(Qwen2_5_VLProcessor, profiles, shape)


def _qwen2_5_vl(processor: Any, shape: Shape, seed: int) -> Any:
    # Windows of a quarter of the photo in every block but each second.
    every_second = list(range(1, shape.vision_layers, 2))
    windows = {"window_size": shape.image_size // 2, "fullatt_block_indexes": every_second}
    return _qwen(Qwen2_5_VLConfig, processor, shape, seed, **windows)


def _qwen3_vl_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    return _qwen_processor(Qwen3VLProcessor, profiles, shape)


def _qwen3_vl(processor: Any, shape: Shape, seed: int) -> Any:
    places = (shape.image_size // _merged_patch(shape)) ** 2
    deepstack = {"num_position_embeddings": places, "deepstack_visual_indexes": [0]}
    return _qwen(Qwen3VLConfig, processor, shape, seed, **deepstack)


def _llava_next_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": shape.image_size},
            crop_size=_square(shape),
            image_grid_pinpoints=_pinpoints(shape),
        ),
        build_tokenizer(profiles, "<image>"),
        patch_size=_whole_patch(shape),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )


def _llava_next(processor: Any, shape: Shape, seed: int) -> Any:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            **_tower(shape, _whole_patch(shape)), projection_dim=shape.vision_width
        ).to_dict(),
        text_config=LlamaConfig(**language_model_sizes(processor.tokenizer, shape)).to_dict(),
        image_token_id=_id(processor, "<image>"),
        image_grid_pinpoints=_pinpoints(shape),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _random(config, processor, seed)


def _llava_onevision_processor(profiles: Iterable[Profile], shape: Shape) -> Any:
    processor = image_only(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=_square(shape), image_grid_pinpoints=_pinpoints(shape)),
        build_tokenizer(profiles, "<image>", "<video>"),
        num_image_tokens=(shape.image_size // _whole_patch(shape)) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    processor.patch_size = _whole_patch(shape)
    return processor


def _llava_onevision(processor: Any, shape: Shape, seed: int) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(shape, _whole_patch(shape)), vision_use_head=False).to_dict(),
        text_config=Qwen2Config(**language_model_sizes(processor.tokenizer, shape)).to_dict(),
        image_token_index=_id(processor, "<image>"),
        video_token_index=_id(processor, "<video>"),
        image_grid_pinpoints=_pinpoints(shape),
        tie_word_embeddings=False,
    )
    return _random(config, processor, seed)


def _pinpoints(shape: Shape) -> list[list[int]]:
    return [[shape.image_size, shape.image_size]]


BLUEPRINTS = {
    blueprint.name: blueprint
    for blueprint in (
        LLAVA,
        Blueprint("llava_next", _llava_next_processor, _llava_next, WholeAndCrop),
        Blueprint("llava_onevision", _llava_onevision_processor, _llava_onevision, WholeAndCrop),
        Blueprint("qwen2_5_vl", _qwen2_5_vl_processor, _qwen2_5_vl, Patches),
        Blueprint("qwen3_vl", _qwen3_vl_processor, _qwen3_vl, Patches),
        Blueprint("internvl", _internvl_processor, _internvl),
        Blueprint("smolvlm", _smolvlm_processor, _smolvlm, Crops),
    )
}
