"""One training step, from the way public unlearning code takes it to ours, one change at a time, in one run.

    python benchmarks/step.py --preset tiny --json benchmarks/results/step-tiny-cpu.json
    python benchmarks/step.py --preset llava-1.5-13b --device cuda

Weights are random at the model's real shapes, made on the device; nothing is downloaded. (a) is written as the public
RMU and MMUnlearner loops are: the whole prompt through all layers up to the logits, one pass for each set, a second
model as the teacher, a mean squared error over `hidden[mask]`. All variants train the same visual weights with the same
data; a row is printed only where loss and gradients equal those of (a) within TOLERANCE.
"""

import os
import sys

# A script's folder comes first in the import path, where `kernels.py` would answer to transformers' probe for a package
# of that name.
if os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastvkd_kernels import patch_frozen, visual_distill_loss
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from fastvkd.engines.local import LocalEngine
from fastvkd.engines.optimizers import MOMENT_BYTES
from fastvkd.environment import measured_on
from fastvkd.models import families
from fastvkd.models.compiled import compiled_blocks
from fastvkd.models.families import family_of, parse_site
from fastvkd.models.loading import truncated_config
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.planning import ARCHITECTURES, Architecture, Cost, Recipe, architecture_of, peak_flops
from fastvkd.unlearning.objective import DistillBatch, SiteLoss, VisualDistillation
from fastvkd.unlearning.prefetch import prefetched
from fastvkd.unlearning.targets import TargetTable
from fastvkd.unlearning.teacher import FeatureCache, fill_caches, frozen_copy

_spec = importlib.util.spec_from_file_location("gpu_clock", Path(__file__).with_name("gpu_clock.py"))
assert _spec is not None and _spec.loader is not None
gpu_clock = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_clock)

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


