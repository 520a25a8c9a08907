"""The way from pixels to visual features at named sites, and the batches that go in.

Under causal attention a visual token sees only what stands before it. So the input is cut after the last image
token, the LLM stops at the deepest site, and no logits exist. Legend: B images, T tokens, H width, N visual tokens.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastvkd.errors import ModelError
from fastvkd.models import families
from fastvkd.models.families import family_of
from fastvkd.models.prompts import adds_special_tokens, visual_prefix


@dataclass
class VisualBatch:
    """Model inputs for B images, one image a sequence.

    `inputs` holds input_ids (B, T) int64, cut after the last image token and padded on the right, pixel_values and
    what else the family's base model takes. No attention mask: under causal attention padding on the right is never
    seen by what stands before it, and without a mask SDPA keeps its fast path.
    `tower_rows` (B,) int64: how many entries of the tower's first dimension (crops, or patches) belong to each image.
    """

    inputs: dict[str, Tensor]
    n_images: int
    tower_rows: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "VisualBatch":
        """The same batch on `device`."""
        moved = {key: value.to(device, non_blocking=non_blocking) for key, value in self.inputs.items()}
        return VisualBatch(moved, self.n_images, self.tower_rows.to(device, non_blocking=non_blocking))


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

    Sites: `vision:<k>` is the output of tower block k (k blocks have run; 0 = embeddings), without CLS; `projector` is
    what enters the LLM at the image positions; `llm:<k>` is the visual tokens entering decoder layer k, before any norm.
    Works on a full model and on one from `load_model(llm_layers=...)`. Never calls lm_head. The hooks live only
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
        self._parsed = [parse_site(site) for site in self.sites]
        check_sites(self.sites, config)
        self._image_token_id = families.image_token_id(config)

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
            hooks.callback(self._stop_hook().remove)
            try:
                if "llm" in kinds:
                    base(**batch.inputs, use_cache=False)
                else:
                    features = self._image_features(base, batch)
                    if "projector" in self.sites:
                        hidden["projector"] = features
            except _DeepestSiteReached:
                pass
        return {site: self._features(site, hidden[site], batch) for site in self.sites}

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
        if kind == "embeddings":
            return families.language_model(self.model, self.family).register_forward_pre_hook(
                lambda module, args, kwargs: capture(kwargs["inputs_embeds"]), with_kwargs=True
            )
        if kind == "llm":
            # the *input* of layer k, not the output of layer k - 1: Qwen3-VL adds deepstack features in between
            return self._llm_entry(k).register_forward_pre_hook(
                lambda module, args, kwargs: capture(_first(args, kwargs)), with_kwargs=True
            )
        blocks = families.tower_blocks(self.model, self.family)
        if k == 0:
            return blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: capture(_first(args, kwargs)), with_kwargs=True
            )
        return blocks[k - 1].register_forward_hook(
            lambda module, args, output: capture(output[0] if isinstance(output, tuple) else output)
        )

    def _llm_entry(self, k: int) -> nn.Module:
        """The module whose input is the hidden state entering decoder layer k."""
        decoder: Any = families.language_model(self.model, self.family)
        return decoder.layers[k] if k < len(decoder.layers) else decoder.norm

    def _stop_hook(self) -> torch.utils.hooks.RemovableHandle:
        """Ends the pass behind the deepest site; where nothing would run after it anyway, nothing is raised."""
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
            return self.register_forward_pre_hook(lambda module, args: None)

        def stop(module: nn.Module, args: Any) -> None:
            raise _DeepestSiteReached

        return stop_at.register_forward_pre_hook(stop)

    def _features(self, site: str, hidden: Tensor, batch: VisualBatch) -> SiteFeatures:
        kind, _ = parse_site(site)
        ids = batch.inputs["input_ids"]
        if kind == "vision":
            return _tower_features(hidden, batch.tower_rows, families.tower_prefix_tokens(self._tower()))
        rows = (ids.flatten() == self._image_token_id).nonzero().squeeze(1)
        image_of_row = rows // ids.shape[1]
        if hidden.dim() == 2:
            rows = torch.arange(len(rows), device=rows.device)
        return SiteFeatures(hidden, rows, image_of_row)

    def _tower(self) -> nn.Module:
        return families.tower(self.model, self.family)


def parse_site(site: str) -> tuple[str, int]:
    """`vision:3` -> ("vision", 3), `llm:8` -> ("llm", 8), `projector` -> ("projector", 0). ModelError when misspelt."""
    if site == "projector":
        return "projector", 0
    kind, _, number = site.partition(":")
    if kind not in ("vision", "llm") or not number.isdecimal():
        raise ModelError(f"site {site!r} is not known: write vision:<k>, projector or llm:<k> with a number k >= 0")
    return kind, int(number)


def check_sites(sites: Sequence[str], config: Any) -> None:
    """Raises ModelError when a site is misspelt or deeper than the model that `config` describes."""
    family = family_of(config)
    depths = {"vision": ("tower blocks", families.tower_depth(config)), "llm": ("layers", families.llm_depth(config))}
    for site in sites:
        kind, k = parse_site(site)
        if kind in depths and k > depths[kind][1]:
            what, depth = depths[kind]
            raise ModelError(
                f"site {site!r} is deeper than the model: this {family.name} has {depth} {what}, so {kind}:0 to "
                f"{kind}:{depth} are allowed"
            )


def collate_images(processor: Any, model_config: Any, images: Sequence[Image.Image]) -> VisualBatch:
    """One sequence of prefix + image tokens for each image, preprocessed by the family's own processor."""
    return batch_from_pixels(processor, model_config, encode_pixels(processor, images))


