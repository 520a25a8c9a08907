"""What a run will cost, from the model's configuration alone: parameters, FLOPs, memory, and what fits on a card.

Closed formulas, no model is built and no weight read. Legend: T tokens of the LLM input, S tokens of the tower, H and
I hidden and intermediate widths, s bytes of a working value. FLOPs count a multiply-add as two, matrix products only,
as `torch.utils.flop_counter` does.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvkd.engines.optimizers import MOMENT_BYTES, MOMENT_BYTES_32BIT, check_optimizer
from fastvkd.errors import ModelError, SettingsError
from fastvkd.paths import shipped

if TYPE_CHECKING:
    from fastvkd.settings import Settings

ARCHITECTURES = shipped("configs/architectures")
GIB = 1024**3
GPU_MEMORY_GIB: dict[str, int] = {
    "A10": 24, "A100 40GB": 40, "A100 80GB": 80, "A40": 48, "B200": 180, "GH200": 96, "H100": 80, "H200": 141,
    "L4": 24, "L40S": 48, "RTX 3060": 12, "RTX 3090": 24, "RTX 4070 Ti": 12, "RTX 4080": 16, "RTX 4090": 24,
    "RTX 5080": 16, "RTX 5090": 32, "RTX 6000 Ada": 48, "RTX A6000": 48, "T4": 16, "V100 16GB": 16, "V100 32GB": 32,
}  # fmt: skip
# Datasheet peak of dense 16-bit matrix products with float32 accumulation, in TFLOP/s (T4 and V100: float16).
GPU_PEAK_TFLOPS: dict[str, float] = {
    "A10": 125, "A100 40GB": 312, "A100 80GB": 312, "A40": 150, "B200": 2250, "GH200": 989, "H100": 989, "H200": 989,
    "L4": 121, "L40S": 362, "RTX 3060": 25, "RTX 3090": 71, "RTX 4070 Ti": 80, "RTX 4080": 97, "RTX 4090": 165,
    "RTX 5080": 113, "RTX 5090": 209, "RTX 6000 Ada": 364, "RTX A6000": 155, "T4": 65, "V100 16GB": 125,
    "V100 32GB": 125,
}  # fmt: skip
# GB/s in one direction between the cards of a node: NVLink where the usual server has it, else PCIe.
GPU_LINK_GB_PER_S: dict[str, float] = {
    "A10": 32, "A100 40GB": 300, "A100 80GB": 300, "A40": 32, "B200": 900, "GH200": 450, "H100": 450, "H200": 450,
    "L4": 32, "L40S": 32, "RTX 3060": 32, "RTX 3090": 32, "RTX 4070 Ti": 32, "RTX 4080": 32, "RTX 4090": 32,
    "RTX 5080": 64, "RTX 5090": 64, "RTX 6000 Ada": 32, "RTX A6000": 32, "T4": 16, "V100 16GB": 150, "V100 32GB": 150,
}  # fmt: skip
# What a time estimate assumes, and says so. Shares are of the datasheet's figures.
ASSUMED = {
    "mfu": 0.45,  # of the peak of dense 16-bit matrix products
    "link_efficiency": 0.7,  # of the link's bandwidth, in collectives and copies
    "gpus_per_node": 8,
    "network_gb_per_s": 25.0,  # a GPU's share between nodes: 200 Gbit/s
    "pcie_gb_per_s": 32.0,  # PCIe 4.0 x16, to host memory
}
# CUDA context, cuBLAS workspaces and what the caching allocator cannot use: kept free of the card's memory.
RESERVED_BYTES = 800 * 1024**2
PREFIX_TOKENS = 5  # BOS and "USER: " or the like before the image; the text after it is cut
_QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # NF4: one float32 absmax per 64 weights
_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
_DS_BUCKET = 50_000_000  # elements, as the presets in ds_configs set it


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


def architecture_of(config: Mapping[str, Any], *, name: str = "", large_images: bool = True) -> Architecture:
    """Read an `Architecture` from a config.json's values (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL).

    Models of variable resolution are counted at a large square image: 2 x 2 crops plus the overview for LLaVA-NeXT and
    -OneVision, 448 x 448 pixels for Qwen2.5-VL; with `large_images` False, at one crop. Raises ModelError for another
    model type and for a missing value.
    """
    kind = config.get("model_type")
    readers = {"llava": _llava, "llava_next": _llava, "llava_onevision": _llava, "qwen2_5_vl": _qwen}
    if kind not in readers:
        raise ModelError(f"{name or kind}: no plan for model_type {kind!r}; known: {', '.join(readers)}")
    try:
        return readers[kind](config, name or str(config.get("name_or_path", kind)), large_images)
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
    llm = _llm(config["text_config"])
    layers = ((hidden, llm.hidden), (llm.hidden, llm.hidden))
    projector = Projector(layers, rows=crops * per_crop, extra=llm.hidden if multi_crop else 0)
    return Architecture(name, tower, projector, llm, visual)


def _qwen(config: Mapping[str, Any], name: str, large_images: bool) -> Architecture:
    vision = config["vision_config"]
    hidden, intermediate = vision["hidden_size"], vision["intermediate_size"]
    merge = vision["spatial_merge_size"] ** 2
    patch_values = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    side = (448 if large_images else 224) // vision["patch_size"]
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
    llm = _llm(config.get("text_config", config))  # older files keep the text values at the top
    merged = merge * hidden
    projector = Projector(((merged, merged), (merged, llm.hidden)), rows=side**2 // merge, extra=hidden)
    return Architecture(name, tower, projector, llm, side**2 // merge)


def _llm(text: Mapping[str, Any]) -> LLM:
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
    )


def find_architecture(model_name_or_path: str) -> Architecture:
    """The architecture of a local model folder, or of a model whose facts ship with fastvkd (hub id or short name)."""
    folder = Path(model_name_or_path)
    if (folder / "config.json").is_file():
        from fastvkd.models.loading import load_config  # late: it imports transformers

        return architecture_of(load_config(folder).to_dict(), name=model_name_or_path)
    known: dict[str, Path] = {}
    for file in sorted(ARCHITECTURES.glob("*.json")):
        known |= {file.stem: file, json.loads(file.read_text())["name_or_path"]: file}
    if model_name_or_path not in known:
        near = difflib.get_close_matches(model_name_or_path, known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else f"; {ARCHITECTURES} is missing"
        raise ModelError(f"{model_name_or_path}: neither a folder with a config.json nor a known architecture{hint}")
    return architecture_of(json.loads(known[model_name_or_path].read_text()), name=model_name_or_path)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that decide its cost."""

    sites: tuple[str, ...]
    trainable: str = "vision+projector"
    optim: str = "adamw_8bit"
    bf16: bool = True
    quantize_llm: str = "none"
    gradient_checkpointing: bool = False
    eager_attention: bool = False
    micro_batch: int = 16
    gradient_accumulation_steps: int = 1
    online_teacher: bool = False
    cache_dtype: str = "float32"
    zero_stage: int = 0  # 0 also stands for the local engine
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int = 1


