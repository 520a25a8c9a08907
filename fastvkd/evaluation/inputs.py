"""From prompts and photos to what a model takes. Two ways: `Embedder` prepares each distinct photo and runs the vision
tower on it once, then places its features among the token embeddings (families in `EMBEDDABLE`); `processor_inputs`
hands everything to the processor, which is right for every family and repeats the work.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.data.images import content_hash, decode_image
from fastvkd.data.records import Photo
from fastvkd.errors import ModelError
from fastvkd.models.prompts import adds_special_tokens

# Families whose decoder is causal and takes nothing of an image but one feature per image token (and, in Qwen's, its
# 3-D position). The others (tiled images, deepstack, attention both ways) go through the processor.
EMBEDDABLE = ("llava", *(_MROPE := ("qwen2_vl", "qwen2_5_vl")))
# LLaVA's towers whose photos can be stacked; Pixtral, for one, follows the photo's size.
_FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")
# An arbitrary attention mask (the packed option scoring) is understood by these only.
_MASKED_ATTENTION = ("sdpa", "eager")
_FEATURE_CACHE_BYTES = 4 << 30  # host memory: at 576 x 4096 in bfloat16, 900 photos

Tick = Callable[[int], None]  # so many more questions are done


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
    """What the image processor makes of each distinct photo, by content hash: decoded and preprocessed once. Weights
    play no part in it, so one instance serves every evaluation of a run."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._prepared: dict[str, dict[str, Tensor]] = {}
        self._hashes: dict[int, tuple[bytes, str]] = {}

    def key(self, photo: Photo) -> str:
        # By object identity first, since a photo is asked about dozens of times. Holding the bytes keeps the id valid.
        known = self._hashes.get(id(photo.data))
        if known is None:
            known = self._hashes[id(photo.data)] = (photo.data, content_hash(photo.data))
        return known[1]

    def tensors(self, photo: Photo) -> dict[str, Tensor]:
        """The tower's inputs for one photo, on the CPU: those of several are concatenated along the first dimension.

        Raises `DataError` for a photo that cannot be decoded.
        """
        key = self.key(photo)
        if key not in self._prepared:
            image = decode_image(photo.data, photo.source)
            self._prepared[key] = dict(self._processor.image_processor(images=[image], return_tensors="pt"))
        return self._prepared[key]


@dataclass(frozen=True)
class Tokens:
    """A text as the decoder takes it: ids with every image token in place, and the position of each token, an array of
    (axes, length) with one axis, or three under M-RoPE."""

    ids: list[int]
    positions: np.ndarray

    def with_ids(self, ids: list[int]) -> "Tokens":
        """Another text with the same beginning, all of whose photos are in that beginning."""
        shared = common_prefix(self.ids, ids)
        after = self.positions[:, shared - 1 : shared] + np.arange(1, len(ids) - shared + 1)
        return Tokens(ids, np.concatenate([self.positions[:, :shared], after], axis=1))


class Embedder:
    """Token ids, positions and input embeddings for a family in `EMBEDDABLE`. Features are kept in host memory (4 GiB,
    the least recently used go first), so an instance is valid only as long as the weights stay as they are."""

    def __init__(self, model: nn.Module, processor: Any, batch_size: int, photos: PreparedPhotos | None = None) -> None:
        whole: Any = model
        self.model = whole
        self.processor = processor
        self.batch_size = batch_size
        self.photos = photos if photos is not None else PreparedPhotos(processor)
        self.image_token_id: int = whole.config.image_token_id
        self.device: torch.device = whole.get_input_embeddings().weight.device
        self.mrope = whole.config.model_type in _MROPE
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._feature_bytes = 0
        self._visual_tokens: dict[str, int] = {}

    def features(self, photos: Iterable[Photo]) -> dict[str, Tensor]:
        """What enters the LLM for each photo, by `PreparedPhotos.key`: (visual tokens, H), on the CPU."""
        wanted = {self.photos.key(photo): photo for photo in photos}
        found = {key: self._features[key] for key in wanted if key in self._features}
        missing = [(key, photo) for key, photo in wanted.items() if key not in found]
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            tensors = [self.photos.tensors(photo) for _, photo in part]
            batch = {name: torch.cat([one[name] for one in tensors]).to(self.device) for name in tensors[0]}
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
            features = self.model.get_image_features(**batch).pooler_output
            for (key, _), feature in zip(part, features, strict=True):
                # A copy, or one kept row would keep the memory of its whole batch.
                found[key] = self._features[key] = feature.detach().to("cpu", copy=True)
                self._visual_tokens[key] = feature.shape[0]
                self._feature_bytes += feature.numel() * feature.element_size()
        for key in wanted:
            self._features.move_to_end(key)
        while self._feature_bytes > _FEATURE_CACHE_BYTES:
            _, old = self._features.popitem(last=False)
            self._feature_bytes -= old.numel() * old.element_size()
        return found

    def encode(self, queries: Sequence[Query]) -> list[Tokens]:
        """The prompts as the decoder takes them. Raises `ModelError` where placeholders and photos do not match."""
        photos = [photo for query in queries for photo in query.photos]
        self.features([photo for photo in photos if self.photos.key(photo) not in self._visual_tokens])
        encoded = []
        for ids, query in zip(token_ids(self.processor, [q.prompt for q in queries]), queries, strict=True):
            expanded = self.expand(ids, query.photos)
            encoded.append(Tokens(expanded, self._positions(expanded, query.photos)))
        return encoded

    def expand(self, ids: list[int], photos: Sequence[Photo]) -> list[int]:
        """Repeat each image placeholder once per visual token, as the processor does; `encode` has seen the photos."""
        placeholders = ids.count(self.image_token_id)
        if placeholders != len(photos):
            raise ModelError(f"a prompt has {placeholders} image placeholders for {len(photos)} photos; write one each")
        expanded, start = [], 0
        for photo in photos:
            place = ids.index(self.image_token_id, start)
            expanded += ids[start:place] + [self.image_token_id] * self._visual_tokens[self.photos.key(photo)]
            start = place + 1
        return expanded + ids[start:]

    def _positions(self, ids: list[int], photos: Sequence[Photo]) -> np.ndarray:
        if not self.mrope or not photos:
            return np.arange(len(ids))[None].repeat(3 if self.mrope else 1, axis=0)
        ids_1T = torch.tensor([ids])
        grids = torch.cat([self.photos.tensors(photo)["image_grid_thw"] for photo in photos])
        visual_1T = (ids_1T == self.image_token_id).int()
        return self.model.model.get_rope_index(ids_1T, mm_token_type_ids=visual_1T, image_grid_thw=grids)[0][
            :, 0
        ].numpy()

    def position_ids(self, positions: np.ndarray) -> Tensor:
        """(axes, B, T) -> what the decoder takes: (B, T), or (3, B, T) under M-RoPE."""
        tensor = torch.from_numpy(positions).to(self.device)
        return tensor if self.mrope else tensor[0]

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
    """Whether the fast path is known to be right for this model: family, tower, attention that takes any mask."""
    config: Any = model.config
    return (
        config.model_type in EMBEDDABLE
        and (config.model_type in _MROPE or config.vision_config.model_type in _FIXED_SIZE_TOWERS)
        and config.text_config._attn_implementation in _MASKED_ATTENTION
        and getattr(config.text_config, "sliding_window", None) is None
    )


def common_prefix(one: list[int], other: list[int]) -> int:
    """Length of the common prefix, by bisection: comparing slices is what lists do fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def token_ids(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, with the tokenizer's own special tokens unless the text already begins with them (as the chat
    templates of some families do)."""
    if not texts:
        return []
    return processor.tokenizer(list(texts), add_special_tokens=adds_special_tokens(processor, texts[0]))["input_ids"]


def answer_lengths(processor: Any, prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Tokens of each answer, where `texts` are the `prompts` with answers: those after what both have in common.

    An answer is never counted alone: a tokenizer may merge across the border (the answer then has the tokens that it
    changed), and Llama's puts a mark before the first word of whatever it is given.
    """
    pairs = zip(token_ids(processor, prompts), token_ids(processor, texts), strict=True)
    return [len(whole) - common_prefix(prompt, whole) for prompt, whole in pairs]


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
