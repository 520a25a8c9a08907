"""From settings to something the loop can run: the model, what it is trained on, and which of its weights move.

A `Draft` is a run before its model has been run. It becomes a `Prepared` once the original has been asked what the
method needs of it. Under ZeRO-3 the engine takes the weights over between the two.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvkd.data.sources import read_forget_retain, read_split
from fastvkd.data.texts import refuse_marks
from fastvkd.errors import SettingsError
from fastvkd.methods import METHODS, Method, Side
from fastvkd.models import families, lora, sine
from fastvkd.models.families import family_of
from fastvkd.models.folder import BaseModel, local_folder
from fastvkd.models.foreign import refuse_quantised
from fastvkd.models.loading import checkpoint_layers, llm_layers_needed, load_config, load_model, load_processor
from fastvkd.models.processing import special_tokens
from fastvkd.records import Profile
from fastvkd.settings import Saliency, Settings
from fastvkd.unlearning import saliency
from fastvkd.unlearning.answers import AnswerSampler, AnswerTask, Asked
from fastvkd.unlearning.ingredients import Forward, Runner, Sources, Trained
from fastvkd.unlearning.rates import rate_of
from fastvkd.unlearning.sampling import world_size_of
from fastvkd.unlearning.vkd.objective import DistillBatch
from fastvkd.unlearning.vkd.task import Distillation, FeatureTask
from fastvkd.unlearning.vkd.teacher import frozen_copy
from fastvkd.unlearning.watch import Watch

Scrubbing = Callable[[Callable[[int, int, dict[str, float]], None]], dict[str, Tensor]]


class Task(Protocol):
    """What is trained on: `FeatureTask`, `AnswerTask`, or both.

    A batch is made in two halves: `load` gives one rank's part on the host, which a thread may do ahead of time, and
    `place` has it on the device. `loss` gives `loss`, a scalar with graph, and other figures; with `only` of one side.
    """

    def load(self, step: int, rank: int, world_size: int) -> Any: ...
    def place(self, loaded: Any) -> Any: ...
    def loss(self, batch: Any, only: Side | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class JointTask:
    """Features and answers in one step: the loss is L_features + `lambda_answer` * L_answers."""

    features: FeatureTask
    answers: AnswerTask
    lambda_answer: float

    def load(self, step: int, rank: int, world_size: int) -> tuple[DistillBatch, Asked]:
        return self.features.load(step, rank, world_size), self.answers.load(step, rank, world_size)

    def place(self, loaded: tuple[DistillBatch, Asked]) -> tuple[DistillBatch, Asked]:
        return self.features.place(loaded[0]), self.answers.place(loaded[1])

    def loss(self, batch: tuple[DistillBatch, Asked], only: Side | None = None) -> dict[str, Tensor]:
        features, answers = self.features.loss(batch[0], only), self.answers.loss(batch[1], only)
        return {**features, **answers, "loss": features["loss"] + self.lambda_answer * answers["loss"]}


@dataclass(frozen=True)
class Prepared:
    """A run that can start: what is trained, and on what.

    settings: with the `max_steps` that `num_train_epochs` comes to. task: None where the weights have been changed
    already. trained_share: of the trainable weights, those that a saliency mask lets move. watch: what looks at
    held-out views, where something does. scrub: finds adapters of the LLM once the visual part has been trained, and
    takes what is to be told its progress; None where the LLM is left alone.
    """

    settings: Settings
    trained: Trained
    task: Task | None
    trained_share: float = 1.0
    watch: Watch | None = None
    scrub: Scrubbing | None = None


@dataclass(frozen=True)
class Gathered:
    """What is known of a run before its model is loaded.

    settings: as in `Prepared`. sampler: the questions that the method asks, if it asks any.
    """

    settings: Settings
    sources: Sources
    sampler: AnswerSampler | None


@dataclass(frozen=True)
class Draft:
    """A run whose model has not been run.

    settings: as in `Prepared`. features: what the method sees of images. sampler: what it asks of answers. original:
    the values of the trained weights, where a mask is to hold some. partitioned: ZeRO-3 has split the weights.
    """

    settings: Settings
    device: torch.device
    trained: Trained
    features: Distillation | None
    sampler: AnswerSampler | None
    original: list[Tensor]
    partitioned: bool

    def finish(
        self, forward: Forward | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Prepared:
        """Ask the original what the method needs of it, move the weights to their start, and mask them.

        `forward` is the engine's under ZeRO-3; elsewhere the model runs by itself.
        """
        settings, trained, method = self.settings, self.trained, METHODS[self.settings.method]
        if not method.trains:
            parameters = method.make(settings)(trained, self.sampler, self.device)
            return Prepared(settings, dataclasses.replace(trained, parameters=parameters), None)
        answers = self._answer_task() if self.sampler is not None else None
        task: Task | None = answers
        watch: Watch | None = None
        if self.features is not None:
            task = features = self.features.task(trained, forward or trained.runner, progress, self.partitioned)
            watch = features.watch
            if answers is not None:
                task = JointTask(features, answers, settings.lambda_answer)
        assert task is not None, "a method sees images or asks questions"
        share = 1.0
        if settings.mask is not None:
            share = _mask_weights(settings, settings.mask, task, trained.parameters, self.original)
        scrub: Scrubbing | None = None
        if self.features is not None and settings.scrub is not None:
            scrub = functools.partial(self.features.scrub, trained.model)
        return Prepared(settings, trained, task, share, watch, scrub)

    def _answer_task(self) -> AnswerTask:
        settings = self.settings
        method = METHODS[settings.method].on_answers(settings)
        assert method is not None and self.sampler is not None
        # Beside features lambda_answer weighs the loss as a whole.
        lambdas = (settings.lambda_forget, settings.lambda_retain) if self.features is None else (1.0, 1.0)
        task = AnswerTask(self.trained.model, method.make(settings), self.sampler, self.device, *lambdas)
        if method.remembers is not None:
            asked = settings.max_steps * settings.gradient_accumulation_steps
            if settings.mask is not None:
                asked = max(asked, settings.mask.batches)
            task.remember(method.remembers, asked, world_size_of(settings))
        return task


def prepare(settings: Settings, device: torch.device, base: BaseModel) -> Prepared:
    """A run that can start, its weights whole on `device`; raises as `draft`."""
    return draft(gather(settings, base), device).finish()


def gather(settings: Settings, base: BaseModel) -> Gathered:
    """Read data, processor and configuration, and count the updates.

    Raises FastVKDError for data, a processor or settings that do not fit together.
    """
    method = METHODS[settings.method]
    sources = _read(settings, method, base)
    sampler = _sampler(settings, sources)
    if sampler is not None and method.trains:
        settings = dataclasses.replace(settings, max_steps=sampler.updates(settings))
    return Gathered(settings, sources, sampler)


def draft(gathered: Gathered, device: torch.device, *, partitioned: bool = False) -> Draft:
    """Load the model. `partitioned` says that ZeRO-3 splits the weights while they are loaded.

    Raises FastVKDError for a model that does not fit the rest, and for settings that need whole weights before there is
    an engine, where these are split.
    """
    settings, sources = gathered.settings, gathered.sources
    if partitioned:
        refuse_with_zero3(settings)
    method = METHODS[settings.method]
    features = method.make(settings)(settings, sources, device) if method.features else None
    model: Any = load_model(
        settings.model_name_or_path,
        dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        attn_implementation=settings.attn_implementation,
        llm_layers=sources.llm_layers,
        device=device,
        quantize_llm=None if settings.quantize_llm == "none" else settings.quantize_llm,
    )
    parameters = _trainable(model, settings)
    families.train_only(model, [p for _, p in parameters])
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    sampler = gathered.sampler
    if method.anchors is not None:  # asked of the model itself; they are as many an update as what they replace
        sampler = _sampler(settings, _anchored(settings, sources, model))
    # before the engine, and whatever else may hang hooks on the model
    teacher = frozen_copy(model) if method.features and settings.online_teacher else None
    return Draft(
        settings,
        device,
        Trained(model, parameters, teacher, Runner(model)),
        features,
        sampler,
        [p.detach().clone() for _, p in parameters] if settings.mask is not None else [],
        partitioned,
    )


def _read(settings: Settings, method: Method, base: BaseModel) -> Sources:
    """The profiles of the method's splits, and what is known of the model."""
    refuse_quantised(local_folder(settings.model_name_or_path))
    config = load_config(settings.model_name_or_path)
    sites = method.llm_sites(settings, families.llm_depth(config))
    llm_layers = llm_layers_needed(sites, config) if sites is not None else None
    forget: list[Profile] = []
    if method.split_key is not None:
        retain = read_split(settings.data, getattr(settings, method.split_key))
    else:
        forget, retain = read_forget_retain(settings.data, settings.forget_split, settings.retain_split)
    processor = load_processor(settings.model_name_or_path, max_pixels=settings.max_pixels)
    if method.on_answers(settings) is not None or settings.forget_target == "stranger":  # it asks questions
        refuse_marks([*forget, *retain], special_tokens(processor))
    return Sources(forget, retain, processor, config, base, llm_layers)