class Cost:
    """FLOPs per image and bytes per GPU of a recipe on an architecture."""

    def __init__(self, architecture: Architecture, recipe: Recipe, *, prefix_tokens: int = PREFIX_TOKENS) -> None:
        check_optimizer(recipe.optim)
        self.architecture = architecture
        self.recipe = recipe
        self.tokens = prefix_tokens + architecture.visual_tokens
        sites = [_parse_site(site, architecture) for site in recipe.sites]
        self._llm_layers = max((k for kind, k in sites if kind == "llm"), default=0)
        self._to_projector = any(kind != "vision" for kind, _ in sites)
        deepest = max((k for kind, k in sites if kind == "vision"), default=0)
        tower = architecture.tower
        self._run_blocks = tower.blocks if self._to_projector else deepest
        used = max(tower.used_blocks, deepest) if self._to_projector else deepest
        self._trained_blocks = used if "vision" in recipe.trainable else 0
        self._train_projector = self._to_projector and "projector" in recipe.trainable
        if not self._trained_blocks and not self._train_projector:
            raise ModelError(f"trainable={recipe.trainable!r} reaches nothing at the sites {', '.join(recipe.sites)}")

    @property
    def llm_layers(self) -> int:
        """LLM layers that are loaded and run."""
        return self._llm_layers

    @cached_property
    def trainable(self) -> int:
        tower = self.architecture.tower
        count = self.architecture.projector.parameters if self._train_projector else 0
        if self._trained_blocks:
            count += tower.embedding_parameters + self._trained_blocks * tower.block_parameters
        return count

    @cached_property
    def visual(self) -> int:
        """All parameters of tower and projector."""
        tower = self.architecture.tower
        fixed = tower.embedding_parameters + tower.unused_parameters + self.architecture.projector.parameters
        return fixed + tower.blocks * tower.block_parameters

    @cached_property
    def frozen(self) -> int:
        llm = self.architecture.llm
        return self.visual - self.trainable + llm.vocabulary * llm.hidden + self._llm_layers * llm.layer_parameters

    def flops(self) -> dict[str, int]:
        """FLOPs of one image in one training step: forward, and backward without frozen weights' gradients.

        Model FLOPs: that fused attention recomputes its scores (half its forward again) is not counted; what
        `gradient_checkpointing` recomputes is.
        """
        a = self.architecture
        tower_forward = a.tower.embedding_flops()
        tower_forward += sum(a.tower.linear_flops() + a.tower.attention_flops(b) for b in range(self._run_blocks))
        tower_backward = 0
        if self._trained_blocks:
            tower_backward += a.tower.embedding_flops()  # its weights only: pixels need no gradient
            for block in range(self._trained_blocks):
                tower_backward += 2 * (a.tower.linear_flops() + a.tower.attention_flops(block))
        if self._to_projector:
            forward = a.projector.flops()
            tower_forward += forward
            first_layer = 2 * a.projector.rows * math.prod(a.projector.layers[0])
            if self._train_projector:
                tower_backward += forward
            # Gradients of the inputs: of the first layer only if something lies below it.
            tower_backward += forward - (0 if self._trained_blocks else first_layer)
        linear, scores = a.llm.linear_flops(self.tokens), a.llm.attention_flops(self.tokens)
        llm_forward = self._llm_layers * (linear + scores)
        llm_backward = self._llm_layers * (linear + 2 * scores)
        if self.recipe.gradient_checkpointing:
            tower_backward += self._trained_blocks * a.tower.linear_flops()
            tower_backward += sum(a.tower.attention_flops(b) for b in range(self._trained_blocks))
            llm_backward += llm_forward
        if self.recipe.online_teacher:  # a second forward pass, no backward
            tower_forward *= 2
            llm_forward *= 2
        parts = {
            "tower_forward": tower_forward,
            "tower_backward": tower_backward,
            "llm_forward": llm_forward,
            "llm_backward": llm_backward,
        }
        return parts | {"total": sum(parts.values())}

    def activation_bytes_per_image(self) -> float:
        """What the backward pass of one image keeps, plus the inputs and targets of the loss."""
        a, r = self.architecture, self.recipe
        s = 2 if r.bf16 else 4
        tower, llm = a.tower, a.llm
        gated = tower.mlp_matrices == 3
        # Norms' inputs and outputs, q, k, v, attention output, MLP: (8 H + m I) values; RMSNorm also a float32 copy.
        block = (8 * tower.hidden + tower.mlp_saved * tower.intermediate) * s + (8 * tower.hidden if gated else 0)
        # Frozen weights: linear layers keep nothing, RMSNorm its float32 input, SDPA q, k, v and out, the MLP 3 I.
        kv = llm.kv_heads * llm.head_dim
        layer = 8 * llm.hidden + (2 * llm.attention_width + 2 * kv + 3 * llm.intermediate) * s
        if r.eager_attention:  # softmax in float32 and its copy in the working dtype
            score_bytes = 4 if s == 4 else 4 + s
            block += tower.heads * tower.tokens * score_bytes
            layer += llm.heads * self.tokens * score_bytes
        block *= tower.crops * tower.tokens
        layer *= self.tokens
        if r.gradient_checkpointing:  # block inputs, and one block at a time recomputed
            tower_bytes = self._trained_blocks * tower.crops * tower.tokens * tower.hidden * s
            tower_bytes += block if self._trained_blocks else 0
            llm_bytes = self._llm_layers * self.tokens * llm.hidden * s + (layer if self._llm_layers else 0)
        else:
            tower_bytes = self._trained_blocks * block
            llm_bytes = self._llm_layers * layer
        # A block above the feature layer is run by transformers all the same; its graph is dropped with the output.
        with_unused = tower_bytes + (self._run_blocks - self._trained_blocks) * block if self._trained_blocks else 0
        projector_bytes = 0
        if self._to_projector:
            (first, middle), (_, last) = a.projector.layers
            projector_bytes = a.projector.rows * (first + middle * 2 + last) * s
        loss = sum(self._site_values(site) for site in r.sites) * (
            2 * s + 4
        )  # features, their gradient, float32 target
        return max(with_unused, tower_bytes + projector_bytes + llm_bytes + self.tokens * llm.hidden * s + loss)

    def _site_values(self, site: str) -> int:
        kind, _ = _parse_site(site, self.architecture)
        if kind == "vision":
            tower = self.architecture.tower
            return tower.crops * (tower.tokens - int(tower.has_cls)) * tower.hidden
        return self.architecture.visual_tokens * self.architecture.llm.hidden

    def cache_bytes_per_image(self) -> int:
        """Bytes on disk of the teacher's features of one image at all sites; 0 with an online teacher."""
        if self.recipe.online_teacher:
            return 0
        return sum(self._site_values(site) for site in self.recipe.sites) * _CACHE_BYTES[self.recipe.cache_dtype]

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Bytes on each GPU at the peak of a step.

        `total` is below the sum without gradient accumulation: a gradient appears as its activations go, so the peak
        holds the larger of the two, not both.
        """
        a, r = self.architecture, self.recipe
        s = 2 if r.bf16 else 4
        shards = r.world_size
        quantized = self._llm_layers * a.llm.matrices
        frozen = (self.frozen - quantized) * s + quantized * _QUANTIZED_BYTES.get(r.quantize_llm, s)
        if r.online_teacher:
            frozen += self.visual * s  # a frozen copy of the tower and projector; the LLM is shared
        weights = frozen + self.trainable * s
        if r.zero_stage == 3:
            largest = max(a.llm.layer_parameters if self._llm_layers else 0, a.llm.vocabulary * a.llm.hidden)
            live = min(self.frozen + self.trainable, 2 * largest) * s  # the layer in use and the next one
            weights = live + (0 if r.offload_parameters else weights / shards)
        masters = self.trainable * 4.0 if r.bf16 else 0.0
        vectors = self.trainable * _vector_share(a.tower)
        moments = (self.trainable - vectors) * MOMENT_BYTES[r.optim] + vectors * MOMENT_BYTES_32BIT[r.optim]
        gradients = self.trainable * 4.0
        if r.zero_stage:
            masters, moments = masters / shards, moments / shards
            bucket = min(_DS_BUCKET, self.trainable) * s
            gradients = gradients / shards + bucket if r.zero_stage >= 2 else gradients + bucket
        if r.offload_optimizer:
            masters = moments = 0.0
            gradients = min(_DS_BUCKET, self.trainable) * s * 2.0
        activations = micro_batch * self.activation_bytes_per_image()
        accumulating = r.gradient_accumulation_steps > 1
        peak = activations + gradients if accumulating else max(activations, gradients)
        parts = {
            "weights": int(weights),
            "masters": int(masters),
            "moments": int(moments),
            "gradients": int(gradients),
            "activations": int(activations),
        }
        return parts | {"total": int(weights + masters + moments + peak)}

    def traffic(self) -> dict[str, float]:
        """Bytes that each GPU sends over the links (`gather`) and to or from host memory (`pcie`), by occasion.

        `*_micro` at every micro-batch, `*_update` at every optimiser update. Ring collectives: an all-gather or a
        reduce-scatter of V bytes sends V (n - 1) / n from each of n ranks.
        """
        r = self.recipe
        s = 2 if r.bf16 else 4
        ring = (r.world_size - 1) / r.world_size
        everything, trained = (self.frozen + self.trainable) * s, self.trainable * s
        gather_micro = gather_update = pcie_micro = pcie_update = 0.0
        if r.zero_stage == 3:
            gather_micro = ring * (2 * everything + trained)  # weights before forward and backward, then gradients
        else:
            gather_update = ring * 2 * trained  # gradients reduced, then (or as part of it) weights or sums gathered
        if r.offload_parameters:
            pcie_micro = 2 * everything / r.world_size
        if r.offload_optimizer:
            pcie_update = 2 * trained / r.world_size  # gradients down, new weights up
        return {
            "gather_micro": gather_micro,
            "gather_update": gather_update,
            "pcie_micro": pcie_micro,
            "pcie_update": pcie_update,
        }

    def step_seconds(self, card: str) -> dict[str, float]:
        """Seconds of one optimiser update on cards of the kind `card`, under `ASSUMED`: an estimate, not a measurement.

        `compute`, `gather`, `pcie`; `overlapped` is the longest of the three, as if the others hid behind it, and
        `serial` their sum: the truth lies between. `images_per_second_*` count the images of all ranks.
        """
        r, parts = self.recipe, self.recipe.gradient_accumulation_steps
        link = GPU_LINK_GB_PER_S[card]
        if r.world_size > ASSUMED["gpus_per_node"]:
            link = min(link, ASSUMED["network_gb_per_s"])
        moved = self.traffic()

        def seconds(kind: str, gb_per_s: float) -> float:
            total = parts * moved[f"{kind}_micro"] + moved[f"{kind}_update"]
            return total / (gb_per_s * 1e9 * ASSUMED["link_efficiency"])

        flops = parts * r.micro_batch * self.flops()["total"]
        compute = flops / (GPU_PEAK_TFLOPS[card] * 1e12 * ASSUMED["mfu"])
        gather, pcie = seconds("gather", link), seconds("pcie", ASSUMED["pcie_gb_per_s"])
        overlapped, serial = max(compute, gather, pcie), compute + gather + pcie
        images = parts * r.micro_batch * r.world_size
        return {
            "compute": compute,
            "gather": gather,
            "pcie": pcie,
            "overlapped": overlapped,
            "serial": serial,
            "images_per_second_serial": images / serial,
            "images_per_second_overlapped": images / overlapped,
        }

    def largest_micro_batch(self, memory_bytes: int) -> int:
        """The largest micro-batch that fits, 0 when not even one image does."""
        budget = memory_bytes - RESERVED_BYTES
        if self.memory(1)["total"] > budget:
            return 0
        low, high = 1, 2
        while high < 65536 and self.memory(high)["total"] <= budget:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle)["total"] <= budget else (low, middle)
        return low


def _vector_share(tower: Tower) -> float:
    """Share of a block's parameters in norms and biases, whose moments stay in 32 bit."""
    matrices = 4 * tower.hidden**2 + tower.mlp_matrices * tower.hidden * tower.intermediate
    return 1 - matrices / tower.block_parameters


