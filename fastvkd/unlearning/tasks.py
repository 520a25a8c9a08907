"""From settings to something the loop can run: the model, what it is trained on, and which of its weights move."""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastvkd.data.dead_leaves import dead_leaves
from fastvkd.data.images import decode_image
from fastvkd.data.records import Photo, Profile
from fastvkd.data.sources import read_forget_retain, read_split
from fastvkd.engines.checkpoints import BaseModel, identify_base, local_folder
from fastvkd.errors import SettingsError
from fastvkd.models import families, lora
from fastvkd.models.families import family_of
from fastvkd.models.loading import llm_layers_needed, load_config, load_model, load_processor
from fastvkd.models.prompts import visual_prefix
from fastvkd.models.visual_path import VisualBatch, VisualPath, collate_images
from fastvkd.settings import Saliency, Settings
from fastvkd.unlearning import saliency
from fastvkd.unlearning.answers import AnswerBatch, AnswerSampler, AnswerTerm, read_answers
from fastvkd.unlearning.images import BatchPlan, ImageSet, Views, noise_image
from fastvkd.unlearning.methods import answer_method, manu
from fastvkd.unlearning.methods.idk import REFUSALS
from fastvkd.unlearning.objective import DistillBatch, VisualDistillation, site_losses
from fastvkd.unlearning.saturation import ProjectorUnits
from fastvkd.unlearning.targets import TargetTable, mean_features, redirect, variance
from fastvkd.unlearning.teacher import FeatureCache, fill_caches, frozen_copy

Report = Callable[[int, int], None]
_VARIANCE_IMAGES = 64  # retained images, at least, of which the teacher's variance is taken
_START_IMAGES = 512  # retained images whose features shape the start of `saturate`


@dataclass
class StepBatch:
    """What one forward pass gets: images to distil, answers about images to (un)learn, and answers about text alone."""

    distill: DistillBatch | None
    answers: AnswerBatch | None
    texts: AnswerBatch | None = None


class UnlearningModule(nn.Module):
    """The sum of the feature-level and the output-level objective, whichever are on."""

    def __init__(self, distill: VisualDistillation | None, answers: AnswerTerm | None, lambda_answer: float):
        super().__init__()
        self.distill, self.answers, self.lambda_answer = distill, answers, lambda_answer

    def forward(self, batch: "StepBatch | VisualBatch") -> dict[str, Any]:
        """Loss terms of a `StepBatch`; of a bare `VisualBatch` the features by site, for the teacher's pass."""
        if isinstance(batch, VisualBatch):
            assert self.distill is not None
            return self.distill.path(batch)
        terms: dict[str, Tensor] = {}
        if self.distill is not None and batch.distill is not None:
            terms = self.distill(batch.distill)
        if self.answers is not None:
            for name, asked in (("answer", batch.answers), ("text", batch.texts)):
                if asked is None:
                    continue
                parts = self.answers(asked)
                answer_loss = self.lambda_answer * parts.pop("total")
                terms["loss"] = terms["loss"] + answer_loss if "loss" in terms else answer_loss
                terms |= {f"loss_{name}_{side}": value.detach() for side, value in parts.items()}
        return terms


@dataclass
class Task:
    """`module` maps `batch(step, rank, world_size)` to loss terms; `parameters` are what an engine may change.

    A batch is made in two halves: `load` on the host, which a thread may do ahead of time, and `place` on the device.
    """

    model: nn.Module
    module: nn.Module
    parameters: list[tuple[str, nn.Parameter]]
    load: Callable[[int, int, int], StepBatch]
    place: Callable[[StepBatch], StepBatch]
    images_per_step: int
    max_steps: int
    teacher: nn.Module | None = None  # the copy that runs beside, if it does
    trained_share: float = 1.0
    see_teacher: Callable[[Callable[[VisualBatch], Any]], None] | None = (
        None  # still to be called, with what runs the model
    )

    def batch(self, step: int, rank: int, world_size: int) -> StepBatch:
        """The batch of micro-step `step` on one rank, on the device."""
        return self.place(self.load(step, rank, world_size))

    @property
    def models(self) -> list[nn.Module]:
        return [self.model] if self.teacher is None else [self.model, self.teacher]

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for _, p in self.parameters)

    @property
    def frozen_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) - self.trainable_parameters