def _anchored(settings: Settings, sources: Sources, model: nn.Module) -> Sources:
    """The sources with the questions that the method makes of the forget photos in place of the retain set."""
    anchors = METHODS[settings.method].anchors
    assert anchors is not None
    return dataclasses.replace(sources, retain=resolve_name(anchors)(model, sources.processor, sources.forget))


def _sampler(settings: Settings, sources: Sources) -> AnswerSampler | None:
    """The questions that the method asks, if it asks any."""
    method = METHODS[settings.method].on_answers(settings)
    if method is None:
        return None
    return AnswerSampler(
        sources.processor,
        settings,
        forget=sources.forget if "forget" in method.sides else (),
        retain=sources.retain if "retain" in method.sides else (),
        texts=sources.retain if method.asks_texts else (),
        refusals=resolve_name(method.refusals) if method.refusals else (),
    )


def refuse_with_zero3(settings: Settings) -> None:
    """What needs whole weights before DeepSpeed has taken the model over."""
    method = METHODS[settings.method]
    answers = method.on_answers(settings)
    key = "answer_loss" if method.features else "method"
    for found, what in (
        (settings.mask is not None, "a saliency mask"),
        (settings.trainable in ("lora", "sine"), f"trainable={settings.trainable}"),
        (
            settings.online_teacher and any(site.startswith("llm") for site in settings.sites),
            "an online teacher (augment=true) at a site inside the LLM",
        ),
        (settings.forget_target in ("reference", "repel", "saturate"), f"forget_target={settings.forget_target}"),
        (answers is not None and answers.remembers is not None, f"{key}={getattr(settings, key)}"),
        (settings.compile, "compile=true"),
    ):
        if found:
            raise SettingsError(
                f"{what} needs whole weights, which ZeRO-3 splits while loading: use deepspeed=zero2, or engine=local"
            )


