"""From settings to something the loop can run: the model, what it is trained on, and which of its weights move."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastvkd.data.records import Profile
from fastvkd.data.sources import read_forget_retain, read_split
from fastvkd.engines.checkpoints import BaseModel, identify_base, local_folder
from fastvkd.errors import SettingsError
from fastvkd.models import families, lora
from fastvkd.models.families import family_of
from fastvkd.models.loading import llm_layers_needed, load_config, load_model, load_processor
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.settings import Saliency, Settings
from fastvkd.unlearning import saliency
from fastvkd.unlearning.answers import AnswerBatch, AnswerSampler, AnswerTerm, read_answers
from fastvkd.unlearning.distill_data import DistillData, Report, world_size_of
from fastvkd.unlearning.methods import REMEMBERING, answer_method, manu
from fastvkd.unlearning.methods.idk import REFUSALS
from fastvkd.unlearning.objective import DistillBatch, VisualDistillation, site_losses
from fastvkd.unlearning.saturation import ProjectorUnits
from fastvkd.unlearning.teacher import frozen_copy

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

    distill_data: DistillData | None = None
    if uses_features:
        distill_data = DistillData(settings, forget, retain, processor, config, dtype, device, base)
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


def _steps(settings: Settings, sampler: AnswerSampler) -> int:
    """Optimiser updates: `max_steps`, or what `num_train_epochs` passes over the forget (or all) questions take."""
    if settings.num_train_epochs is None:
        return settings.max_steps
    each = sampler.per_batch * settings.gradient_accumulation_steps * world_size_of(settings)
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
    visited = sampler.visited(micro_steps, world_size_of(settings), forget=side == "forget", retain=side == "retain")
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
        (settings.answer_loss in REMEMBERING, f"answer_loss={settings.answer_loss}"),
        (settings.method in REMEMBERING, f"method={settings.method}"),
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
    scores, against = fisher_forget, fisher_retain
    if mask.score == "wagle":
        scores = saliency.wagle_scores(
            task.parameters,
            saliency.mean_gradient(task.parameters, side(True)),
            saliency.mean_gradient(task.parameters, side(False)),
            fisher_retain,
        )
    elif mask.score == "random":
        scores = saliency.random_scores(task.parameters, settings.seed)
    if mask.score != "fisher":  # they are no ratios
        against = {name: torch.ones_like(score) for name, score in scores.items()}
    with torch.no_grad():
        for (_, parameter), value in zip(task.parameters, start, strict=True):
            parameter.copy_(value)
    masks = saliency.build_masks(
        scores,
        against,
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
