"""Shapes of a model, read from its configuration alone: tower, projector and LLM, with their parameters and FLOPs.

FLOPs count a multiply-add as two, matrix products only, as `torch.utils.flop_counter` does. Legend: T tokens of the LLM
input, S tokens of the tower, H and I hidden and intermediate widths, s bytes of a working value.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvkd.errors import ModelError
from fastvkd.paths import shipped
from fastvkd.planning.folder import notes_on

ARCHITECTURES = shipped("configs/architectures")


@dataclass(frozen=True)
class Tower:
    """A vision tower as it runs on one image: `crops` views of S = `tokens` each."""

    hidden: int
    intermediate: int
    blocks: int  # blocks that the tower runs
    used_blocks: int  # blocks that the projector's input depends on
    heads: int
    tokens: int
    crops: int
    patch_values: int  # values of one patch
    embedding_parameters: int  # patch embedding, positions, CLS, pre-norm
    unused_parameters: int  # post-norm: present, never trained
    block_parameters: int
    mlp_matrices: int
    mlp_saved: int  # tensors of width I kept for the backward pass
    has_cls: bool
    window: int | None = None  # tokens that attend to each other in a windowed block
    full_attention_blocks: frozenset[int] = frozenset()

    def linear_flops(self) -> int:
        """One block's matrix products for one image."""
        per_token = 4 * self.hidden**2 + self.mlp_matrices * self.hidden * self.intermediate
        return 2 * self.crops * self.tokens * per_token

    def attention_flops(self, block: int) -> int:
        """Scores and their product with the values, in 0-based block `block`, for one image."""
        windowed = self.window is not None and block not in self.full_attention_blocks
        span = min(self.window or self.tokens, self.tokens) if windowed else self.tokens
        return 4 * self.crops * self.tokens * span * self.hidden

    def embedding_flops(self) -> int:
        patches = self.tokens - int(self.has_cls)
        return 2 * self.crops * patches * self.patch_values * self.hidden


@dataclass(frozen=True)
class Projector:
    """Linear layers (in, out), each with a bias, applied to `rows` rows an image; `extra` other trained values."""

    layers: tuple[tuple[int, int], ...]
    rows: int
    extra: int

    @property
    def parameters(self) -> int:
        return sum(i * o + o for i, o in self.layers) + self.extra

    def flops(self) -> int:
        return sum(2 * self.rows * i * o for i, o in self.layers)


@dataclass(frozen=True)
class LLM:
    """A decoder with gated MLP and grouped-query attention (LLaMA, Mistral, Qwen2)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qkv_bias: bool
    tied: bool  # the head's weights are the embedding's

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Weights of one layer's matrices."""
        kv = self.kv_heads * self.head_dim
        return self.hidden * (2 * self.attention_width + 2 * kv + 3 * self.intermediate)

    @property
    def layer_parameters(self) -> int:
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.matrices + bias + 2 * self.hidden

    def linear_flops(self, tokens: int) -> int:
        return 2 * tokens * self.matrices

    def attention_flops(self, tokens: int) -> int:
        """Counted over the whole square, as flop_counter does; a causal kernel does half of it."""
        return 4 * tokens**2 * self.attention_width


@dataclass(frozen=True)
class Architecture:
    """A vision-language model and the size of its input for one image."""

    name: str
    tower: Tower
    projector: Projector
    llm: LLM
    visual_tokens: int
    fixed_tokens: bool  # every image has as many


def architecture_of(
    config: Mapping[str, Any], *, name: str = "", large_images: bool = True, max_pixels: int | None = None
) -> Architecture:
    """Read an `Architecture` from a config.json's values (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL).

    Models of variable resolution are counted at a large square image: 2 x 2 crops plus the overview for LLaVA-NeXT and
    -OneVision, `max_pixels` or 448 x 448 pixels for Qwen2.5-VL; with `large_images` False, at one crop. Raises
    ModelError for another model type and for a missing value.
    """
    kind = config.get("model_type")
    known = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
    if kind not in known:
        raise ModelError(f"{name or kind}: no plan for model_type {kind!r}; known: {', '.join(known)}")
    try:
        side = 448 if large_images else 224
        if max_pixels is not None:
            side = math.isqrt(max_pixels)
        named = name or str(config.get("name_or_path", kind))
        return _qwen(config, named, side) if kind == "qwen2_5_vl" else _llava(config, named, large_images)
    except KeyError as error:
        raise ModelError(f"{name or kind}: the configuration has no {error.args[0]!r}, which a plan needs") from error