def _parse_site(site: str, architecture: Architecture) -> tuple[str, int]:
    match = re.fullmatch(r"projector|(vision|llm):(\d+)", site)
    if match is None:
        raise ModelError(f"site {site!r}: write vision:<k>, projector or llm:<k> with a number k >= 0")
    if site == "projector":
        return "projector", 0
    kind, k = match[1], int(match[2])
    depth = architecture.tower.blocks if kind == "vision" else architecture.llm.layers
    if k > depth:
        raise ModelError(f"site {site!r}: {architecture.name} has only {depth} layers there; choose 0 to {depth}")
    return kind, k


@dataclass(frozen=True)
class Plan:
    """The answer of `fastvkd plan`; `to_dict` is its JSON, `table` its text."""

    name: str
    recipe: Recipe
    llm_layers_loaded: int
    llm_layers: int
    parameters: dict[str, int]
    flops_per_image: dict[str, int]
    memory_bytes: dict[str, int]
    micro_batch: int | None
    cache_bytes_per_image: int
    fits: bool | None
    recommendation: dict[str, Any]
    gpu_memory_bytes: int | None
    step_seconds: dict[str, float] | None  # None when no card was named

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON keys."""
        keys = "llm_layers_loaded parameters flops_per_image memory_bytes micro_batch cache_bytes_per_image fits"
        return {key: getattr(self, key) for key in [*keys.split(), "recommendation", "step_seconds"]}

    def table(self) -> str:
        """A text table for people."""
        gib = {key: f"{value / GIB:.2f} GiB" for key, value in self.memory_bytes.items()}
        flops = {key: f"{value / 1e12:.2f} TFLOP" for key, value in self.flops_per_image.items()}
        lines = [
            f"{self.name}: sites {', '.join(self.recipe.sites)}, {self.recipe.optim}, "
            f"{self.recipe.world_size} GPU(s), ZeRO-{self.recipe.zero_stage}, quantize_llm {self.recipe.quantize_llm}",
            f"LLM layers loaded       {self.llm_layers_loaded} of {self.llm_layers}",
            f"parameters              {self.parameters['trainable'] / 1e6:,.1f} M trained, "
            f"{self.parameters['frozen'] / 1e6:,.1f} M frozen and loaded",
            "FLOPs per image         " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in flops.items()),
            f"memory per GPU at {self.recipe.micro_batch} images",
        ]
        lines += [f"  {key:<21} {value:>12}" for key, value in gib.items()]
        lines.append("  (total: weights, masters, moments, and the larger of gradients and activations,")
        lines.append("   or both when gradients are accumulated)")
        if not self.recipe.online_teacher:
            lines.append(f"teacher cache on disk   {self.cache_bytes_per_image / 1e6:.2f} MB per image")
        if self.gpu_memory_bytes is not None:
            fits = "fits" if self.fits else "does not fit"
            lines.append(f"as configured           {fits} in {self.gpu_memory_bytes / GIB:.0f} GiB; ")
            lines[-1] += f"largest micro-batch {self.micro_batch}"
        if self.step_seconds is not None:
            t = self.step_seconds
            assumed = f"{ASSUMED['mfu']:.0%} MFU, links at {ASSUMED['link_efficiency']:.0%}"
            terms = ", ".join(f"{key} {1e3 * t[key]:.1f} ms" for key in ("compute", "gather", "pcie"))
            lines.append(f"estimate of an update   {terms} (assuming {assumed}): ")
            low, high = t["images_per_second_serial"], t["images_per_second_overlapped"]
            lines[-1] += f"{low:.1f}" + (f" to {high:.1f}" if high > 1.005 * low else "") + " images/s"
        lines.append(f"recommendation          {self.recommendation['reason']}")
        return "\n".join(lines)


def plan(
    settings: "Settings",
    *,
    gpu: str | None = None,
    memory: str | None = None,
    world_size: int = 1,
    architecture: Architecture | None = None,
) -> Plan:
    """Cost of a run with `settings` on `world_size` GPUs of the kind `gpu`, or with `memory` ("24GiB") each.

    Without either, nothing is said about fitting. Raises SettingsError for an unknown card or a memory that cannot be
    read, ModelError for an unknown architecture or a site deeper than the model.
    """
    if world_size < 1:
        raise SettingsError(f"--world-size {world_size}: must be at least 1")
    architecture = architecture or find_architecture(settings.model_name_or_path)
    memory_bytes = gpu_memory(gpu=gpu, memory=memory)
    recipe = recipe_of(settings, world_size)
    cost = Cost(architecture, recipe)
    needed = cost.memory(recipe.micro_batch)
    return Plan(
        name=architecture.name,
        recipe=recipe,
        llm_layers_loaded=cost.llm_layers,
        llm_layers=architecture.llm.layers,
        parameters={"trainable": cost.trainable, "frozen": cost.frozen},
        flops_per_image=cost.flops(),
        memory_bytes=needed,
        micro_batch=None if memory_bytes is None else cost.largest_micro_batch(memory_bytes),
        cache_bytes_per_image=cost.cache_bytes_per_image(),
        fits=None if memory_bytes is None else needed["total"] + RESERVED_BYTES <= memory_bytes,
        recommendation=recommend(architecture, recipe, memory_bytes),
        gpu_memory_bytes=memory_bytes,
        step_seconds=None if gpu is None else cost.step_seconds(card_name(gpu)),
    )


def recipe_of(settings: "Settings", world_size: int) -> Recipe:
    """The cost-bearing part of `settings`; the DeepSpeed configuration is read for its ZeRO stage and offloading.

    Raises SettingsError for a method that reads answers: its cost depends on the lengths of questions.
    """
    if settings.method != "vkd":
        raise SettingsError(f"method={settings.method}: plans are made for method=vkd; leave it out to compare")
    if settings.answer_loss != "none":
        raise SettingsError(
            f"answer_loss={settings.answer_loss} reads answers through the whole LLM, whose cost depends on their "
            "lengths: plans are made for answer_loss=none"
        )
    stage, offload_optimizer, offload_parameters = 0, False, False
    if settings.deepspeed:
        from fastvkd.engines.ds_config import read_ds_config

        zero = read_ds_config(settings.deepspeed).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        offload_optimizer = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        offload_parameters = zero.get("offload_param", {}).get("device", "none") != "none"
    return Recipe(
        sites=tuple(settings.sites),
        trainable=settings.trainable,
        optim=settings.optim,
        bf16=settings.bf16,
        quantize_llm=settings.quantize_llm,
        gradient_checkpointing=settings.gradient_checkpointing,
        eager_attention=settings.attn_implementation == "eager",
        micro_batch=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        online_teacher=settings.online_teacher,
        cache_dtype=settings.cache_dtype,
        zero_stage=stage,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        world_size=world_size,
    )


def gpu_memory(*, gpu: str | None, memory: str | None) -> int | None:
    """Bytes of a card by its name, or of a size like "24GiB" (GB and G mean the same); None when neither is given."""
    if memory is not None:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)\s*", memory, re.IGNORECASE)
        if match is None:
            raise SettingsError(f"--memory {memory!r}: write a size like 24GiB")
        return int(float(match[1]) * GIB)
    return None if gpu is None else GPU_MEMORY_GIB[card_name(gpu)] * GIB


def card_name(gpu: str) -> str:
    """The table's name of a card that the user wrote in his own way. Raises SettingsError for an unknown one."""
    simple = {name.replace(" ", "").lower(): name for name in GPU_MEMORY_GIB}
    wanted = re.sub(r"nvidia|geforce|[ _-]", "", gpu.lower())
    if wanted not in simple:
        near = simple[difflib.get_close_matches(wanted, simple, n=1, cutoff=0.0)[0]]
        raise SettingsError(f"--gpu {gpu!r}: unknown card; did you mean {near!r}? Otherwise give --memory 24GiB")
    return simple[wanted]


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a card by its driver's name for it ("NVIDIA H100 80GB HBM3"); None for one not in the table."""
    simple = re.sub(r"[ _-]", "", device_name).lower()
    found = [name for name in GPU_PEAK_TFLOPS if re.sub(r" \d+GB$", "", name).replace(" ", "").lower() in simple]
    return GPU_PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def recommend(architecture: Architecture, recipe: Recipe, memory_bytes: int | None) -> dict[str, Any]:
    """The first way, from cheapest to dearest in time, in which at least two images (one of each set) fit.

    Returns `zero_stage`, `deepspeed` (a preset of ds_configs, None for the local engine), `quantize_llm`, `optim`,
    `gradient_checkpointing`, `micro_batch`, `gradient_accumulation_steps` and the `reason`; the first seven are None
    when no memory was given or nothing fits.
    """
    keys = ("zero_stage", "deepspeed", "quantize_llm", "optim", "gradient_checkpointing")
    nothing = dict.fromkeys((*keys, "micro_batch", "gradient_accumulation_steps"))
    if memory_bytes is None:
        return nothing | {"reason": "give --gpu or --memory to see what fits"}
    images = recipe.micro_batch * recipe.gradient_accumulation_steps
    for preset, changes, reason in _candidates(recipe):
        candidate = dataclasses.replace(recipe, **changes)
        micro_batch = min(Cost(architecture, candidate).largest_micro_batch(memory_bytes), images)
        accumulation = math.ceil(images / micro_batch) if micro_batch else 0
        if accumulation > 1:  # accumulated gradients stay beside the activations
            accumulating = dataclasses.replace(candidate, gradient_accumulation_steps=accumulation)
            micro_batch = min(Cost(architecture, accumulating).largest_micro_batch(memory_bytes), images)
            accumulation = math.ceil(images / micro_batch) if micro_batch else 0
        if micro_batch < 2:
            continue
        engine = f"deepspeed={preset}" if preset else "the local engine"
        return {
            "zero_stage": candidate.zero_stage,
            "deepspeed": preset,
            "quantize_llm": candidate.quantize_llm,
            "optim": candidate.optim,
            "gradient_checkpointing": candidate.gradient_checkpointing,
            "micro_batch": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "reason": f"{engine}, quantize_llm={candidate.quantize_llm}, {candidate.optim}, "
            f"{micro_batch} images x {accumulation} accumulation step(s): {reason}",
        }
    return nothing | {
        "reason": f"does not fit in {memory_bytes / GIB:.0f} GiB in any way known here; "
        "choose a shallower site (projector), or trainable=projector"
    }