def prepare(
    settings: Settings,
    device: torch.device,
    base: BaseModel,
    report: Report = lambda *_: None,
    *,
    partitioned: bool = False,
) -> Task:
    """Load data and model, write down what the teacher sees, and put the objective together.

    `partitioned` says that ZeRO-3 splits the weights while they are loaded. Then nothing can run before the engine
    is there: the teacher's pass is left to the caller (`Task.see_teacher`), and what needs whole weights earlier is
    refused.
    """
    if partitioned:
        _refuse_with_zero3(settings)
    uses_features = settings.method == "vkd"
    method = settings.answer_loss if uses_features else settings.method
    config = load_config(settings.model_name_or_path)
    layers = _layers_needed(settings, config)
    forget: list[Profile] = []
    if settings.method == "finetune":
        retain = read_split(settings.data, settings.finetune_split)
    else:
        forget, retain = read_forget_retain(settings.data, settings.forget_split, settings.retain_split)
    processor = load_processor(settings.model_name_or_path)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32

    distill_data: _DistillData | None = None
    if uses_features:
        distill_data = _DistillData(settings, forget, retain, processor, config, dtype, device, base)
        if settings.forget_target == "reference":
            assert settings.reference_model is not None
            reference = load_model(settings.reference_model, dtype=dtype, llm_layers=layers, device=device)
            distill_data.see_reference(
                VisualPath(reference, list(settings.sites)), identify_base(local_folder(settings.reference_model))
            )
            del reference

    model: Any = load_model(
        settings.model_name_or_path,
        dtype=dtype,
        attn_implementation=settings.attn_implementation,
        llm_layers=layers,
        device=device,
        quantize_llm=None if settings.quantize_llm == "none" else settings.quantize_llm,
    )
    parameters = _trainable(model, settings)
    families.train_only(model, [p for _, p in parameters])
    original = [p.detach().clone() for _, p in parameters] if settings.mask is not None else []

    answers: AnswerTerm | None = None
    sampler: AnswerSampler | None = None
    max_steps = settings.max_steps
    if method == "manu":
        sampler = AnswerSampler(processor, settings, forget=forget, retain=retain)
        parameters = _prune_neurons(settings, model, parameters, sampler, device)
        max_steps = 0
    elif method != "none":
        sampler = AnswerSampler(
            processor,
            settings,
            forget=forget,
            retain=() if method == "ga" else retain,
            texts=retain if method == "finetune" else (),
            refusals=REFUSALS if method == "idk" else (),
        )
        max_steps = _steps(settings, sampler)
        # Beside features lambda_answer weighs the term as a whole.
        weights = (1.0, 1.0) if uses_features else (settings.lambda_forget, settings.lambda_retain)
        answers = AnswerTerm(model, answer_method(method, settings), *weights)
        asked = max_steps * settings.gradient_accumulation_steps
        if settings.mask is not None:
            asked = max(asked, settings.mask.batches)
        _remember_original(answers, sampler, asked, settings, device)

    if settings.gradient_checkpointing:
        _checkpoint_layers(model)

    distill: VisualDistillation | None = None
    teacher: nn.Module | None = None
    if distill_data is not None:
        path = VisualPath(model, list(settings.sites))
        distill = VisualDistillation(
            path,
            distance=settings.distance,
            lambda_forget=settings.lambda_forget,
            lambda_retain=settings.lambda_retain,
            repel=settings.forget_target == "repel",
            margin=settings.repel_margin,
            saturation_margin=settings.saturation_margin,
        ).to(device)
        data, objective = distill_data, distill

        def see_teacher(run: Callable[[VisualBatch], Any]) -> None:
            data.see_teacher(run, report, all_ranks_run=partitioned)
            objective.losses = site_losses(settings.sites, data.variances, settings.distance, settings.huber_beta)

        if not partitioned:
            see_teacher(path)
        if settings.online_teacher:
            teacher = frozen_copy(model)
            distill_data.teach_online(VisualPath(teacher, list(settings.sites)))
        if settings.forget_target == "repel":
            _random_start(parameters, settings)
        elif settings.forget_target == "saturate":
            distill.units = ProjectorUnits(model)
            distill.units.start(path, distill_data.retained(_START_IMAGES))

    module = UnlearningModule(distill, answers, settings.lambda_answer if uses_features else 1.0)

    def load(step: int, rank: int, world_size: int) -> StepBatch:
        return StepBatch(
            distill_data.load(step, rank, world_size) if distill_data is not None else None,
            sampler.batch(step, rank, world_size) if sampler is not None else None,
            sampler.text_batch(step, rank, world_size) if sampler is not None else None,
        )

    def place(batch: StepBatch) -> StepBatch:
        return StepBatch(
            distill_data.place(batch.distill) if distill_data is not None and batch.distill is not None else None,
            batch.answers.to(device) if batch.answers is not None else None,
            batch.texts.to(device) if batch.texts is not None else None,
        )

    task = Task(model, module, parameters, load, place, settings.per_device_train_batch_size, max_steps, teacher)
    if distill is not None and partitioned:
        task.see_teacher = see_teacher
    if settings.mask is not None:
        task.trained_share = _apply_saliency(settings, settings.mask, task, original)
    return task


