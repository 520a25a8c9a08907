"""Tiny random models and processors of every family, built in code: nothing is downloaded."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "USER : ASSISTANT who is this person ? what does the photo show . A B C D user assistant".split()
LLM = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(*special: str, chat_template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `special` tokens follow <pad>, <s>, </s> and <unk> in the vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *special, *dict.fromkeys(WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = chat_template
    return fast


def clip_tower(**changes) -> CLIPVisionConfig:
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    return CLIPVisionConfig(**(sizes | changes))


def clip_images(size: int = 16) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_center_crop=True
    )


def llava():
    """(config, processor) of a LLaVA-1.5."""
    config = LlavaConfig(
        vision_config=clip_tower(), text_config=LlamaConfig(**LLM), image_token_id=4, vision_feature_layer=-2
    )
    processor = LlavaProcessor(
        clip_images(),
        tokenizer("<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor
