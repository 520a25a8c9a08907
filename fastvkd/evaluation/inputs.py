"""From prompts and photos to a model's inputs. There are two ways.

`Embedder` runs the vision tower on each distinct photo once and places its features among the token embeddings. It
serves the families in `EMBEDDABLE`. `processor_inputs` hands everything to the processor: right for every family,
but the work is repeated.
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

from fastvkd.devices import at_once, decoder_pass_bytes, keys_and_values_bytes, packed_pass_bytes, tower_pass_bytes
from fastvkd.errors import ModelError
from fastvkd.models.answers import Query, common_prefix, token_ids
from fastvkd.models.packing import takes_any_mask
from fastvkd.models.patch_sequences import moved
from fastvkd.models.pooled import Recent, in_threads
from fastvkd.models.processing import processed
from fastvkd.photos import decode_image
from fastvkd.records import Photo

# Families with a causal decoder that takes one feature per image token (Qwen's also its 3-D position) and nothing else
# of an image. The others (tiled images, deepstack, attention both ways) go through the processor.
EMBEDDABLE = ("llava", *(_MROPE := ("qwen2_vl", "qwen2_5_vl")))
# LLaVA's towers whose photos can be stacked; Pixtral, for one, follows the photo's size.
_FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")
_FEATURE_CACHE_BYTES = 4 << 30  # host memory: at 576 x 4096 in bfloat16, 900 photos

_PREPARED_BYTES = 4 << 30  # host memory for preprocessed photos, in float32
_PASSES_AHEAD = 4

Tick = Callable[[int], None]  # so many more questions are done


class PreparedPhotos:
    """Decodes and preprocesses each distinct photo once, by content hash, many at once in threads.

    Weights play no part in it, so one instance serves every evaluation of a run. It keeps what fits 4 GiB of host
    memory: 190 photos of 1024 px for Qwen-VL, 3,100 for LLaVA-1.5. The rest is prepared again when it is asked for.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._prepared: Recent[dict[str, Tensor]] = Recent(_PREPARED_BYTES)
        self._sizes: dict[str, dict[str, Tensor]] = {}

    def prepare(self, photos: Iterable[Photo]) -> None:
        """Have `tensors` of these photos ready, as far as they fit."""
        in_threads(self.tensors, [photo for photo in photos if photo.key not in self._prepared])

    def tensors(self, photo: Photo) -> dict[str, Tensor]:
        """The tower's inputs for one photo, on the CPU: those of several are concatenated along the first dimension.

        Raises `DataError` for a photo that cannot be decoded.
        """

        def make() -> tuple[dict[str, Tensor], int]:
            image = decode_image(photo.data, photo.source)
            made = dict(processed(self._processor.image_processor, images=[image], return_tensors="pt"))
            self._sizes[photo.key] = {name: value for name, value in made.items() if name != "pixel_values"}
            return made, sum(value.nbytes for value in made.values())

        return self._prepared.get(photo.key, make)

    def sizes(self, photo: Photo) -> dict[str, Tensor]:
        """The same without `pixel_values`; these few bytes are kept of every photo."""
        if photo.key not in self._sizes:
            self.tensors(photo)
        return self._sizes[photo.key]


@dataclass(frozen=True)
class Tokens:
    """A text as the decoder takes it: ids with every image token in place, and the position of each token.

    positions: (axes, length), with one axis, or three under M-RoPE.
    """

    ids: list[int]
    positions: np.ndarray

    def with_ids(self, ids: list[int]) -> "Tokens":
        """Another text with the same beginning, all of whose photos are in that beginning."""
        shared = common_prefix(self.ids, ids)
        after = self.positions[:, shared - 1 : shared] + np.arange(1, len(ids) - shared + 1)
        return Tokens(ids, np.concatenate([self.positions[:, :shared], after], axis=1))


