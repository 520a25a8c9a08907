"""What a run will cost, from the model's configuration alone: parameters, FLOPs, memory, and what fits on a card.

It uses closed formulas; no model is built and no weight read. Legend: T tokens of the LLM input, S tokens of the tower,
H and I hidden and intermediate widths, s bytes of a working value. FLOPs count a multiply-add as two, matrix products
only, as `torch.utils.flop_counter` does.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvkd.devices import GIB, usable_bytes
from fastvkd.errors import SettingsError
from fastvkd.methods import METHODS, feature_methods
from fastvkd.planning.architecture import Architecture, find_architecture
from fastvkd.planning.cards import card_name, gpu_memory
from fastvkd.planning.cost import ASSUMED, Cost, Recipe
from fastvkd.planning.folder import notes_on
from fastvkd.planning.jobs import Job, lines_of, other_jobs

if TYPE_CHECKING:
    from fastvkd.settings import Settings


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
    peak_bytes: int  # on a GPU, the search's and the scrub's included
    micro_batch: int | None
    cache_bytes_per_image: int
    fits: bool | None
    recommendation: dict[str, Any]
    gpu_memory_bytes: int | None
    step_seconds: dict[str, float] | None  # None when no card was named
    # `flops_per_person` of the search for a stranger's maps, and its `memory_bytes`; None where there is none
    search: dict[str, Any] | None
    scrub: dict[str, int] | None  # bytes at the peak of the LLM's edit; None where it is left alone
    jobs: list[Job]  # what else is done with the model
    notes: list[str]  # on the model's folder

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON keys."""
        keys = "llm_layers_loaded parameters flops_per_image memory_bytes micro_batch cache_bytes_per_image fits"
        plain = [*keys.split(), "recommendation", "step_seconds", "search", "scrub", "notes"]
        return {key: getattr(self, key) for key in plain} | {"jobs": [job.to_dict() for job in self.jobs]}

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
        if self.search is not None:
            parts = {key: value / GIB for key, value in self.search["memory_bytes"].items()}
            total = parts.pop("total")
            how = "spread over cards and host memory" if self.recipe.search_spread else "by itself"
            if (rounded := self.search["quantize"]) != "none":
                how += f", in {rounded}"
            lines.append(f"search before training  {total:.2f} GiB on one GPU, the whole model {how}: ")
            lines[-1] += ", ".join(f"{key} {value:.2f} GiB" for key, value in parts.items())
            lines.append(f"  FLOPs a person        {self.search['flops_per_person'] / 1e15:.1f} PFLOP")
        if self.scrub is not None:
            parts = {key: value / GIB for key, value in self.scrub.items()}
            lines.append(f"scrub after training    {parts.pop('total'):.2f} GiB on one GPU: ")
            lines[-1] += ", ".join(f"{key} {value:.2f} GiB" for key, value in parts.items())
        if not self.recipe.online_teacher:
            lines.append(f"teacher cache on disk   {self.cache_bytes_per_image / 1e6:.2f} MB per image")
        if self.gpu_memory_bytes is not None:
            fits = "fits" if self.fits else "does not fit"
            lines.append(f"as configured           {fits} in {self.gpu_memory_bytes / GIB:.1f} GiB; ")
            lines[-1] += f"largest micro-batch {self.micro_batch}"
        if self.step_seconds is not None:
            t = self.step_seconds
            assumed = f"{ASSUMED['mfu']:.0%} MFU, links at {ASSUMED['link_efficiency']:.0%}"
            terms = ", ".join(f"{key} {1e3 * t[key]:.1f} ms" for key in ("compute", "gather", "pcie"))
            lines.append(f"estimate of an update   {terms} (assuming {assumed}): ")
            low, high = t["images_per_second_serial"], t["images_per_second_overlapped"]
            lines[-1] += f"{low:.1f}" + (f" to {high:.1f}" if high > 1.005 * low else "") + " images/s"
        lines.append(f"recommendation          {self.recommendation['reason']}")
        if self.recommendation["command"]:
            lines.append(f"{'train':<23} {self.recommendation['command']}")
        lines += lines_of(self.jobs)
        lines += [f"note: {note}" for note in self.notes]
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

    Without either the plan does not say what fits. Raises SettingsError for an unknown card or a memory that cannot be
    read, ModelError for an unknown architecture or a site deeper than the model.
    """
    if world_size < 1:
        raise SettingsError(f"--world-size {world_size}: must be at least 1")
    architecture = architecture or find_architecture(settings.model_name_or_path, settings.max_pixels)
    memory_bytes = gpu_memory(gpu=gpu, memory=memory)
    recipe = recipe_of(settings, world_size)
    recommendation = recommend(architecture, recipe, memory_bytes)
    recipe = searched(architecture, recipe, memory_bytes)
    cost = Cost(architecture, recipe)
    peak = cost.peak(recipe.micro_batch)
    return Plan(
        name=architecture.name,
        recipe=recipe,
        llm_layers_loaded=cost.llm_layers,
        llm_layers=architecture.llm.layers,
        parameters={"trainable": cost.trainable, "frozen": cost.frozen},
        flops_per_image=cost.flops(),
        memory_bytes=cost.memory(recipe.micro_batch),
        peak_bytes=peak,
        micro_batch=None if memory_bytes is None else cost.largest_micro_batch(memory_bytes),
        cache_bytes_per_image=cost.cache_bytes_per_image(),
        fits=None if memory_bytes is None else peak <= usable_bytes(memory_bytes),
        recommendation=recommendation,
        gpu_memory_bytes=memory_bytes,
        step_seconds=None if gpu is None else cost.step_seconds(card_name(gpu)),
        search={
            "flops_per_person": cost.search_flops(),
            "memory_bytes": cost.search_memory(),
            "quantize": recipe.quantize_llm if recipe.search_quantize == "auto" else recipe.search_quantize,
        }
        if recipe.search_steps
        else None,
        scrub=cost.scrub_memory() if recipe.scrub_photos else None,
        jobs=other_jobs(architecture, memory_bytes, world_size),
        notes=notes_on(settings.model_name_or_path),
    )


def recipe_of(settings: "Settings", world_size: int) -> Recipe:
    """The part of `settings` that decides the cost. ZeRO stage and offloading come from the DeepSpeed configuration.

    Raises SettingsError for a method that reads answers: its cost depends on the lengths of questions.
    """
    if not METHODS[settings.method].features:
        raise SettingsError(
            f"method={settings.method}: plans are made for method={feature_methods()}; leave it out to compare"
        )
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
        search_steps=settings.stranger.steps
        if settings.forget_target == "stranger" and settings.stranger.way == "guided"
        else 0,
        search_views=settings.stranger.views,
        search_quantize=settings.stranger.quantize,
        search_spread=settings.stranger.device_map == "auto",
        scrub_photos=0 if settings.scrub is None else settings.scrub.photos,
        scrub_rank=0 if settings.scrub is None else settings.scrub.rank,
    )


def searched(architecture: Architecture, recipe: Recipe, memory_bytes: int | None) -> Recipe:
    """The recipe with the search as a run will load it: where it is left open, as `models.placement.fitting` does."""
    if not recipe.search_steps or memory_bytes is None or recipe.search_spread:
        return recipe
    if recipe.search_quantize != "auto" or recipe.quantize_llm != "none":
        return recipe
    ways: list[dict[str, Any]] = [{}, {"search_quantize": "nf4"}, {"search_spread": True}]
    if recipe.world_size > 1:
        cost = Cost(architecture, recipe)
        room = cost.search_memory()["total"] - int(cost.whole_bytes())
        if cost.whole_bytes() <= recipe.world_size * (usable_bytes(memory_bytes) - room):
            ways.insert(1, {"search_spread": True})
    tried = [dataclasses.replace(recipe, **way) for way in ways]
    fit = (one for one in tried if Cost(architecture, one).search_memory()["total"] <= usable_bytes(memory_bytes))
    return next(fit, tried[-1])


def recommend(architecture: Architecture, recipe: Recipe, memory_bytes: int | None) -> dict[str, Any]:
    """The first way, from cheapest to dearest in time, in which at least two images (one of each set) fit.

    Returns `zero_stage`, `deepspeed` (a preset of ds_configs, None for the local engine), `quantize_llm`, `optim`,
    `gradient_checkpointing`, `micro_batch`, `gradient_accumulation_steps`, the `command`, its `memory_bytes` on each
    GPU and the `reason`; all but that are None when no memory was given or nothing fits.
    """
    keys = ("zero_stage", "deepspeed", "quantize_llm", "optim", "gradient_checkpointing")
    nothing = dict.fromkeys((*keys, "micro_batch", "gradient_accumulation_steps", "command", "memory_bytes"))
    if memory_bytes is None:
        return nothing | {"reason": "give --gpu or --memory to see what fits"}
    images = recipe.micro_batch * recipe.gradient_accumulation_steps
    fewer = [views for views in (3, 2, 1) if recipe.search_steps and views < recipe.search_views]
    ways = [(views, *one) for views in (recipe.search_views, *fewer) for one in _candidates(recipe)]
    for views, preset, changes, reason in ways:
        candidate = searched(architecture, dataclasses.replace(recipe, search_views=views, **changes), memory_bytes)
        micro_batch = min(Cost(architecture, candidate).largest_micro_batch(memory_bytes), images)
        accumulation = math.ceil(images / micro_batch) if micro_batch else 0
        if accumulation > 1:  # accumulated gradients stay beside the activations
            accumulating = dataclasses.replace(candidate, gradient_accumulation_steps=accumulation)
            micro_batch = min(Cost(architecture, accumulating).largest_micro_batch(memory_bytes), images)
            accumulation = math.ceil(images / micro_batch) if micro_batch else 0
        if micro_batch < 2:
            continue
        found = dataclasses.replace(candidate, gradient_accumulation_steps=accumulation)
        engine = f"deepspeed={preset}" if preset else "the local engine"
        return {
            "zero_stage": candidate.zero_stage,
            "deepspeed": preset,
            "quantize_llm": candidate.quantize_llm,
            "optim": candidate.optim,
            "gradient_checkpointing": candidate.gradient_checkpointing,
            "micro_batch": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "command": _command(recipe, candidate, preset, micro_batch, accumulation),
            "memory_bytes": Cost(architecture, found).peak(micro_batch),
            "reason": f"{engine}, quantize_llm={candidate.quantize_llm}, {candidate.optim}, "
            f"{micro_batch} images x {accumulation} accumulation step(s): {reason}",
        }
    return nothing | {
        "reason": f"does not fit in {memory_bytes / GIB:.0f} GiB in any way known here; "
        "choose a shallower site (projector), or trainable=projector"
    }


def _command(recipe: Recipe, found: Recipe, preset: str | None, micro_batch: int, accumulation: int) -> str:
    """How training is started in a way that was found: what its settings say otherwise than those of `recipe`."""
    changed = [
        f"{key}={str(getattr(found, key)).lower()}"
        for key in ("optim", "bf16", "gradient_checkpointing", "quantize_llm")
        if getattr(found, key) != getattr(recipe, key)
    ]
    if found.search_steps and found.search_quantize != recipe.search_quantize:
        changed.append(f"stranger.quantize={found.search_quantize}")
    if found.search_steps and found.search_spread and not recipe.search_spread:
        changed.append("stranger.device_map=auto")
    if found.search_views != recipe.search_views:
        changed.append(f"stranger.views={found.search_views}")
    if micro_batch != recipe.micro_batch:
        changed += [f"per_device_train_batch_size={micro_batch}", f"gradient_accumulation_steps={accumulation}"]
    start = "fastvkd train --config YAML"
    if preset:
        start = f"deepspeed --num_gpus {found.world_size} fastvkd/train.py --config YAML"
        changed = ["engine=deepspeed", f"deepspeed={preset}", *changed]
    return " ".join([start, *changed])


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
