"""The way from pixels to visual features at named sites, and the batches that go in.

Under causal attention a visual token sees only what stands before it. So the input is cut after the last image
token, the LLM stops at the deepest site, and no logits exist. Legend: B images, T tokens, H width, N visual tokens.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from fastvkd.errors import ModelError
from fastvkd.models import families
from fastvkd.models.families import Family, family_of, parse_site
from fastvkd.models.patch_sequences import moved, rope_positions
from fastvkd.models.pooled import pooled
from fastvkd.models.processing import processed, tokens_and_features
from fastvkd.models.prompts import adds_special_tokens, chat_prompt, visual_prefix


@dataclass
class VisualBatch:
    """Model inputs for B images, one image a sequence.

    inputs: input_ids (B, T) int64, cut after the last image token and padded on the right; pixel_values; and what else
        the family's base model takes. There is no attention mask. Under causal attention nothing sees the padding on
        its right, and without a mask SDPA keeps its fast path. Sizes of images stay on the host.
    token_rows: (N,) int64, rows of (B, T) flattened that are visual tokens, in the order of the images.
    token_images: (N,) int64, the image of each of them.
    tower_images: (C,) int64, the image of each entry of the tower's first dimension (crops, or patches).

    The last three are counted when the batch is made, so that a forward pass need not wait for the device.
    """

    inputs: dict[str, Tensor]
    n_images: int
    token_rows: Tensor
    token_images: Tensor
    tower_images: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "VisualBatch":
        """The same batch on `device`."""
        rows = (self.token_rows, self.token_images, self.tower_images)
        return VisualBatch(
            moved(self.inputs, device, non_blocking=non_blocking),
            self.n_images,
            *(value.to(device, non_blocking=non_blocking) for value in rows),
        )

    def pin_memory(self) -> "VisualBatch":
        """The same batch in page-locked host memory, from which copies to a GPU are asynchronous."""
        rows = (self.token_rows, self.token_images, self.tower_images)
        return VisualBatch(
            {key: value.pin_memory() for key, value in self.inputs.items()},
            self.n_images,
            *(value.pin_memory() for value in rows),
        )

    def tail(self, first: int) -> "VisualBatch":
        """The images from `first` on. Call it on the host, where counting waits for nothing."""
        length = self.inputs["input_ids"].shape[1]
        tokens, entries = self.token_images >= first, self.tower_images >= first
        return VisualBatch(
            {key: self._tail_of(key, value, first, entries) for key, value in self.inputs.items()},
            self.n_images - first,
            self.token_rows[tokens] - first * length,
            self.token_images[tokens] - first,
            self.tower_images[entries] - first,
        )

    def _tail_of(self, key: str, value: Tensor, first: int, entries: Tensor) -> Tensor:
        if key == "position_ids":  # (3, B, T)
            return value[:, first:]
        return value[first:] if len(value) == self.n_images else value[entries]


@dataclass
class SiteFeatures:
    """Features at one site.

    hidden: (..., H), with the graph that leads back to the trainable weights.
    rows: (N,) int64, the rows of `hidden.flatten(0, -2)` that are visual tokens, in the order of the images.
    image_of_row: (N,) int64, the index in the batch of the image that each of those rows belongs to.
    """

    hidden: Tensor
    rows: Tensor
    image_of_row: Tensor

    def gathered(self) -> Tensor:
        """The visual tokens alone, (N, H). Copies; the loss kernel reads `hidden` through `rows` instead."""
        return self.hidden.flatten(0, -2)[self.rows]


class _DeepestSiteReached(Exception):
    """Leaves a forward pass once every site has been captured. Never leaves `VisualPath.forward`."""


class VisualPath(nn.Module):
    """Runs a model from pixels to the given sites, and no further.

    Sites: `vision:<k>` is the output of tower block k (k blocks have run; 0 = embeddings), without CLS. `projector` is
    what enters the LLM at the image positions. `llm:<k>` is the visual tokens entering decoder layer k, before any
    norm.

    It works on a full model and on one from `load_model(llm_layers=...)`. It never calls lm_head. Its hooks live only
    during `forward`; the model is not changed.

    Raises:
        ModelError: a site is misspelt or deeper than the model.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str]):
        super().__init__()
        self.model = model
        self.family = family_of(model)
        self.sites = tuple(sites)
        if not self.sites:
            raise ModelError("sites is empty: name at least one of vision:<k>, projector, llm:<k>")
        config: Any = families.base_model(model).config
        families.check_sites(self.sites, config)
        self._parsed = [parse_site(site) for site in self.sites]
        families.tower_blocks(model, self.family)  # refuses a tower of another kind here, before anything runs
        self._tower_prefix = families.tower_prefix_tokens(families.tower(model, self.family))

    def forward(self, batch: VisualBatch) -> dict[str, SiteFeatures]:
        """Features of every site for the images of `batch`; gradients flow when torch's grad mode is on."""
        hidden: dict[str, Tensor] = {}
        base = families.base_model(self.model)
        kinds = {kind for kind, _ in self._parsed}
        with ExitStack() as hooks:
            for site, (kind, k) in zip(self.sites, self._parsed, strict=True):
                if kind != "projector":
                    hooks.callback(self._hook(kind, k, functools.partial(hidden.__setitem__, site)).remove)
                elif "llm" in kinds:
                    hooks.callback(self._hook("embeddings", 0, functools.partial(hidden.__setitem__, site)).remove)
            if (stop := self._stop_hook()) is not None:
                hooks.callback(stop.remove)
            if hasattr(base, "rope_deltas"):  # Qwen-VL remembers those of its last input for generation
                hooks.callback(setattr, base, "rope_deltas", base.rope_deltas)
            hooks.enter_context(_no_packed_sequences())
            try:
                if "llm" in kinds and self._counted_ahead(batch):
                    self._embed_and_decode(base, batch)
                elif "llm" in kinds:
                    with tokens_and_features():
                        base(**batch.inputs, use_cache=False)
                else:
                    features = self._image_features(base, batch)
                    if "projector" in self.sites:
                        hidden["projector"] = features
            except _DeepestSiteReached:
                pass
        return {
            site: self._features(kind, hidden[site], batch)
            for site, (kind, _) in zip(self.sites, self._parsed, strict=True)
        }

    def _counted_ahead(self, batch: VisualBatch) -> bool:
        """Whether the batch says where everything stands, so that the model need not count."""
        if not self.family.causal or self.family.deepstack is not None:
            return False
        return self.family.fixed_resolution or "position_ids" in batch.inputs

    def _embed_and_decode(self, base: Any, batch: VisualBatch) -> None:
        """What the model's own forward pass does, without its count of image tokens, which waits for the device."""
        embedded = base.get_input_embeddings()(batch.inputs["input_ids"])
        features = self._image_features(base, batch).to(embedded.dtype)
        embedded = embedded.flatten(0, 1).index_copy(0, batch.token_rows, features).view_as(embedded)
        positions = {key: batch.inputs[key] for key in ("position_ids",) if key in batch.inputs}
        families.language_model(self.model, self.family)(inputs_embeds=embedded, use_cache=False, **positions)

    def _image_features(self, base: nn.Module, batch: VisualBatch) -> Tensor:
        """(N, H): tower and projector only."""
        function: Callable[..., Any] = base.get_image_features  # type: ignore[assignment]
        accepted = inspect.signature(function).parameters
        output = function(**{key: value for key, value in batch.inputs.items() if key in accepted}, return_dict=True)
        features = output.pooler_output
        return (
            features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat([f.flatten(0, -2) for f in features])
        )

    def _hook(self, kind: str, k: int, capture: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
        """Hands the hidden state of a site to `capture` during the forward pass."""
        if kind == "vision" and k > 0:
            block = families.tower_blocks(self.model, self.family)[k - 1]
            return block.register_forward_hook(
                lambda module, args, output: capture(output[0] if isinstance(output, tuple) else output)
            )
        if kind == "embeddings":
            entered = families.language_model(self.model, self.family)
        elif kind == "llm":
            # the *input* of layer k, not the output of layer k - 1: Qwen3-VL adds deepstack features in between
            entered = self._llm_entry(k)
        else:
            entered = families.tower_blocks(self.model, self.family)[0]
        # It must be the first of the hooks. ZeRO-3's own hand on a copy that belongs to the backward pass of a module,
        # and the loss never sees the output of that module.
        return entered.register_forward_pre_hook(
            lambda module, args, kwargs: capture(_first(args, kwargs)), with_kwargs=True, prepend=True
        )

    def _llm_entry(self, k: int) -> nn.Module:
        """The module whose input is the hidden state entering decoder layer k."""
        decoder: Any = families.language_model(self.model, self.family)
        return decoder.layers[k] if k < len(decoder.layers) else decoder.norm

    def _stop_hook(self) -> torch.utils.hooks.RemovableHandle | None:
        """Ends the pass behind the deepest site by an exception; None where nothing would run after it anyway."""
        deepest_llm = max((k for kind, k in self._parsed if kind == "llm"), default=None)
        stop_at: nn.Module | None = None
        if deepest_llm is not None:
            entry = self._llm_entry(deepest_llm)
            stop_at = None if isinstance(entry, nn.Identity) else entry
        elif "projector" not in self.sites:
            blocks = families.tower_blocks(self.model, self.family)
            deepest = max(k for _, k in self._parsed)
            stop_at = blocks[deepest] if deepest < len(blocks) else None
        # ZeRO-3 releases gathered weights in hooks that an exception would skip
        if stop_at is None or any(hasattr(p, "ds_id") for p in stop_at.parameters()):
            return None

        def stop(module: nn.Module, args: Any) -> None:
            raise _DeepestSiteReached

        return stop_at.register_forward_pre_hook(stop)

    def _features(self, kind: str, hidden: Tensor, batch: VisualBatch) -> SiteFeatures:
        if kind != "vision":
            # without the LLM, `projector` has the visual tokens alone
            rows = batch.token_rows if hidden.dim() == 3 else torch.arange(len(hidden), device=hidden.device)
            return SiteFeatures(hidden, rows, batch.token_images)
        rows = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
        if hidden.dim() == 2:  # one long sequence of patches
            return SiteFeatures(hidden, rows, batch.tower_images)
        rows = rows.view(hidden.shape[:2])[:, self._tower_prefix :]
        return SiteFeatures(hidden, rows.flatten(), batch.tower_images[:, None].expand_as(rows).flatten())


def collate_images(
    processor: Any, model_config: Any, images: Sequence[Image.Image], *, question: str = ""
) -> VisualBatch:
    """A batch of one sequence for each RGB image, preprocessed by the family's own processor.

    The sequence is prefix + image tokens. Where image tokens also see the text behind them (PaliGemma) it is the whole
    prompt, and only there `question` matters.
    """
    family = family_of(model_config)
    if family.fixed_resolution:
        return batch_from_pixels(processor, model_config, encode_pixels(processor, images), question=question)
    text = visual_prefix(processor)
    encoded = processed(
        pooled(processor),
        text=[text] * len(images),
        images=[[image] for image in images],
        add_special_tokens=adds_special_tokens(processor, text),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    inputs = {key: encoded[key] for key in _IMAGE_INPUTS if key in encoded}
    is_image, end = _image_tokens(encoded["input_ids"], model_config, text)
    for key in _text_inputs(family):
        inputs[key] = encoded[key][:, :end].contiguous()
    if "image_grid_thw" in inputs:
        merge = model_config.vision_config.spatial_merge_size
        inputs["position_ids"] = rope_positions(is_image[:, :end].int(), inputs["image_grid_thw"].tolist(), merge)
    image, column = is_image[:, :end].nonzero(as_tuple=True)
    entries = _tower_entries(inputs, is_image.sum(1), model_config)
    tower_images = torch.arange(len(images)).repeat_interleave(entries)
    return VisualBatch(inputs, len(images), image * end + column, image, tower_images)


def encode_pixels(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """pixel_values (B, 3, S, S) float32 of RGB images, for families of fixed resolution; worth caching."""
    return processed(processor.image_processor, images=list(images), return_tensors="pt")["pixel_values"]


def batch_from_pixels(processor: Any, model_config: Any, pixel_values: Tensor, *, question: str = "") -> VisualBatch:
    """A batch from preprocessed `pixel_values` (B, 3, S, S) on any device, for families of fixed resolution.

    Raises:
        ModelError: the family cuts images into crops or patches of their own size: use `collate_images`.
    """
    family = family_of(model_config)
    if not family.fixed_resolution or pixel_values.dim() != 4:
        raise ModelError(
            f"{family.name} with pixel_values {tuple(pixel_values.shape)} has no fixed resolution: use collate_images"
        )
    count, _, height, width = pixel_values.shape
    text = chat_prompt(processor, question, image=True) if family.sees_suffix else visual_prefix(processor)
    row = _text_row(processor, family, text, height, width)
    is_image, end = _image_tokens(row["input_ids"], model_config, text)
    if family.sees_suffix:
        end = is_image.shape[1]
    device = pixel_values.device
    inputs = {key: value[:, :end].to(device).expand(count, -1).contiguous() for key, value in row.items()}
    column = is_image[0].nonzero().squeeze(1).to(device)
    image = torch.arange(count, device=device)
    return VisualBatch(
        inputs | {"pixel_values": pixel_values},
        count,
        token_rows=(image[:, None] * end + column).flatten(),
        token_images=image[:, None].expand(-1, len(column)).flatten(),
        tower_images=image,
    )


_IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")


def _text_inputs(family: Family) -> tuple[str, ...]:
    return ("input_ids", family.token_types) if family.token_types else ("input_ids",)


@functools.lru_cache(maxsize=16)
def _text_row(processor: Any, family: Family, text: str, height: int, width: int) -> dict[str, Tensor]:
    """The (1, T) text inputs of one image. All images of a size share them, so the processor counts tokens once."""
    blank = Image.new("RGB", (width, height))
    encoded = processed(
        processor,
        text=[text],
        images=[[blank]],
        add_special_tokens=adds_special_tokens(processor, text),
        return_tensors="pt",
    )
    return {key: encoded[key] for key in _text_inputs(family)}


def _image_tokens(input_ids: Tensor, model_config: Any, text: str) -> tuple[Tensor, int]:
    """Where the visual tokens are, (B, T) bool, and the length up to the last of them."""
    is_image = input_ids == families.image_token_id(model_config)
    if not bool(is_image.any(1).all()):
        raise ModelError(
            f"the processor writes no image token with id {families.image_token_id(model_config)} for {text!r}: "
            "take the processor that belongs to the model"
        )
    return is_image, int(is_image.any(0).nonzero().max()) + 1


def _tower_entries(inputs: dict[str, Tensor], tokens: Tensor, config: Any) -> Tensor:
    """(B,) int64: entries of the tower's first dimension per image; `tokens` (B,) are the visual tokens per image."""
    if "image_grid_thw" in inputs:  # Qwen-VL: patches in one long sequence
        return inputs["image_grid_thw"].prod(-1)
    if "image_sizes" in inputs:  # LLaVA-NeXT and -OneVision: the image itself and its crops on a grid
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        crops = [image_size_to_num_patches(size, pinpoints, side) for size in inputs["image_sizes"]]
        return torch.tensor(crops, dtype=torch.int64)
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:  # Idefics3, SmolVLM: (B, crops, 3, S, S), and the model drops crops that are all zero
        return (pixels != 0).flatten(2).any(-1).sum(1)
    return tokens * len(pixels) // tokens.sum()  # InternVL: every crop has the same number of tokens


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Turns off transformers' search for packed sequences: it waits for the device, and our rows hold one each."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["hidden_states"]
