"""The demo's model: transformers' own LLaVA, two million parameters small, and a tokenizer trained on the corpus."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fastvkd.data.wording import description_pairs, question_answer_pairs
from fastvkd.demo.visual_input import VisualInput
from fastvkd.records import Profile


def chat_template(image: str) -> str:
    """LLaVA-1.5's conversation format, in which a processor finds a photo's place by `image`."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
        "{% for item in message['content'] if item['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }} {% endfor %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model; `image_size` and `patch_size` in pixels."""

    image_size: int = 72
    patch_size: int = 12
    vision_width: int = 128
    vision_layers: int = 4
    llm_width: int = 128
    llm_layers: int = 4
    heads: int = 4


# By parameters, in millions; the demo's own is the smallest.
SHAPES = {
    2: Shape(),
    10: Shape(vision_width=256, vision_layers=5, llm_width=256, llm_layers=6, heads=8),
    40: Shape(vision_width=512, vision_layers=5, llm_width=512, llm_layers=7, heads=8),
}


def build_tokenizer(profiles: Iterable[Profile], *special: str, **named: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the questions and answers of `profiles`, with the `special` tokens of an image, some
    of which the processor looks for by name."""
    seen: set[str] = set()
    for profile in profiles:
        for questions in (profile.visual, profile.textual):
            pairs = question_answer_pairs(questions) + description_pairs(questions)
            seen |= {f"USER: \n{q} ASSISTANT: {a}" for q, a in pairs}
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sorted(seen), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
        **({"extra_special_tokens": named} if named else {}),
    )


def build_processor(profiles: Iterable[Profile], shape: Shape) -> LlavaProcessor:
    """A LLaVA processor with a tokenizer of its own."""
    size = {"height": shape.image_size, "width": shape.image_size}
    image_processor = CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(profiles, "<image>"),
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        chat_template=chat_template("<image>"),
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor, shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA of the given shape, float32, in training mode."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=3 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.heads,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            projection_dim=shape.vision_width,
            initializer_factor=1.0,
        ).to_dict(),
        text_config=LlamaConfig(**language_model_sizes(tokenizer, shape)).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
    )
    return ending_answers(LlavaForConditionalGeneration(config), tokenizer)


def language_model_sizes(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> dict[str, Any]:
    """Settings of the LLM, by the names that transformers gives them."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.llm_width,
        "intermediate_size": 3 * shape.llm_width,
        "num_hidden_layers": shape.llm_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }


def ending_answers(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`model`, which now generates greedily and ends where the tokenizer says."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.do_sample = False
    return model


@dataclass(frozen=True)
class Blueprint:
    """What the demo needs to make a model of a family: a processor for a corpus, a random model for the processor, and
    the way in which photos enter the model."""

    name: str
    processor: Callable[[Iterable[Profile], Shape], Any]
    model: Callable[[Any, Shape, int], Any]
    visual_input: type[VisualInput] = VisualInput


LLAVA = Blueprint("llava", build_processor, build_model)
