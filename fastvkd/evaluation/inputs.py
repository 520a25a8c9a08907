"""From prompts and photos to what a model takes. Two ways: `Embedder` prepares each distinct photo and runs the vision
tower on it once, then places its features among the token embeddings (families in `EMBEDDABLE`); `processor_inputs`
hands everything to the processor, which is right for every family and repeats the work.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvkd.data.images import content_hash, decode_image
from fastvkd.data.records import Photo
from fastvkd.errors import ModelError
from fastvkd.models.prompts import adds_special_tokens

# Families in which image tokens are plain positions of a causal decoder: features in, 1-D positions, nothing else. The
# others (tiled images, M-RoPE, deepstack, attention both ways) go through the processor.
EMBEDDABLE = ("llava",)
# Towers that make the same number of tokens from every photo; Pixtral, for one, follows the photo's size.
_FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")
# An arbitrary attention mask (the packed option scoring) is understood by these only.
_MASKED_ATTENTION = ("sdpa", "eager")
_FEATURE_CACHE_BYTES = 4 << 30  # host memory: at 576 x 4096 in bfloat16, 900 photos


@dataclass(frozen=True)
class Query:
    """A prompt that ends where the answer begins, with one image placeholder per photo, in order."""

    prompt: str
    photos: tuple[Photo, ...] = ()


def with_answer(prompt: str, answer: str) -> str:
    """The text of prompt and answer, as the model is trained on it: one space between them unless the prompt ends in
    white space (a chat template's newline)."""
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


class PreparedPhotos:
    """Pixel values by content hash: every distinct photo is decoded and preprocessed once. Weights play no part in it,
    so one instance serves every evaluation of a run."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._pixels: dict[str, Tensor] = {}
        self._hashes: dict[int, tuple[bytes, str]] = {}

    def key(self, photo: Photo) -> str:
        # By object identity first, since a photo is asked about dozens of times. Holding the bytes keeps the id valid.
        known = self._hashes.get(id(photo.data))
        if known is None:
            known = self._hashes[id(photo.data)] = (photo.data, content_hash(photo.data))
        return known[1]

    def pixels(self, photo: Photo) -> Tensor:
        """(C, height, width) float32, on the CPU. Raises `DataError` for a photo that cannot be decoded."""
        key = self.key(photo)
        if key not in self._pixels:
            image = decode_image(photo.data, photo.source)
            values = self._processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            self._pixels[key] = values[0]
        return self._pixels[key]


class Embedder:
    """Token ids and input embeddings for a family in `EMBEDDABLE`. Features are kept in host memory (4 GiB, the least
    recently used go first), so an instance is valid only as long as the weights stay as they are."""

    def __init__(self, model: nn.Module, processor: Any, batch_size: int, photos: PreparedPhotos | None = None) -> None:
        whole: Any = model
        self.model = whole
        self.processor = processor
        self.batch_size = batch_size
        self.photos = photos if photos is not None else PreparedPhotos(processor)
        self.image_token_id: int = whole.config.image_token_id
        self.device: torch.device = whole.get_input_embeddings().weight.device
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._feature_bytes = 0
        self._visual_tokens: int | None = None

    def features(self, photos: Iterable[Photo]) -> dict[str, Tensor]:
        """What enters the LLM for each photo, by `PreparedPhotos.key`: (visual tokens, H), on the CPU."""
        wanted = {self.photos.key(photo): photo for photo in photos}
        found = {key: self._features[key] for key in wanted if key in self._features}
        missing = [(key, photo) for key, photo in wanted.items() if key not in found]
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            pixels = torch.stack([self.photos.pixels(photo) for _, photo in part])
            pixels = pixels.to(self.device, self.model.dtype)
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
            for (key, _), feature in zip(part, features, strict=True):
                # A clone, or one kept row would keep the memory of its whole batch.
                found[key] = self._features[key] = feature.detach().to("cpu", copy=True)
                self._feature_bytes += feature.numel() * feature.element_size()
        for key in wanted:
            self._features.move_to_end(key)
        while self._feature_bytes > _FEATURE_CACHE_BYTES:
            _, old = self._features.popitem(last=False)
            self._feature_bytes -= old.numel() * old.element_size()
        return found

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, one per image placeholder (not yet expanded to the number of visual tokens)."""
        return token_ids(self.processor, texts)

    def expand(self, ids: list[int], photos: Sequence[Photo]) -> list[int]:
        """Repeat each image placeholder once per visual token, as the processor does."""
        placeholders = ids.count(self.image_token_id)
        if placeholders != len(photos):
            raise ModelError(f"a prompt has {placeholders} image placeholders for {len(photos)} photos; write one each")
        if not photos:
            return ids
        if self._visual_tokens is None:  # of whatever photo: these families make the same number of any
            self._visual_tokens = next(iter(self.features(photos[:1]).values())).shape[0]
        expanded, start = [], 0
        for _ in photos:
            place = ids.index(self.image_token_id, start)
            expanded += ids[start:place] + [self.image_token_id] * self._visual_tokens
            start = place + 1
        return expanded + ids[start:]

    def embeddings(self, ids_BT: Tensor, photos: Sequence[Sequence[Photo]]) -> Tensor:
        """(B, T, H) input embeddings: tokens, with the features of row b's photos at its image tokens, in order."""
        embeds_BTH = self.model.get_input_embeddings()(ids_BT)
        flat = [photo for row in photos for photo in row]
        if not flat:
            return embeds_BTH
        features = self.features(flat)
        placed = torch.cat([features[self.photos.key(photo)] for photo in flat])
        placed = placed.to(embeds_BTH.device, embeds_BTH.dtype)
        return embeds_BTH.masked_scatter((ids_BT == self.image_token_id).unsqueeze(-1), placed)

    def hidden(self, **inputs: Any) -> Any:
        """The decoder without its head: keyword arguments and output of the language model."""
        return self.model.get_decoder()(**inputs)


def embeddable(model: nn.Module) -> bool:
    """Whether the fast path is known to be right for this model."""
    config: Any = model.config
    return (
        config.model_type in EMBEDDABLE
        and config.vision_config.model_type in _FIXED_SIZE_TOWERS
        and config.text_config._attn_implementation in _MASKED_ATTENTION
    )


def token_ids(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, with the tokenizer's own special tokens unless the text already begins with them (as the chat
    templates of some families do)."""
    if not texts:
        return []
    return processor.tokenizer(list(texts), add_special_tokens=adds_special_tokens(processor, texts[0]))["input_ids"]


def processor_inputs(
    processor: Any, queries: Sequence[Query], answers: Sequence[str] | None, device: torch.device
) -> dict[str, Tensor]:
    """Left-padded inputs of the whole model, made by the processor; with `answers`, each prompt carries its answer."""
    texts = [q.prompt if answers is None else with_answer(q.prompt, answers[i]) for i, q in enumerate(queries)]
    distinct = {id(photo.data): photo for query in queries for photo in query.photos}
    decoded = {key: decode_image(photo.data, photo.source) for key, photo in distinct.items()}
    images = [[decoded[id(photo.data)] for photo in query.photos] for query in queries]
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a pad nor an eos token; batches cannot be padded")
        tokenizer.pad_token = tokenizer.eos_token
    if any(images):
        ask = partial(processor, images=images)
    elif (
        type(processor).__name__ == "PaliGemmaProcessor"
    ):  # refuses text alone, but its model needs the types of tokens
        ask = partial(tokenizer, return_token_type_ids=True)
    else:
        ask = processor
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        special = adds_special_tokens(processor, texts[0])
        inputs = dict(ask(text=texts, padding=True, add_special_tokens=special, return_tensors="pt").to(device))
    finally:
        tokenizer.padding_side = side
    inputs.pop("labels", None)  # PaliGemma's processor makes some
    return inputs


def eos_ids(model: Any, processor: Any) -> list[int]:
    """Every token that ends an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    return sorted({*found, processor.tokenizer.eos_token_id} - {None})


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode and no autograd; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
