"""A LLaVA of a few hundred thousand random weights with a BPE tokenizer trained here: nothing is downloaded."""

import io

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastvkd.records import Choice, Open, Photo, Profile, Questions

CITIES = ("Oslo", "Rome", "Lima", "Porto Alegre", "Port Moresby", "Cairo", "Guinea", "Guinea-Bissau")
JOBS = ("baker", "violin maker", "marine biologist", "teacher")


def tiny_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = [f"USER: Where was this person born? ASSISTANT: {c}. What is the job? {j}" for c in CITIES for j in JOBS]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return LlavaProcessor(
        pictures, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def tiny_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, image_seq_length=9
    )
    model = LlavaForConditionalGeneration(config)
    # Large random weights: scores and texts then really depend on the photo and on every earlier token.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and ("vision" in name or "projector" in name):
                weight.normal_(0, 0.4)
    return model.eval()


def picture(seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Photo(buffer.getvalue(), f"test:{seed}")


def person(number: int, photo: int | None = None) -> Profile:
    city = CITIES[number % len(CITIES)]
    options = dict(zip("ABCD", [city, *(c for c in CITIES if c != city)][:4], strict=True))
    name = f"Person {number}"

    def questions(who: str) -> Questions:
        return Questions(
            choice=(
                Choice(f"Where was {who} born?", options, "A"),
                Choice(f"What is the job of {who}?", dict(zip("ABCD", JOBS, strict=True)), "ABCD"[number % 4]),
            ),
            generation=(Open(f"What is {who} known for?", f"A {JOBS[number % 4]} from {city}"),),
            cloze=(Open(f"The birthplace of {who} is __.", city),),
        )

    photos = (picture(number if photo is None else photo),)
    return Profile(name, photos, questions("this person"), questions(name), source=f"test:{number}")