def _layers_needed(settings: Settings, config: Any) -> int | None:
    """How many LLM layers the method reads; None for the whole model with its head."""
    if settings.method == "vkd" and settings.answer_loss == "none":
        return llm_layers_needed(settings.sites, config)
    if settings.method == "rmu":
        layer = settings.rmu_layer or max(1, families.llm_depth(config) // 4)
        return llm_layers_needed([f"llm:{layer}"], config)
    return None


def _world_size(settings: Settings) -> int:
    """Number of processes that draw from the data together; DeepSpeed's launcher tells."""
    return int(os.environ.get("WORLD_SIZE", "1")) if settings.engine == "deepspeed" else 1


def _steps(settings: Settings, sampler: AnswerSampler) -> int:
    """Optimiser updates: `max_steps`, or what `num_train_epochs` passes over the forget (or all) questions take."""
    if settings.num_train_epochs is None:
        return settings.max_steps
    each = sampler.per_batch * settings.gradient_accumulation_steps * _world_size(settings)
    return max(1, math.ceil(settings.num_train_epochs * len(sampler) / each))


@torch.no_grad()
def _remember_original(
    term: AnswerTerm, sampler: AnswerSampler, micro_steps: int, settings: Settings, device: torch.device
) -> None:
    """Let the method note what it needs of the frozen original, of the questions that training will ask."""
    method: Any = term.method
    side = getattr(method, "remembers", None)
    if side is None:
        return
    visited = sampler.visited(micro_steps, _world_size(settings), forget=side == "forget", retain=side == "retain")
    for batch in visited:
        method.remember(read_answers(term.model, batch.to(device)))


def _prune_neurons(
    settings: Settings,
    model: nn.Module,
    parameters: list[tuple[str, nn.Parameter]],
    sampler: AnswerSampler,
    device: torch.device,
) -> list[tuple[str, nn.Parameter]]:
    """MANU: zero neurons of the trainable part; returns the weights that changed."""
    readers = manu.find_readers(model, parameters)

    def side(forget: bool) -> list[Tensor]:
        batches = sampler.visited(settings.manu_batches, 1, forget=forget, retain=not forget)
        return manu.importance(model, readers, (batch.to(device) for batch in batches))

    return manu.prune(readers, side(True), side(False), settings.manu_fraction)


def _checkpoint_layers(model: Any) -> None:
    """Recompute tower blocks and decoder layers in the backward pass instead of keeping what is inside them.

    transformers checkpoints a layer only where its `training` flag is set; the flag of the layer alone is, not of what
    is in it, so dropout stays off.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


_REMEMBER = ("npo", "kl", "rmu")  # methods that note what the original answers before training


def _refuse_with_zero3(settings: Settings) -> None:
    """What needs whole weights before DeepSpeed has taken the model over."""
    for found, key in (
        (settings.mask is not None, "a saliency mask"),
        (settings.trainable == "lora", "trainable=lora"),
        (
            settings.online_teacher and any(site.startswith("llm") for site in settings.sites),
            "an online teacher (augment=true) at a site inside the LLM",
        ),
        (settings.forget_target in ("reference", "repel", "saturate"), f"forget_target={settings.forget_target}"),
        (settings.answer_loss in _REMEMBER, f"answer_loss={settings.answer_loss}"),
        (settings.method in _REMEMBER, f"method={settings.method}"),
        (settings.compile, "compile=true"),
    ):
        if found:
            raise SettingsError(
                f"{key} needs whole weights, which ZeRO-3 splits while loading: use deepspeed=zero2, or engine=local"
            )


def _trainable(model: nn.Module, settings: Settings) -> list[tuple[str, nn.Parameter]]:
    """Visual parameters that the sites reach; an answer, at the end of the model, reaches all. Or (also) the LLM's."""
    family = family_of(model)
    if settings.trainable == "lora":
        names = {id(module): name for name, module in model.named_modules()}
        llm = families.language_model(model, family)
        return lora.add_adapters(llm, names, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed)
    if settings.trainable == "all":
        return families.all_parameters(model, family)
    reached = list(settings.sites) if settings.method == "vkd" and settings.answer_loss == "none" else None
    return families.visual_parameters(model, family, settings.trainable, reached)


@torch.no_grad()
def _random_start(parameters: list[tuple[str, nn.Parameter]], settings: Settings) -> None:
    """Move each matrix by `repel_start` of its norm: at the teacher itself the gradient of repel is zero."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _, parameter in parameters:
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.add_(noise * (settings.repel_start * parameter.norm() / noise.norm()))


def _apply_saliency(settings: Settings, mask: Saliency, task: Task, original: list[Tensor]) -> float:
    """Score every weight for each side of the task's own objective, then mask every gradient to come.

    Weights outside the masks get their `original` values, which a random start may have left.
    """

    def side(forget_side: bool) -> Iterator[Callable[[], Tensor]]:
        for step in range(mask.batches):
            yield functools.partial(_side_loss, task, step, forget_side)

    start = [p.detach().clone() for _, p in task.parameters]
    if settings.method in ("vkd", "rmu"):
        # Retained features are exact at the start, so their gradient is zero: estimate both sides one step further on.
        _nudge(task, settings)
    fisher_forget = saliency.fisher_information(task.parameters, side(True))
    fisher_retain = saliency.fisher_information(task.parameters, side(False))
    saliency.check_reached(fisher_forget, fisher_retain)
    if mask.score == "wagle":
        fisher_forget = saliency.wagle_scores(
            task.parameters,
            saliency.mean_gradient(task.parameters, side(True)),
            saliency.mean_gradient(task.parameters, side(False)),
            fisher_retain,
        )
    elif mask.score == "random":
        fisher_forget = saliency.random_scores(task.parameters, settings.seed)
    if mask.score != "fisher":  # they are no ratios
        fisher_retain = {name: torch.ones_like(score) for name, score in fisher_forget.items()}
    with torch.no_grad():
        for (_, parameter), value in zip(task.parameters, start, strict=True):
            parameter.copy_(value)
    masks = saliency.build_masks(
        fisher_forget,
        fisher_retain,
        granularity=mask.granularity,
        threshold=mask.threshold,
        fraction=mask.fraction,
    )
    with torch.no_grad():
        for (name, parameter), value in zip(task.parameters, original, strict=True):
            parameter.copy_(torch.where(masks[name].to(value.device).to_bool(), parameter, value))
    saliency.mask_gradients(task.parameters, masks)
    return saliency.trained_share(masks)


def _side_loss(task: Task, step: int, forget_side: bool) -> Tensor:
    """What one side adds to the loss of batch `step`; of an output-level method its own term, without its lambda."""
    one = _one_side(task.batch(step, 0, 1), forget_side)
    assert isinstance(task.module, UnlearningModule)
    if task.module.distill is not None or task.module.answers is None:
        return task.module(one)["loss"]
    terms = task.module.answers(one.answers)
    return terms["forget" if forget_side else "retain"]


def _nudge(task: Task, settings: Settings) -> None:
    """One signed step along the forget side's gradient, of the size of Adam's first step."""
    loss = task.module(_one_side(task.batch(0, 0, 1), True))["loss"]
    gradients = torch.autograd.grad(loss, [p for _, p in task.parameters], allow_unused=True)
    with torch.no_grad():
        for (_, parameter), gradient in zip(task.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(settings.learning_rate * gradient.sign())


def _one_side(batch: StepBatch, forget_side: bool) -> StepBatch:
    """The same batch with the other side's images and answers out of the loss."""
    distill, answers = batch.distill, batch.answers
    if distill is not None:
        distill = dataclasses.replace(distill, weight=(distill.is_forget == forget_side).float())
    if answers is not None:
        keep = answers.is_forget == forget_side
        answers = dataclasses.replace(answers, predicts=torch.where(keep[:, None], answers.predicts, -100))
    return StepBatch(distill, answers)


def _auxiliary_photos(settings: Settings, like: Photo) -> list[Photo]:
    """Synthetic images of the size of photo `like`."""
    size = decode_image(like.data, like.source).size
    photos = []
    for i in range(settings.auxiliary_images):
        buffer = io.BytesIO()
        dead_leaves(size, (settings.seed, 18, i)).save(buffer, format="PNG", compress_level=1)
        photos.append(Photo(buffer.getvalue(), f"auxiliary image {i}"))
    return photos


class _DistillData:
    """Images, cached teacher features, and targets of a feature-level run; makes its batches."""

    def __init__(
        self,
        settings: Settings,
        forget: list[Profile],
        retain: list[Profile],
        processor: Any,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        base: BaseModel,
    ):
        self.settings, self.device = settings, device
        self._processor, self._config, self._dtype, self._base = processor, config, dtype, base
        forget_photos = [photo for profile in forget for photo in profile.photos]
        retain_photos = [photo for profile in retain for photo in profile.photos]
        auxiliary = _auxiliary_photos(settings, retain_photos[0])
        self.images = ImageSet(
            forget_photos + retain_photos + auxiliary, processor, config, dtype=dtype, pin=device.type == "cuda"
        )
        count, end = len(ImageSet.distinct(forget_photos)), len(self.images) - len(auxiliary)
        self.forget_keys, self.retain_keys = self.images.hashes[:count], self.images.hashes[count:end]
        self.plan = BatchPlan(
            range(count),
            range(count, end),
            batch_size=settings.per_device_train_batch_size,
            forget_share=settings.forget_share,
            seed=settings.seed,
            auxiliary=range(end, len(self.images)),
            auxiliary_share=settings.auxiliary_share,
        )
        self.variances: dict[str, float] = {}
        self._online: VisualPath | None = None
        self._tables: dict[str, TargetTable] = {}
        self._caches: dict[str, FeatureCache] = {}
        self._reference: dict[str, FeatureCache] = {}
        self._position = {key: i for i, key in enumerate(self.images.hashes)}
        self._repels = settings.forget_target == "repel"
        self._needed = self._find_needed()
        self.images.prepare(self._needed)

    def see_reference(self, path: VisualPath, identity: BaseModel) -> None:
        """Write down what the reference model sees of the forget images; afterwards it may be freed."""
        self._reference = self._open_caches(identity)
        fill_caches(
            self._reference, path, self.forget_keys, self._batch_of(self.forget_keys), batch_size=16, device=self.device
        )

    def see_teacher(self, path: Callable[[VisualBatch], Any], report: Report, *, all_ranks_run: bool = False) -> None:
        """Write down what the original sees of the images of the run and of noise, and derive the targets from it."""
        settings = self.settings
        noise = self._noise_keys() if settings.forget_target == "noise" else {}
        needed = [self.images.hashes[i] for i in self._needed]
        keys = [*needed, *dict.fromkeys(noise.values())]
        retained = set(self.retain_keys)
        retain_keys = [key for key in needed if key in retained]
        self._caches = self._open_caches(self._base)
        fill_caches(
            self._caches,
            path,
            keys,
            self._batch_of(keys),
            batch_size=16,
            device=self.device,
            progress=report,
            all_ranks_run=all_ranks_run,
        )
        source: dict[str, str] = dict(noise)
        if settings.forget_target == "mean":
            source = dict.fromkeys(self.forget_keys, "mean")
        elif settings.forget_target == "redirect":
            source = redirect(self.forget_keys, self.retain_keys, settings.seed)
        for site, cache in self._caches.items():
            self.variances[site] = variance(cache, retain_keys)
            mean = mean_features(cache, retain_keys) if settings.forget_target == "mean" else None
            self._tables[site] = TargetTable(cache, source, mean, self._reference.get(site))

    def _find_needed(self) -> list[int]:
        """The images whose features are asked for: in a run too short to visit all, those of its batches, and enough
        retained ones for a variance."""
        settings = self.settings
        if settings.mask is not None or settings.num_train_epochs or settings.forget_target in ("mean", "redirect"):
            return list(range(len(self.images)))
        visited = self.plan.visited(settings.max_steps * settings.gradient_accumulation_steps, _world_size(settings))
        others = [i for i in self.plan.retain if i not in visited]
        lacking = max(0, _VARIANCE_IMAGES - (len(self.plan.retain) - len(others)))
        return sorted(visited.union(others[:lacking]))

    def teach_online(self, teacher: VisualPath) -> None:
        """From now on retained images' targets are what `teacher` sees of the very view that is trained on."""
        self._online = teacher

    def retained(self, count: int, batch_size: int = 32) -> Iterator[VisualBatch]:
        """Up to `count` retained and auxiliary images, spread evenly over both, in batches on the device."""
        kept = [*self.plan.retain, *self.plan.auxiliary]
        chosen = kept[:: max(1, len(kept) // count)][:count]
        for start in range(0, len(chosen), batch_size):
            yield self.images.batch(chosen[start : start + batch_size]).to(self.device)

    def load(self, step: int, rank: int, world_size: int) -> DistillBatch:
        """The images of one step on one rank, forget first, with cached targets; on the host, pinned for a GPU."""
        forget, retain = self.plan.indices(step, rank, world_size)
        indices = forget + retain
        views: Views | None = None
        if self.settings.augment:
            positions = self.plan.positions(rank, world_size)
            views = Views((self.settings.seed, 14, step, 0), positions, world_size * len(indices))
        keys = [self.images.hashes[i] for i in indices]
        images = self.images.batch(indices, views)
        # What an online teacher sees is known on the device only. Images to be forgotten stand first and aim elsewhere,
        # unless they are only repelled from the teacher.
        taught = None if self._online is None else images.tail(0 if self._repels else len(forget))
        batch = DistillBatch(
            images,
            torch.arange(len(indices)) < len(forget),
            {} if taught is not None else {site: table.gather(keys) for site, table in self._tables.items()},
            keys=keys,
            taught=taught,
        )
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def place(self, loaded: DistillBatch) -> DistillBatch:
        """The same batch on the device, with the targets that the online teacher gives."""
        batch = loaded.to(self.device)
        if batch.taught is None:
            return batch
        seen = self._see_online(batch.taught, batch.keys[-batch.taught.n_images :])
        for site, table in self._tables.items():
            aims = [None] * (len(batch.keys) - len(seen[site]))
            batch.targets[site] = table.gather(batch.keys, [*aims, *seen[site]]).to(self.device)
        return batch

    @torch.no_grad()
    def _see_online(self, images: VisualBatch, keys: Sequence[str]) -> dict[str, list[Tensor]]:
        assert self._online is not None
        features = self._online(images)
        # A view has as many tokens as its image, so nothing need be counted on the device.
        return {site: list(features[site].gathered().split(t.counts(keys))) for site, t in self._tables.items()}

    def _noise_keys(self) -> dict[str, str]:
        """Forget image -> the key of its noise image, which has its size: one noise image a size, or one an image."""
        each = self.settings.noise_images == "per_image"
        keys = {}
        for i, key in enumerate(self.forget_keys):
            width, height = self.images.size(i)
            keys[key] = f"noise-{self.settings.seed}-{i if each else 0}-{width}x{height}"
        return keys

    def _batch_of(self, keys: list[str]) -> Callable[[Any], VisualBatch]:
        def batch(positions: Any) -> VisualBatch:
            wanted = [keys[p] for p in positions]
            if wanted[0] in self._position and wanted[-1] in self._position:
                return self.images.batch([self._position[key] for key in wanted])
            pictures = []
            for key in wanted:
                if key in self._position:
                    pictures.append(self.images.image(self._position[key]))
                else:
                    _, seed, number, size = key.split("-")
                    width, height = map(int, size.split("x"))
                    pictures.append(noise_image((width, height), (int(seed), 15, int(number))))
            return collate_images(self._processor, self._config, pictures)

        return batch

    def _open_caches(self, model: BaseModel) -> dict[str, FeatureCache]:
        settings = self.settings
        rank = int(os.environ.get("RANK", "0")) if settings.engine == "deepspeed" else 0
        root = Path(settings.cache_dir) if settings.cache_dir else Path(settings.output_dir) / "teacher_cache"
        ingredients = {
            "weights": model.fingerprint,
            "prefix": visual_prefix(self._processor),
            "preprocessing": self._processor.image_processor.to_json_string(),
            "compute_dtype": str(self._dtype),
            "quantize_llm": settings.quantize_llm,
        }
        return {
            site: FeatureCache(root, site=site, dtype=settings.cache_dtype, ingredients=ingredients, rank=rank)
            for site in settings.sites
        }
