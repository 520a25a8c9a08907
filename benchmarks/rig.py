"""The parts of a training step's benchmark: models of real shape with random weights, images, and steps of every kind.

(a) is written as the public RMU and MMUnlearner loops are; each later letter changes one thing, (h) the site of the
loss. `step.py` compares and times them.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastvkd_kernels import patch_frozen
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from fastvkd.engines.local import LocalEngine
from fastvkd.engines.optimizers import MOMENT_BYTES
from fastvkd.models import families
from fastvkd.models.compiled import compiled_blocks
from fastvkd.models.families import family_of, parse_site
from fastvkd.models.loading import truncated_config
from fastvkd.models.patch_sequences import batch_pieces, rope_positions
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.planning.architecture import ARCHITECTURES, Architecture
from fastvkd.planning.cost import Cost, Recipe
from fastvkd.unlearning.prefetch import prefetched
from fastvkd.unlearning.vkd.objective import DistillBatch, VisualDistillation
from fastvkd.unlearning.vkd.targets import SiteLoss, TargetTable
from fastvkd.unlearning.vkd.teacher import FeatureCache, fill_caches, frozen_copy

TINY = {
    "model_type": "llava",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_token_index": 3,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "num_channels": 3, "hidden_act": "quick_gelu",
    },
    # as in LLaVA-1.5-7B, a token costs lm_head two thirds of what it costs a layer
    "text_config": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A model's configuration, the site of the loss, and the text tokens before and behind the image."""

    facts: dict[str, Any]
    site: str
    prefix: int
    suffix: int
    batch: int
    bf16: bool


def _real(name: str, batch: int, site: str = "llm:8") -> Preset:
    return Preset(json.loads((ARCHITECTURES / f"{name}.json").read_text()), site, 5, 55, batch, True)


PRESETS: dict[str, Callable[[], Preset]] = {
    "tiny": lambda: Preset(TINY, "llm:2", prefix=5, suffix=25, batch=8, bf16=False),
    "llava-1.5-7b": lambda: _real("llava-1.5-7b", 8),
    "llava-1.5-13b": lambda: _real("llava-1.5-13b", 8),
    "qwen2.5-vl-7b": lambda: _real("qwen2.5-vl-7b", 8),
}


@dataclass(frozen=True)
class Variant:
    """What a step does; each letter keeps what the letters before it have."""

    letter: str
    name: str
    truncated: bool = False
    suffix_dropped: bool = False
    cached: bool = False
    fused: bool = False  # the product's objective: both sets in one pass, fused loss, frozen RMSNorm and SwiGLU
    compiled: bool = False
    optim: str = "adamw_torch"
    site: str | None = None  # of the loss, where it is not the preset's

    def on(self, preset: Preset) -> Preset:
        """The preset with the variant's own site."""
        return preset if self.site is None else replace(preset, site=self.site)

    @property
    def plain(self) -> "Variant":
        """The plain step at its own site that this one must agree with: eager, a pass for each set, a second model."""
        return replace(B, letter=self.letter, site=self.site)


A = Variant("a", "reference: whole prompt, all layers, second model, hidden[mask]")
B = replace(A, letter="b", name="+ LLM truncated at the site", truncated=True)
C = replace(B, letter="c", name="+ text behind the image dropped", suffix_dropped=True)
D = replace(C, letter="d", name="+ teacher cached", cached=True)
E = replace(D, letter="e", name="+ fused kernels, one pass for both sets", fused=True)
COMPILED = replace(E, letter="f", name="+ torch.compile of blocks and layers", compiled=True)
EIGHT_BIT = replace(COMPILED, letter="g", name="+ 8-bit optimiser", optim="adamw_8bit")
# another objective, the recipes' own: no layer of the LLM runs or is loaded
PROJECTOR = replace(COMPILED, letter="h", name="(f) at `projector`, where no LLM layer runs", site="projector")
VARIANTS = (A, B, C, D, E, COMPILED, EIGHT_BIT, PROJECTOR)
LAMBDA_FORGET, LAMBDA_RETAIN = 1.0, 4.0