def _llava(config: Mapping[str, Any], name: str, large_images: bool) -> Architecture:
    vision = config["vision_config"]
    hidden, intermediate = vision["hidden_size"], vision["intermediate_size"]
    side = vision["image_size"] // vision["patch_size"]
    patch_values = vision.get("num_channels", 3) * vision["patch_size"] ** 2
    has_cls = vision["model_type"] == "clip_vision_model"
    if vision["model_type"] not in ("clip_vision_model", "siglip_vision_model"):
        raise ModelError(f"{name}: no plan for a vision tower of type {vision['model_type']!r}; known: clip, siglip")
    embedding = patch_values * hidden + side**2 * hidden
    embedding += 4 * hidden if has_cls else hidden  # CLS, its position and the pre-norm; or the patches' bias
    feature_layer = config.get("vision_feature_layer", -2)
    feature_layer = max(feature_layer) if isinstance(feature_layer, list) else feature_layer
    blocks = vision["num_hidden_layers"]
    multi_crop = config["model_type"] != "llava"
    crops = 5 if multi_crop and large_images else 1
    per_crop = side**2 + int(has_cls and config.get("vision_feature_select_strategy") == "full")
    # The 2 x 2 crops form one picture with a newline token at the end of each row.
    visual = per_crop + (4 * side**2 + 2 * side if crops == 5 else 0)
    tower = Tower(
        hidden=hidden,
        intermediate=intermediate,
        blocks=blocks,
        used_blocks=feature_layer if feature_layer >= 0 else blocks + 1 + feature_layer,
        heads=vision["num_attention_heads"],
        tokens=side**2 + int(has_cls),
        crops=crops,
        patch_values=patch_values,
        embedding_parameters=embedding,
        unused_parameters=2 * hidden,
        block_parameters=4 * (hidden**2 + hidden) + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden,
        mlp_matrices=2,
        mlp_saved=3 if vision.get("hidden_act", "quick_gelu") == "quick_gelu" else 2,
        has_cls=has_cls,
    )
    llm = _llm(config["text_config"], config)
    layers = ((hidden, llm.hidden), (llm.hidden, llm.hidden))
    projector = Projector(layers, rows=crops * per_crop, extra=llm.hidden if multi_crop else 0)
    return Architecture(name, tower, projector, llm, visual, fixed_tokens=not multi_crop)


def _qwen(config: Mapping[str, Any], name: str, pixels: int) -> Architecture:
    """`pixels`: side of a square photo; what is left of it behind the last whole token is cut."""
    vision = config["vision_config"]
    hidden, intermediate = vision["hidden_size"], vision["intermediate_size"]
    merge = vision["spatial_merge_size"] ** 2
    patch_values = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    side = pixels // (vision["patch_size"] * vision["spatial_merge_size"]) * vision["spatial_merge_size"]
    tower = Tower(
        hidden=hidden,
        intermediate=intermediate,
        blocks=vision["depth"],
        used_blocks=vision["depth"],
        heads=vision["num_heads"],
        tokens=side**2,
        crops=1,
        patch_values=patch_values,
        embedding_parameters=patch_values * hidden,
        unused_parameters=0,
        block_parameters=4 * (hidden**2 + hidden) + 3 * hidden * intermediate + 2 * intermediate + hidden + 2 * hidden,
        mlp_matrices=3,
        mlp_saved=4,
        has_cls=False,
        window=(vision["window_size"] // vision["patch_size"]) ** 2,
        full_attention_blocks=frozenset(vision["fullatt_block_indexes"]),
    )
    llm = _llm(config.get("text_config", config), config)  # older files keep the text values at the top
    merged = merge * hidden
    projector = Projector(((merged, merged), (merged, llm.hidden)), rows=side**2 // merge, extra=hidden)
    return Architecture(name, tower, projector, llm, side**2 // merge, fixed_tokens=False)


def _llm(text: Mapping[str, Any], config: Mapping[str, Any]) -> LLM:
    heads = text["num_attention_heads"]
    return LLM(
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        qkv_bias=str(text.get("model_type", "")).startswith("qwen2"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )


def find_architecture(model_name_or_path: str, max_pixels: int | None = None) -> Architecture:
    """The architecture of a local model folder, or of a model whose facts ship with fastvkd (hub id or short name);
    `max_pixels` as in `architecture_of`."""
    folder = Path(model_name_or_path)
    if (folder / "config.json").is_file():
        from fastvkd.models.loading import load_config  # late: it imports transformers

        config = load_config(folder).to_dict()
        return architecture_of(config, name=model_name_or_path, max_pixels=max_pixels)
    known: dict[str, Path] = {}
    for file in sorted(ARCHITECTURES.glob("*.json")):
        known |= {file.stem: file, json.loads(file.read_text())["name_or_path"]: file}
    if folder.is_dir() and (notes := notes_on(model_name_or_path)):
        raise ModelError(f"{notes[0]} (there is no config.json)")
    if model_name_or_path not in known:
        near = difflib.get_close_matches(model_name_or_path, known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else f"; {ARCHITECTURES} is missing"
        raise ModelError(f"{model_name_or_path}: neither a folder with a config.json nor a known architecture{hint}")
    config = json.loads(known[model_name_or_path].read_text())
    return architecture_of(config, name=model_name_or_path, max_pixels=max_pixels)