class Embedder:
    """Token ids, positions and input embeddings for a family in `EMBEDDABLE`.

    Features are kept in host memory: 4 GiB, the least recently used go first. So an instance is valid only while the
    weights stay as they are.
    """

    def __init__(self, model: nn.Module, processor: Any, batch_size: int, photos: PreparedPhotos | None = None) -> None:
        whole: Any = model
        self.model = whole
        self.processor = processor
        self.batch_size = batch_size
        self.photos = photos if photos is not None else PreparedPhotos(processor)
        self.image_token_id: int = whole.config.image_token_id
        self.device: torch.device = next(whole.parameters()).device  # the first card's, where a model has several
        self.mrope = whole.config.model_type in _MROPE
        text, vision, itemsize = whole.config.text_config, whole.config.vision_config, whole.dtype.itemsize
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv_width = width * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        wide: dict[str, int] = {
            "hidden": text.hidden_size,
            "intermediate": text.intermediate_size,
            "itemsize": itemsize,
        }
        self.pack_bytes: Callable[[int], int] = partial(packed_pass_bytes, **wide)  # of so many tokens
        self._prompt_bytes: Callable[[int], int] = partial(decoder_pass_bytes, **wide)
        self._kept_bytes: Callable[[int], int] = partial(
            keys_and_values_bytes, layers=text.num_hidden_layers, kv_width=kv_width, itemsize=itemsize
        )
        width = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL names it so
        middle = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        kept = vision.num_hidden_layers if hasattr(whole.config, "vision_feature_layer") else 0
        wide = {"hidden": width, "intermediate": middle, "itemsize": itemsize, "kept": kept}
        self._tower_bytes: Callable[[int], int] = partial(tower_pass_bytes, **wide)
        self._patch_values = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._feature_bytes = 0
        self._visual_tokens: dict[str, int] = {}

    def answer_bytes(self, tokens: int) -> int:
        """What a prompt of so many tokens, those of the answer included, takes while it is answered."""
        return self._prompt_bytes(tokens) + self._kept_bytes(tokens)

    def part(self, sizes: Sequence[int], start: int, bytes_of: Callable[[int], int]) -> slice:
        """As many things from `start` on, whose `sizes` rise, as go at once."""
        count = min(self.batch_size, len(sizes) - start)
        while count > at_once(bytes_of(sizes[start + count - 1]), count):
            count -= 1
        return slice(start, start + count)

    def features(self, photos: Iterable[Photo]) -> dict[str, Tensor]:
        """What enters the LLM for each photo, by `Photo.key`: (visual tokens, H), on the CPU."""
        wanted = {photo.key: photo for photo in photos}
        found = {key: self._features[key] for key in wanted if key in self._features}
        lacking = [(key, photo) for key, photo in wanted.items() if key not in found]
        at_once = _PASSES_AHEAD * self.batch_size  # are prepared together, or memory would hold all of them
        for start in range(0, len(lacking), at_once):
            found |= self._see(lacking[start : start + at_once])
        for key in wanted:
            self._features.move_to_end(key)
        while self._feature_bytes > _FEATURE_CACHE_BYTES:
            _, old = self._features.popitem(last=False)
            self._feature_bytes -= old.numel() * old.element_size()
        return found

    def _see(self, missing: list[tuple[str, Photo]]) -> dict[str, Tensor]:
        """Runs the tower on photos that are not known yet, those of like size together."""
        self.photos.prepare(photo for _, photo in missing)
        found: dict[str, Tensor] = {}
        patches = [self.photos.tensors(photo)["pixel_values"].numel() // self._patch_values for _, photo in missing]
        order = sorted(range(len(missing)), key=patches.__getitem__)
        missing, patches = [missing[i] for i in order], [patches[i] for i in order]
        stop = 0
        while stop < len(missing):
            here = self.part(patches, stop, self._tower_bytes)
            part, stop = missing[here], here.stop
            tensors = [self.photos.tensors(photo) for _, photo in part]
            batch = moved({name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}, self.device)
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
            features = self.model.get_image_features(**batch).pooler_output
            for (key, _), feature in zip(part, features, strict=True):
                # A copy, or one kept row would keep the memory of its whole batch.
                found[key] = self._features[key] = feature.detach().to("cpu", copy=True)
                self._visual_tokens[key] = feature.shape[0]
                self._feature_bytes += feature.numel() * feature.element_size()
        return found

    def encode(self, queries: Sequence[Query]) -> list[Tokens]:
        """The prompts as the decoder takes them. Raises `ModelError` where placeholders and photos do not match."""
        photos = [photo for query in queries for photo in query.photos]
        self.features([photo for photo in photos if photo.key not in self._visual_tokens])
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
            expanded += ids[start:place] + [self.image_token_id] * self._visual_tokens[photo.key]
            start = place + 1
        return expanded + ids[start:]

    def _positions(self, ids: list[int], photos: Sequence[Photo]) -> np.ndarray:
        if not self.mrope or not photos:
            return np.arange(len(ids))[None].repeat(3 if self.mrope else 1, axis=0)
        ids_1T = torch.tensor([ids])
        grids = torch.cat([self.photos.sizes(photo)["image_grid_thw"] for photo in photos])
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
        placed = torch.cat([features[photo.key] for photo in flat])
        placed = placed.to(embeds_BTH.device, embeds_BTH.dtype)
        is_image_BT1 = (ids_BT == self.image_token_id).unsqueeze(-1).to(embeds_BTH.device)
        return embeds_BTH.masked_scatter(is_image_BT1, placed)

    def hidden(self, **inputs: Any) -> Tensor:
        """(B, T, H): the decoder without its head, from keyword arguments of the language model."""
        return self.model.get_decoder()(**inputs).last_hidden_state.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 of hidden states (..., H)."""
        return self.model.get_output_embeddings()(hidden).to(self.device).float()


def embeddable(model: nn.Module) -> bool:
    """Whether the fast path is known to be right for this model: family, tower, attention that takes any mask."""
    config: Any = model.config
    return (
        config.model_type in EMBEDDABLE
        and (config.model_type in _MROPE or config.vision_config.model_type in _FIXED_SIZE_TOWERS)
        and takes_any_mask(config)
    )


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