aten = torch.ops.aten
CPU_SDPA = {  # the counter knows the CUDA kernels of fused attention only
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def configuration(preset: Preset) -> Any:
    facts = copy.deepcopy({k: v for k, v in preset.facts.items() if k != "name_or_path"})
    return AutoConfig.for_model(**facts)


def build_model(preset: Preset, device: torch.device, *, layers: int | None = None) -> Any:
    """The whole model with random weights, or its base with `layers` decoder layers and no lm_head; the same seed."""
    config = configuration(preset)
    dtype = torch.bfloat16 if preset.bf16 else torch.float32
    torch.manual_seed(0)
    with device:
        if layers is None:
            model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        else:
            model = AutoModel.from_config(truncated_config(config, layers), dtype=dtype)
            families.language_model(model, family_of(model)).norm = nn.Identity()
    batch_pieces(model)
    model.eval()
    return model


def visual_parameters(model: nn.Module, preset: Preset) -> list[tuple[str, nn.Parameter]]:
    """The trainable weights, and requires_grad on them alone."""
    found = families.visual_parameters(model, family_of(model), "vision+projector", [preset.site])
    families.train_only(model, [p for _, p in found])
    return found


@torch.no_grad()
def disturb(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Move the student off its teacher, where every retain loss and its gradient would be exactly zero."""
    for number, (_, parameter) in enumerate(parameters):
        generator = torch.Generator(parameter.device).manual_seed(number)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        parameter.add_((0.02 * noise).to(parameter.dtype))


class Images:
    """Random images as model inputs on the host: `batch` images of each set, and the noise images forget images aim at.

    `whole[set]` are whole prompts, `cut[set]` end with the image, `both` has the two sets in one batch; page-locked for
    a GPU, whichever variant takes them.
    """

    def __init__(self, preset: Preset, config: Any, forget: int, retain: int, pin: bool = False):
        dtype = torch.bfloat16 if preset.bf16 else torch.float32
        generator = torch.Generator().manual_seed(1)
        self.forget, self.retain = forget, retain

        def prompts(count: int, suffix: int, pixels: dict[str, Tensor]) -> VisualBatch:
            batch = make_batch(config, count, preset.prefix, suffix, pixels)
            return batch.pin_memory() if pin else batch

        pixels = {
            name: random_pixels(config, count, dtype, generator)
            for name, count in (("forget", forget), ("retain", retain), ("noise", forget))
        }
        counts = {"forget": forget, "retain": retain, "noise": forget}
        self.whole = {name: prompts(counts[name], preset.suffix, pixels[name]) for name in counts}
        self.cut = {name: prompts(counts[name], 0, pixels[name]) for name in counts}
        joined = {key: torch.cat([pixels["forget"][key], pixels["retain"][key]]) for key in pixels["forget"]}
        self.both = prompts(forget + retain, 0, joined)
        self.keys = [f"noise-{i}" for i in range(forget)] + [f"retain-{i}" for i in range(retain)]


def random_pixels(config: Any, count: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    vision = config.vision_config
    if config.model_type == "llava":
        shape: tuple[int, ...] = (count, 3, vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}
    side = 448 // vision.patch_size  # Qwen-VL: patches in one long sequence
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(count * side * side, values, generator=generator).to(dtype),
        "image_grid_thw": torch.tensor([[1, side, side]] * count),
    }


def make_batch(config: Any, count: int, prefix: int, suffix: int, pixels: dict[str, Tensor]) -> VisualBatch:
    """Prompts of `prefix` text tokens, the image, `suffix` text tokens."""
    if config.model_type == "llava":
        visual = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        entries = 1
    else:
        entries = int(pixels["image_grid_thw"][0].prod())
        visual = entries // config.vision_config.spatial_merge_size**2
    length = prefix + visual + suffix
    ids = torch.arange(10, 10 + length).repeat(count, 1)
    ids[:, prefix : prefix + visual] = families.image_token_id(config)
    inputs = {"input_ids": ids, **pixels}
    if config.model_type != "llava":
        inputs["mm_token_type_ids"] = types = (ids == families.image_token_id(config)).long()
        merge = config.vision_config.spatial_merge_size
        inputs["position_ids"] = rope_positions(types, pixels["image_grid_thw"].tolist(), merge)
    image = torch.arange(count)
    rows = image[:, None] * length + torch.arange(prefix, prefix + visual)
    token_images = image.repeat_interleave(visual)
    return VisualBatch(inputs, count, rows.flatten(), token_images, image.repeat_interleave(entries))


class Rig:
    """Everything that a variant's step needs; `step` is one training step, data transfer and update included.

    `engines` holds one engine for each set of weights and optimiser, made when it is first asked for; rigs that share
    weights must share it, since an engine takes the gradients of its weights away.
    """

    def __init__(
        self, variant: Variant, preset: Preset, device: torch.device, folder: Path, student: Any, teacher: Any,
        engines: dict[Any, LocalEngine] | None = None,
    ):  # fmt: skip
        self.variant, self.device = variant, device
        self.preset = preset = variant.on(preset)
        self.student, self.teacher = student, teacher
        self.parameters = visual_parameters(student, preset)
        self._folder = folder
        self._engines = {} if engines is None else engines
        self._loading = contextlib.ExitStack()
        self.path = VisualPath(student, [preset.site])
        self.plain: Rig | None = None  # what it is compared with, where that is no other variant

    def load(self, images: Images, scale: float) -> None:
        """Take up `images`; a cached teacher writes its features down here, once, outside the step."""
        self.close()
        self.images, self.scale = images, scale
        if self.variant.cached:
            dtype = "bfloat16" if self.preset.bf16 else "float32"
            identity = {"images": len(images.keys)}
            self.cache = FeatureCache(self._folder, site=self.preset.site, dtype=dtype, ingredients=identity)
            for name in ("noise", "retain"):
                path, batch, keys = VisualPath(self.teacher, [self.preset.site]), images.cut[name], self._keys(name)
                fill_caches(
                    {self.preset.site: self.cache}, path, dict.fromkeys(keys), lambda _, b=batch: b, self.device,
                    batch_size=len(keys),
                )  # fmt: skip
            self.table = TargetTable(self.cache, {}, SiteLoss(1.0, scale=scale))
        if self.variant.fused:
            self.objective = VisualDistillation(
                self.path, distance="mse", lambda_forget=LAMBDA_FORGET, lambda_retain=LAMBDA_RETAIN
            )
        # as in training: a thread keeps two batches ready
        self._batches = self._loading.enter_context(prefetched(lambda _: self._load(), range(sys.maxsize), 2))

    def close(self) -> None:
        """End the thread that makes batches."""
        self._loading.close()

    def _keys(self, name: str) -> list[str]:
        return self.images.keys[: self.images.forget] if name == "noise" else self.images.keys[self.images.forget :]

    def _load(self) -> Any:
        """What a step takes from the host: a whole batch, or the cached targets of each set; page-locked for a GPU."""
        images, pin = self.images, self.device.type == "cuda"
        if self.variant.fused:
            is_forget = torch.arange(images.forget + images.retain) < images.forget
            batch = DistillBatch(images.both, is_forget, {self.preset.site: self.table.gather(images.keys)})
            return batch.pin_memory() if pin else batch
        if not self.variant.cached:
            return None
        targets = {
            name: torch.cat([self.cache.features(key) for key in self._keys(name)]) for name in ("noise", "retain")
        }
        return {name: target.pin_memory() for name, target in targets.items()} if pin else targets

    @property
    def engine(self) -> LocalEngine:
        key = (self.variant.optim, *(id(parameter) for _, parameter in self.parameters))
        if key not in self._engines:
            self._engines[key] = LocalEngine(
                self.parameters, module=self.student, optim=self.variant.optim, learning_rate=1e-6, weight_decay=0.0,
                max_grad_norm=1.0, gradient_accumulation_steps=1, warmup_steps=0, max_steps=10_000,
                lr_scheduler_type="constant", device=self.device,
            )  # fmt: skip
        return self._engines[key]

    def step(self) -> None:
        self.engine.backward(self.loss())
        self.engine.step()

    def loss(self) -> Tensor:
        batch = next(self._batches)
        with compiled_blocks(self.student) if self.variant.compiled else contextlib.nullcontext():
            if self.variant.fused:
                return self.objective(batch.to(self.device))["loss"]
            return self._reference_loss(batch)

    def _reference_loss(self, targets: dict[str, Tensor] | None) -> Tensor:
        """One pass for each set, as public loops do."""
        prompts = self.images.cut if self.variant.suffix_dropped else self.images.whole
        total = torch.zeros((), device=self.device)
        for name, aim, weight in (("forget", "noise", LAMBDA_FORGET), ("retain", "retain", LAMBDA_RETAIN)):
            if targets is not None:
                target = targets[aim].to(self.device, non_blocking=True)
            else:
                with torch.no_grad():
                    target = self._visual_hidden(self.teacher, prompts[aim].to(self.device, non_blocking=True))
            hidden = self._visual_hidden(self.student, prompts[name].to(self.device, non_blocking=True))
            total = total + weight * self.scale * F.mse_loss(hidden.float(), target.float())
        return total

    def _visual_hidden(self, model: Any, batch: VisualBatch) -> Tensor:
        """(N, H): the whole forward pass of `model`, of which what the site has at image positions is kept."""
        kept: list[Tensor] = []
        llm: Any = families.language_model(model, family_of(model))
        layers = parse_site(self.preset.site)[1]
        if layers:
            hook = llm.layers[layers - 1].register_forward_hook(
                lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
            )
        else:  # what enters the first layer has the projector's output at image positions
            hook = llm.register_forward_pre_hook(
                lambda module, args, inputs: kept.append(inputs["inputs_embeds"]), with_kwargs=True
            )
        try:
            ids = batch.inputs["input_ids"]
            model(**batch.inputs, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            hook.remove()
        return kept[0][ids == families.image_token_id(model.config)]


def shallow(module: Any, **children: nn.Module) -> Any:
    """A second module object over the same weights, in which `children` stand in for its own."""
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    return view


def truncated_view(model: Any, layers: int) -> Any:
    """The base of `model` cut to `layers` decoder layers; weights are shared."""
    base = families.base_model(model)
    llm: Any = families.language_model(model, family_of(model))
    short = shallow(llm, layers=nn.ModuleList(list(llm.layers)[:layers]), norm=nn.Identity())
    return shallow(base, language_model=short)


def build_rigs(letters: str, preset: Preset, device: torch.device, folder: Path) -> tuple[dict[str, Rig], Any]:
    """The variants side by side for timing, over as few copies of the frozen weights as equal work allows.

    (a) to (d) share the student's weights and (a) to (c) run the teacher's LLM on the student's frozen layers, which
    costs the same time as a copy; memory is measured elsewhere. (a) to (d) share an engine too, and so do (e) and (f).
    At 13B, site llm:8, weights and engines come to 44 GB (34 and 10), to which (a) adds 34 GB of activations in its LLM
    for 8 images. Returns the rigs and what closes them.
    """
    whole = build_model(preset, device)
    visual_parameters(whole, preset)
    teacher = frozen_copy(whole)
    disturb(visual_parameters(whole, preset))
    resources = contextlib.ExitStack()
    cut: dict[int, tuple[Any, Any]] = {}  # student and teacher by number of layers
    product: dict[int, Any] = {}
    engines: dict[Any, LocalEngine] = {}
    rigs = {}
    for variant in (v for v in VARIANTS if v.letter in letters):
        layers = parse_site(variant.on(preset).site)[1]
        if layers not in cut:
            cut[layers] = truncated_view(whole, layers), truncated_view(teacher, layers)
        student, own = cut[layers] if variant.truncated else (whole, teacher)
        if variant.fused:
            if layers not in product:
                product[layers] = copy.deepcopy(student)
                visual_parameters(product[layers], variant.on(preset))
                if layers:  # what is patched belongs to them
                    resources.enter_context(patch_frozen(product[layers]))
            student = product[layers] if variant.optim == "adamw_torch" else frozen_copy(product[layers])
        rigs[variant.letter] = rig = Rig(variant, preset, device, folder, student, own, engines)
        resources.callback(rig.close)
        if variant.site is not None:
            rig.plain = Rig(variant.plain, preset, device, folder, *cut[layers], engines)
            resources.callback(rig.plain.close)
    return rigs, resources


def teacher_scale(preset: Preset, images: Images, rig: Rig) -> float:
    """1 / variance of the teacher's features of the retain images, as the product normalises `mse`."""
    with torch.no_grad():
        batch = images.cut["retain"].to(rig.device)
        features = VisualPath(rig.teacher, [preset.site])(batch)[preset.site].gathered().float()
    return 1 / float(features.var(0).mean())


def gradients(rig: Rig) -> tuple[float, list[Tensor]]:
    loss = rig.loss()
    found = torch.autograd.grad(loss, [p for _, p in rig.parameters], allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for g, (_, p) in zip(found, rig.parameters, strict=True))
    return float(loss.detach()), [g.float().cpu() for g in zeros]


def run_alone(variant: Variant, preset: Preset, device: torch.device, images: Images, folder: Path) -> None:
    """Build what `variant` really needs, nothing shared, and take two steps."""
    layers = parse_site(variant.on(preset).site)[1] if variant.truncated else None
    student = build_model(preset, device, layers=layers)
    teacher = student if variant.cached else build_model(preset, device, layers=layers).requires_grad_(False)
    rig = Rig(variant, preset, device, folder, student, teacher)
    fused = variant.fused and layers != 0
    with contextlib.closing(rig), patch_frozen(student) if fused else contextlib.nullcontext():
        rig.load(images, 1.0)
        for _ in range(2):
            rig.step()


def analytic_flops(variant: Variant, preset: Preset, architecture: Architecture) -> int:
    """FLOPs of one image in one step of `variant`, in closed form."""
    preset = variant.on(preset)
    layers = parse_site(preset.site)[1]
    llm = architecture.llm
    tokens = preset.prefix + architecture.visual_tokens + (0 if variant.suffix_dropped else preset.suffix)
    per_layer = llm.linear_flops(tokens) + llm.attention_flops(tokens)
    forward = layers * per_layer
    if not variant.truncated:
        forward = llm.layers * per_layer + 2 * tokens * llm.hidden * llm.vocabulary
    tower = Cost(architecture, Recipe(sites=(preset.site,))).flops()
    backward = layers * (llm.linear_flops(tokens) + 2 * llm.attention_flops(tokens))
    passes = 1 if variant.cached else 2
    return passes * (tower["tower_forward"] + forward) + tower["tower_backward"] + backward


def least_bytes(variant: Variant, preset: Preset, architecture: Architecture, batch: int) -> float:
    """Bytes an image that a step must move at least: every weight it uses once a pass, the update, cached features.

    Activations are left out: how many of them leave the caches is the kernels' affair.
    """
    size = 2 if preset.bf16 else 4
    preset = variant.on(preset)
    layers = parse_site(preset.site)[1]
    llm, cost = architecture.llm, Cost(architecture, Recipe(sites=(preset.site,)))
    used = layers * llm.layer_parameters
    forward = used
    if not variant.truncated:
        forward = llm.layers * llm.layer_parameters + llm.vocabulary * llm.hidden
    passes = 1 if variant.cached else 2
    weights = passes * (cost.visual + forward) + cost.trainable + used
    # gradient read, master and moments read and written, working weight written
    update = cost.trainable * (4 + 2 * 4 + 2 * MOMENT_BYTES[variant.optim] + (size if preset.bf16 else 0))
    features = architecture.visual_tokens * llm.hidden * size if variant.cached else 0
    return (weights * size + update) / batch + features


def counted_flops(rig: Rig, images: int) -> float:
    """FLOPs of one image, counted without compiling: inside compiled code the counter sees nothing."""
    variant, rig.variant = rig.variant, replace(rig.variant, compiled=False)
    try:
        with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
            torch.autograd.grad(rig.loss(), [p for _, p in rig.parameters], allow_unused=True)
    finally:
        rig.variant = variant
    return counter.get_total_flops() / images