A = Variant("a", "reference: whole prompt, all layers, second model, hidden[mask]")
B = replace(A, letter="b", name="+ LLM truncated at the site", truncated=True)
C = replace(B, letter="c", name="+ text behind the image dropped", suffix_dropped=True)
D = replace(C, letter="d", name="+ teacher cached", cached=True)
E = replace(D, letter="e", name="+ fused kernels, one pass for both sets", fused=True)
COMPILED = replace(E, letter="f", name="+ torch.compile of blocks and layers", compiled=True)
VARIANTS = (A, B, C, D, E, COMPILED, replace(COMPILED, letter="g", name="+ 8-bit optimiser", optim="adamw_8bit"))
# Largest error of the loss, and of the gradient (L2 norm of the difference over that of (a)'s), that is rounding. In
# float32, sums in another order: every parameter by itself is held to it. In bf16, activations of thirty blocks and
# layers rounded at other places: the biases of the tower's norms add up thousands of numbers that almost cancel, and a
# fifth of such a gradient is rounding, so there all parameters count as one vector.
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 5e-2)}
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
        inputs["mm_token_type_ids"] = (ids == families.image_token_id(config)).long()
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
        self.variant, self.preset, self.device = variant, preset, device
        self.layer = parse_site(preset.site)[1]
        self.student, self.teacher = student, teacher
        self.parameters = visual_parameters(student, preset)
        self._folder = folder
        self._engines = {} if engines is None else engines
        self._loading = contextlib.ExitStack()
        self.path = VisualPath(student, [preset.site])

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
                    {self.preset.site: self.cache}, path, keys, lambda _, b=batch: b, batch_size=len(keys),
                    device=self.device,
                )  # fmt: skip
            self.table = TargetTable(self.cache, {})
        if self.variant.fused:
            self.objective = VisualDistillation(
                self.path, distance="mse", lambda_forget=LAMBDA_FORGET, lambda_retain=LAMBDA_RETAIN
            )
            self.objective.losses = {self.preset.site: SiteLoss(1.0, scale=scale)}
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
        """(N, H): the whole forward pass of `model`, of which the input of layer `layer` at image positions is kept."""
        kept: list[Tensor] = []
        llm: Any = families.language_model(model, family_of(model))
        hook = llm.layers[self.layer - 1].register_forward_hook(
            lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
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
    layers = parse_site(preset.site)[1]
    short, short_teacher = truncated_view(whole, layers), truncated_view(teacher, layers)
    resources = contextlib.ExitStack()
    product: Any = None
    engines: dict[Any, LocalEngine] = {}
    rigs = {}
    for variant in (v for v in VARIANTS if v.letter in letters):
        student = short if variant.truncated else whole
        if variant.fused:
            if product is None:
                product = copy.deepcopy(short)
                visual_parameters(product, preset)
                resources.enter_context(patch_frozen(product))
            student = product if variant.optim == "adamw_torch" else frozen_copy(product)
        own = short_teacher if variant.truncated else teacher
        rigs[variant.letter] = Rig(variant, preset, device, folder, student, own, engines)
        resources.callback(rigs[variant.letter].close)
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


def gradient_error(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> float:
    """|g - g_a| / |g_a| (L2): in float32 the largest over parameters, in bf16 of all parameters as one vector.

    Below a thousandth of the largest |g_a| all is rounding in float32 too.
    """
    norms = torch.stack([g.norm() for g in expected])
    differences = torch.stack([(g - e).norm() for g, e in zip(found, expected, strict=True)])
    if dtype == torch.bfloat16:
        return float(differences.norm() / norms.norm())
    return float((differences / norms.clamp(min=1e-3 * norms.max())).max())


def analytic_flops(variant: Variant, preset: Preset, architecture: Architecture) -> int:
    """FLOPs of one image in one step of `variant`, in closed form."""
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
    with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
        torch.autograd.grad(rig.loss(), [p for _, p in rig.parameters], allow_unused=True)
    return counter.get_total_flops() / images


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this run: what MFU on an unknown device is measured against."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * side**3 / min(times)


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s of a plain copy in this run, read and written."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    times = []
    for _ in range(8):
        start = clock(device)
        destination.copy_(source)
        times.append(clock(device) - start)
    return 2 * source.numel() / min(times)


def loss_seconds(preset: Preset, architecture: Architecture, device: torch.device) -> float:
    """Seconds an image of the fused loss alone, forward and backward."""
    dtype = torch.bfloat16 if preset.bf16 else torch.float32
    tokens, width = architecture.visual_tokens, architecture.llm.hidden
    hidden = torch.randn(preset.batch, preset.prefix + tokens, width, device=device, dtype=dtype, requires_grad=True)
    image = torch.arange(preset.batch, device=device)
    rows = (image[:, None] * hidden.shape[1] + preset.prefix + torch.arange(tokens, device=device)).flatten()
    target = torch.randn(len(rows), width, device=device, dtype=dtype)

    def forward_backward() -> Any:
        return torch.autograd.grad(visual_distill_loss(hidden, rows, target), hidden)

    if device.type == "cuda":
        launch = gpu_clock.launch_seconds(forward_backward)
        times = [gpu_clock.gpu_milliseconds(forward_backward, launch) / 1e3 for _ in range(20)]
    else:
        times = [seconds_of(forward_backward, device) for _ in range(20)]
    return statistics.median(times) / preset.batch


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    start = clock(device)
    run()
    return clock(device) - start


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes in live tensors while `run` is at work, above those before: models, optimiser and activations.

    On a GPU the allocator's own peak; on a CPU the sum of the allocator's events, as the profiler records them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def run_alone(variant: Variant, preset: Preset, device: torch.device, images: Images, folder: Path) -> None:
    """Build what `variant` really needs, nothing shared, and take two steps."""
    layers = parse_site(preset.site)[1] if variant.truncated else None
    student = build_model(preset, device, layers=layers)
    teacher = student if variant.cached else build_model(preset, device, layers=layers).requires_grad_(False)
    rig = Rig(variant, preset, device, folder, student, teacher)
    with contextlib.closing(rig), patch_frozen(student) if variant.fused else contextlib.nullcontext():
        rig.load(images, 1.0)
        for _ in range(2):
            rig.step()


def halving(images: Images, attempt: Callable[[Images], Any], make: Callable[[int], Images]) -> tuple[Images, Any]:
    """`attempt` with as many images as fit: half of them each time memory runs out, down to one of each set."""
    while True:
        try:
            return images, attempt(images)
        except torch.OutOfMemoryError:
            if images.forget == 1:
                raise
        free_memory()
        images = make(2 * (images.forget // 2))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Measured:
    """What is known of a variant so far. `steps`: seconds an image of its steps, each with (a)'s just before."""

    variant: Variant
    errors: dict[str, Any]
    batch: int = 0
    steps: list[tuple[float, float | None]] = field(default_factory=list)
    counted: float | None = None
    peak: int | None = None
    peak_batch: int | None = None


def row_of(found: Measured, preset: Preset, architecture: Architecture, report: dict[str, Any]) -> dict[str, Any]:
    """What is not measured yet, or had no memory to be measured in, is None."""
    seconds = sorted(own for own, _ in found.steps)
    median = statistics.median(seconds)
    # of steps that were taken one after the other, so that a busy spell counts in both
    ratios = [reference / own for own, reference in found.steps if reference is not None]
    flops = analytic_flops(found.variant, preset, architecture)
    moved = least_bytes(found.variant, preset, architecture, found.batch)
    datasheet = report["datasheet_flops_per_s"]
    return {
        "variant": found.variant.letter,
        "name": found.variant.name,
        "ms_per_image": 1e3 * median,
        "ms_per_image_quartiles": [1e3 * seconds[len(seconds) // 4], 1e3 * seconds[-1 - len(seconds) // 4]],
        "images_per_s": 1 / median,
        "speedup": statistics.median(ratios) if ratios else None,
        "batch": found.batch,
        "flops_per_image": flops,
        "counted_flops_per_image": found.counted,
        "least_bytes_per_image": moved,
        "roofline_ms_per_image": 1e3 * max(flops / report["matmul_flops_per_s"], moved / report["copy_bytes_per_s"]),
        "mfu_of_matmul": flops / median / report["matmul_flops_per_s"],
        "mfu": flops / median / datasheet if datasheet else None,
        "peak_bytes": found.peak,
        "peak_batch": found.peak_batch,
        **found.errors,
    }


def measure(
    preset: Preset, device: torch.device, *, letters: str = "abcdefg", repetitions: int = 7, batch: int | None = None,
    say: Callable[[str], None] = print, keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:  # fmt: skip
    """The benchmark's JSON: `device`, `versions`, `rows`, and `left_out` with the reason for every missing row.

    `keep` is given the report whenever something was added to it, so that what stops the run loses no more than what
    was not measured yet.
    """
    config = configuration(preset)
    architecture = architecture_of(config.to_dict(), name=preset.facts.get("name_or_path", "tiny"))
    dtype = torch.bfloat16 if preset.bf16 else torch.float32
    made: dict[int, Images] = {}

    def make(count: int) -> Images:
        if count not in made:
            made[count] = Images(preset, config, count // 2, count - count // 2, pin=device.type == "cuda")
        return made[count]

    report: dict[str, Any] = {
        **measured_on(device),
        "model": architecture.name,
        "site": preset.site,
        "tokens": {"visual": architecture.visual_tokens, "text": preset.prefix + preset.suffix},
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": dict(zip(("loss", "gradient"), TOLERANCE[dtype], strict=True)),
        "matmul_flops_per_s": matmul_ceiling(device, dtype),
        "datasheet_flops_per_s": peak_flops(measured_on(device)["device"]) if device.type == "cuda" else None,
        "copy_bytes_per_s": copy_ceiling(device),
        "loss_ms_per_image": 1e3 * loss_seconds(preset, architecture, device),
        "rows": [],
        "left_out": {},
    }
    if importlib.util.find_spec("bitsandbytes") is None and "g" in letters:
        letters = letters.replace("g", "")
        report["left_out"]["g"] = "bitsandbytes is not installed"
    found: dict[str, Measured] = {}

    def publish() -> None:
        report["rows"] = [row_of(f, preset, architecture, report) for f in found.values() if f.steps]
        keep(report)

    publish()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side_by_side(found, report, preset, device, folder, make, letters, repetitions, batch, say, publish)
        for letter, own in found.items():
            with contextlib.suppress(torch.OutOfMemoryError):  # the row stands, without a peak
                images, own.peak = halving(
                    make(own.batch),
                    lambda images, v=own.variant: peak_bytes(
                        lambda: run_alone(v, preset, device, images, folder), device
                    ),
                    make,
                )
                own.peak_batch = images.forget + images.retain
            publish()
            say(line(next(row for row in report["rows"] if row["variant"] == letter)))
    return report


def side_by_side(
    found: dict[str, Measured], report: dict[str, Any], preset: Preset, device: torch.device, folder: Path,
    make: Callable[[int], Images], letters: str, repetitions: int, batch: int | None, say: Callable[[str], None],
    publish: Callable[[], None],
) -> None:  # fmt: skip
    """Compare the variants with (a), time their steps in turn and count their FLOPs; fills `found`.

    The compiled ones come after the others, beside (a) again: what they take to compile then holds nothing up.
    """
    rigs, resources = build_rigs(letters, preset, device, folder)
    start = make(batch or preset.batch)
    with resources:
        reference: Reference | None = None
        for compiled in (False, True):
            group = {letter: rig for letter, rig in rigs.items() if rig.variant.compiled == compiled}
            if not group:
                continue
            while reference is None and group:
                first = next(iter(group))
                with contextlib.suppress(torch.OutOfMemoryError):
                    _, reference = halving(start, lambda images, rig=rigs[first]: make_reference(rig, images), make)
                    break
                report["left_out"][first] = "out of memory with one image of each set"
                group.pop(first).close()
                free_memory()
            for letter, error in compare(group, reference).items():
                if isinstance(error, str):
                    report["left_out"][letter] = error
                    say(f"({letter}) {error}")
                    group.pop(letter).close()
                else:
                    found[letter] = Measured(rigs[letter].variant, error)
            # Lightest first: what engines and caches hold is there when the heaviest, (a), finds out how much fits.
            for letter in reversed(list(group)):
                warm_up(letter, group, found, report, start, make)
            if compiled and "a" in found:
                group = {"a": rigs["a"], **group}
            for _ in range(repetitions):
                take_steps(group, found, report, device, make)
                publish()
        for letter, own in found.items():
            if own.variant.compiled:  # the counter sees nothing inside compiled code
                own.counted = found["e"].counted if "e" in found else None
            else:
                with contextlib.suppress(torch.OutOfMemoryError):
                    own.counted = counted_flops(rigs[letter], own.batch)
            free_memory()
        publish()


def warm_up(
    letter: str, group: dict[str, Rig], found: dict[str, Measured], report: dict[str, Any], images: Images,
    make: Callable[[int], Images],
) -> None:  # fmt: skip
    """Two steps with as many images as fit, at most `images`; a variant that has no memory for any is dropped."""
    rig = group[letter]

    def attempt(images: Images) -> None:
        rig.load(images, rig.scale)
        rig.step()
        rig.step()

    try:
        images, _ = halving(images, attempt, make)
        found[letter].batch = images.forget + images.retain
    except torch.OutOfMemoryError:
        report["left_out"][letter] = "out of memory with one image of each set"
        found.pop(letter)
        group.pop(letter).close()
    free_memory()


def take_steps(
    group: dict[str, Rig], found: dict[str, Measured], report: dict[str, Any], device: torch.device,
    make: Callable[[int], Images],
) -> None:  # fmt: skip
    """One timed step of every variant. Where memory has run short since the warm-up, fewer images, timed anew."""
    reference: float | None = None
    for letter, rig in list(group.items()):
        own = found[letter]
        while letter in group:
            with contextlib.suppress(torch.OutOfMemoryError):
                if device.type == "cuda":
                    rig.step()  # in which the allocator takes back what the variant before has left in pieces
                seconds = seconds_of(rig.step, device) / own.batch
                if letter == "a":
                    reference = seconds
                own.steps.append((seconds, reference))
                break
            free_memory()  # here, where the error no longer holds what ran out of it
            own.steps.clear()
            if rig.images.forget > 1:
                warm_up(letter, group, found, report, make(2 * (rig.images.forget // 2)), make)
            else:
                report["left_out"][letter] = "out of memory beside the other variants"
                found.pop(letter)
                group.pop(letter).close()


@dataclass(frozen=True)
class Reference:
    """What the first variant computes of `images` at `weights`, with the scale of the loss: others are held to it."""

    images: Images
    scale: float
    weights: list[Tensor]
    loss: float
    gradients: list[Tensor]
    tolerance: tuple[float, float]


def make_reference(rig: Rig, images: Images) -> Reference:
    scale = teacher_scale(rig.preset, images, rig)
    rig.load(images, scale)
    weights = [parameter.detach().cpu().clone() for _, parameter in rig.parameters]
    dtype = next(rig.student.parameters()).dtype
    return Reference(images, scale, weights, *gradients(rig), TOLERANCE[dtype])


def compare(rigs: dict[str, Rig], reference: Reference | None) -> dict[str, dict[str, Any] | str]:
    """The errors of every rig's loss and gradients beside `reference`; or why a rig has no row."""
    result: dict[str, dict[str, Any] | str] = {}
    for letter, rig in rigs.items():
        assert reference is not None  # it is there as soon as one rig is
        rig.load(reference.images, reference.scale)
        with torch.no_grad():  # steps of a variant that trains the same weights have moved them
            for (_, parameter), value in zip(rig.parameters, reference.weights, strict=True):
                parameter.copy_(value)
        loss, found = math.nan, []
        with contextlib.suppress(torch.OutOfMemoryError):
            loss, found = gradients(rig)
        if not found:
            result[letter] = "out of memory with as many images as the reference"
            free_memory()
            continue
        error = {
            "max_loss_error": abs(loss - reference.loss) / abs(reference.loss),
            "max_grad_error": gradient_error(found, reference.gradients, next(rig.student.parameters()).dtype),
            "compared_batch": reference.images.forget + reference.images.retain,
        }
        allowed_loss, allowed_gradient = reference.tolerance
        # written so that NaN fails
        agrees = error["max_loss_error"] <= allowed_loss and error["max_grad_error"] <= allowed_gradient
        result[letter] = error if agrees else f"differs from the reference: {error}"
    return result


HEAD = (
    f"{'':4}{'ms/image':>10} {'quartiles':>17} {'images/s':>9} {'speed-up':>9} {'TFLOP':>8} {'counted':>8} {'MFU':>6} "
    f"{'peak GB':>8} {'loss err':>9} {'grad err':>9}  variant"
)


def line(row: dict[str, Any]) -> str:
    low, high = row["ms_per_image_quartiles"]
    speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
    counted = "-" if row["counted_flops_per_image"] is None else f"{row['counted_flops_per_image'] / 1e12:.4f}"
    quartiles = f"{low:.2f} ... {high:.2f}"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.3f}"
    return (
        f"({row['variant']}) {row['ms_per_image']:>10.2f} {quartiles:>17} {row['images_per_s']:>9.2f} "
        f"{speedup:>9} {row['flops_per_image'] / 1e12:>8.4f} {counted:>8} {row['mfu'] or row['mfu_of_matmul']:>6.1%} "
        f"{peak:>8} {row['max_loss_error']:>9.1e} {row['max_grad_error']:>9.1e}  {row['name']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--variants", default="abcdefg", help="which rows; (a) is the reference of the others")
    parser.add_argument("--repetitions", type=int, default=7, help="steps of each variant, taken in turn")
    parser.add_argument("--batch", type=int, help="images a step, half of each set; halved where memory runs out")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no GPU is visible to torch; use --device cpu")
    if args.batch is not None and args.batch < 2:
        parser.error(f"--batch {args.batch}: at least 2, one image of each set")
    print(HEAD)

    def keep(report: dict[str, Any]) -> None:
        about = {"preset": args.preset, "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]])}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"benchmark": "step", **about, **report}, indent=1) + "\n")

    report = measure(
        PRESETS[args.preset](), device, letters=args.variants, repetitions=args.repetitions, batch=args.batch, keep=keep
    )
    keep(report)
    for letter, reason in report["left_out"].items():
        print(f"({letter}) left out: {reason}")
    sys.exit(1 if report["left_out"] else 0)


if __name__ == "__main__":
    main()