def _trainable(model: nn.Module, settings: Settings) -> list[tuple[str, nn.Parameter]]:
    """The LLM's adapters, everything, or the visual parameters that the loss reaches.

    An answer, at the end of the model, reaches them all.
    """
    family = family_of(model)
    if settings.trainable == "lora":
        names = {id(module): name for name, module in model.named_modules()}
        llm = families.language_model(model, family)
        return lora.add_adapters(llm, names, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=settings.seed)
    if settings.trainable == "all":
        return families.all_parameters(model, family)
    sites = METHODS[settings.method].sites(settings)
    if settings.trainable == "sine":
        return sine.add_sines(model, families.visual_parameters(model, family, "projector", sites))
    return families.visual_parameters(model, family, settings.trainable, sites)


def _mask_weights(
    settings: Settings, rule: Saliency, task: Task, parameters: saliency.NamedParameters, original: list[Tensor]
) -> float:
    """Score every weight for each side of the task's own loss, then mask every gradient to come.

    Weights outside the masks get their `original` values, which a random start may have left. Returns the share of
    weights that may move.
    """
    judged = task
    if isinstance(task, AnswerTask):  # a side is judged by its own term, without its lambda
        judged = dataclasses.replace(task, lambda_forget=1.0, lambda_retain=1.0)

    def loss(task: Task, step: int, side: Side) -> Tensor:
        return task.loss(task.place(task.load(step, 0, 1)), side)["loss"]

    def losses(side: Side) -> Iterator[Callable[[], Tensor]]:
        return (functools.partial(loss, judged, step, side) for step in range(rule.batches))

    start = [p.detach().clone() for _, p in parameters]
    if METHODS[settings.method].retains_exactly:
        # The retain gradient is zero at the start: estimate both sides one step further on.
        saliency.nudge(parameters, loss(task, 0, "forget"), rate_of(settings, parameters))
    masks = saliency.masks_of(rule, parameters, losses, settings.seed, start)
    saliency.put_back(parameters, original, masks)
    saliency.mask_gradients(parameters, masks)
    return saliency.trained_share(masks)