def encode_pixels(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """pixel_values (B, 3, S, S) float32 of RGB images; for families of fixed resolution, where it can be cached."""
    return processor.image_processor(list(images), return_tensors="pt")["pixel_values"]


def batch_from_pixels(processor: Any, model_config: Any, pixel_values: Tensor) -> VisualBatch:
    """A batch from preprocessed `pixel_values` (B, 3, S, S), for families of fixed resolution.

    Raises:
        ModelError: the family cuts images into crops or patches of their own size: use `collate_images`.
    """
    family = family_of(model_config)
    if not family.fixed_resolution or pixel_values.dim() != 4:
        raise ModelError(
            f"{family.name} has no fixed resolution (pixel_values {tuple(pixel_values.shape)}): use collate_images"
        )
    count, _, height, width = pixel_values.shape
    ids = _prefix_ids(processor, visual_prefix(processor), families.image_token_id(model_config), height, width)
    input_ids = torch.tensor(ids, device=pixel_values.device).expand(count, -1).contiguous()
    return VisualBatch(
        inputs={"input_ids": input_ids, "pixel_values": pixel_values},
        n_images=count,
        tower_rows=torch.ones(count, dtype=torch.int64, device=pixel_values.device),
    )


@functools.lru_cache(maxsize=16)
def _prefix_ids(processor: Any, prefix: str, image_token: int, height: int, width: int) -> tuple[int, ...]:
    """The ids of prefix + image tokens: equal for all images of a size, so the processor counts them once."""
    blank = Image.new("RGB", (width, height))
    encoded = processor(
        text=[prefix], images=[[blank]], add_special_tokens=adds_special_tokens(processor, prefix), return_tensors="pt"
    )
    ids = encoded["input_ids"][0].tolist()
    last = max((i for i, token in enumerate(ids) if token == image_token), default=None)
    if last is None:
        raise ModelError(
            f"the processor writes no image token with id {image_token} for {prefix!r}: processor and model differ"
        )
    return tuple(ids[: last + 1])


def _tower_features(hidden: Tensor, tower_rows: Tensor, prefix_tokens: int) -> SiteFeatures:
    """hidden (crops, S, H) or (patches, H): drops the CLS rows and says which image each row belongs to."""
    image = torch.arange(len(tower_rows), device=hidden.device).repeat_interleave(tower_rows)
    if hidden.dim() == 2:
        return SiteFeatures(hidden, torch.arange(len(hidden), device=hidden.device), image)
    crops, tokens, _ = hidden.shape
    rows = torch.arange(crops * tokens, device=hidden.device).view(crops, tokens)[:, prefix_tokens:]
    return SiteFeatures(hidden, rows.flatten(), image.repeat_interleave(tokens - prefix_tokens))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