def _candidates(recipe: Recipe) -> Iterable[tuple[str | None, dict[str, Any], str]]:
    many = recipe.world_size > 1
    base: dict[str, Any] = {"zero_stage": 2 if many else 0, "offload_optimizer": False, "offload_parameters": False}
    preset = "zero2" if many else None
    resident = "the truncated LLM fits resident, so nothing is gathered or moved between steps"
    yield preset, base, resident
    if not recipe.optim.endswith("8bit"):
        base = base | {"optim": "adamw_8bit"}
        yield preset, base, f"{resident}, with 8-bit moments"
    if not recipe.bf16:
        base = base | {"bf16": True}
        yield preset, base, f"{resident}, in bf16 with float32 masters (set bf16=true)"
    base = base | {"gradient_checkpointing": True}
    yield preset, base, "activations are recomputed, a third more time"
    offload = base | {"zero_stage": 2, "offload_optimizer": True}
    yield "zero2_offload_optimizer", offload | {"optim": "adamw_torch"}, "masters and moments live in host memory"
    if recipe.quantize_llm == "none":
        yield preset, base | {"quantize_llm": "nf4"}, "the frozen LLM in 4 bit, a little slower and less exact"
    whole = base | {"zero_stage": 3, "quantize_llm": "none"}
    if many:
        yield "zero3", whole, "the frozen LLM is spread over the GPUs and gathered layer by layer"
    whole = whole | {"offload_optimizer": True, "offload_parameters": True, "optim": "adamw_torch"}
    yield "zero3_offload", whole, "the frozen LLM is larger than the cards and streams from host memory: slow"
