"""Unlearning from settings to checkpoint: the loop behind `fastvkd train`, the DeepSpeed launcher and the library.

What is trained (objective, targets, masks) is put together in `tasks.py`; the engine updates the weights.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastvkd_kernels import patch_frozen
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from fastvkd.devices import peak_memory_bytes, pick_device
from fastvkd.engines.checkpoints import CheckpointWriter, go_back, load_checkpoint
from fastvkd.engines.local import LocalEngine
from fastvkd.engines.protocol import Engine
from fastvkd.errors import SettingsError, TrainingError
from fastvkd.files import UNFINISHED, delete_folder, held
from fastvkd.methods import METHODS
from fastvkd.models.compiled import compiled_blocks
from fastvkd.settings import Settings
from fastvkd.unlearning.ingredients import Trained
from fastvkd.unlearning.metrics import Metrics
from fastvkd.unlearning.phases import PhaseTimer
from fastvkd.unlearning.prefetch import prefetched
from fastvkd.unlearning.rates import find_rate, rate_of
from fastvkd.unlearning.start import Start, begin
from fastvkd.unlearning.tasks import Draft, Prepared, Scrubbing, Task, draft
from fastvkd.unlearning.watch import Course, Watch

log = logging.getLogger("fastvkd")

Listener = Callable[[str, int, int, dict[str, float]], None]  # phase, done, total, figures


@dataclass(frozen=True)
class Unlearned:
    """What a run did. `checkpoint` holds the trained visual weights; `metrics` is the file with a line per step."""

    checkpoint: Path
    metrics: Path
    steps: int
    images_seen: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    trainable_parameters: int
    frozen_parameters: int
    trained_share: float  # of the trainable weights, what the saliency mask lets move
    finished: bool  # False when SIGTERM ended the run early, after saving
    verdict: str | None = None  # what a run that watched itself reached, and whether that is done


def unlearn(settings: Settings, *, progress: Listener = lambda *_: None) -> Unlearned:
    """Make the model of `settings` forget the forget split, and write a checkpoint of its visual weights.

    `progress(phase, done, total, figures)` is called as work goes on. Raises FastVKDError (one line, naming the mend)
    for settings, data or models that cannot be used; nothing is left half-written. AlreadyForgotten, one of them, says
    that the model has forgotten the whole forget set by earlier requests.
    """
    settings.check()
    device = pick_device(settings.device)
    first_of_all = settings.engine == "local" or os.environ.get("RANK", "0") == "0"
    with held(Path(settings.output_dir), "output_dir") if first_of_all else contextlib.nullcontext():
        torch.manual_seed(settings.seed)
        started = time.perf_counter()
        start = begin(settings)
        if start.asked is not None and first_of_all:
            log.warning(start.asked.line())
        return _unlearn(start, device, started, progress)


def _unlearn(start: Start, device: torch.device, started: float, progress: Listener) -> Unlearned:
    prepared, engine = _prepare(start, device, lambda done, total: progress("teacher", done, total, {}))
    settings = prepared.settings
    seconds = {"prepare": time.perf_counter() - started}

    if settings.watch_steps and prepared.watch is None:
        key = "forget_target" if METHODS[settings.method].features else "method"
        log.warning("%s=%s has no targets to come near: watch_steps is left out", key, getattr(settings, key))

    run = _Run(prepared, engine, start, progress)
    first = run.resume()
    started = time.perf_counter()
    with run.writer, Metrics(run.output, settings, engine, first) as metrics, _sigterm() as stop_asked:
        finished = run.train(first, metrics, stop_asked)
        metrics.flush()
        checkpoint = run.save()
    if finished:
        run.discard(run.best)
    seconds["unlearn"] = time.perf_counter() - started
    if finished and prepared.scrub is not None:
        started = time.perf_counter()
        checkpoint = run.scrub(prepared.scrub)
        seconds["scrub"] = time.perf_counter() - started
    trained = prepared.trained
    images_an_update = settings.gradient_accumulation_steps * settings.per_device_train_batch_size * engine.world_size
    return Unlearned(
        checkpoint=checkpoint,
        metrics=metrics.path,
        steps=engine.updates,
        images_seen=(engine.updates - first) * images_an_update,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        trainable_parameters=trained.trainable_parameters,
        frozen_parameters=trained.frozen_parameters,
        trained_share=prepared.trained_share,
        finished=finished,
        verdict=run.course.verdict() if finished and run.course.seen else None,
    )


def _prepare(start: Start, device: torch.device, progress: Callable[[int, int], None]) -> tuple[Prepared, Engine]:
    """The run and its engine; under ZeRO-3 the engine comes first, since it takes the weights over."""
    settings = start.settings
    ds_config, partitioning = _join_deepspeed(settings, device) if settings.engine == "deepspeed" else ({}, None)
    if settings.engine == "deepspeed" and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    begun = draft(start.gathered, device, partitioned=partitioning is not None)
    if partitioning is None:
        with _arithmetic(settings, begun.trained):
            prepared = begun.finish(progress=progress)
        return prepared, build_engine(prepared, device, ds_config)
    engine = build_engine(begun, device, ds_config)
    with _arithmetic(settings, begun.trained):
        return begun.finish(engine.forward_module, progress), engine


def writes_behind(engine: Engine) -> bool:
    """Whether checkpoints are written while training goes on: not on a CPU, which that would slow down and fill with a
    copy, and not on several ranks, which must agree that all have written."""
    return engine.world_size == 1 and engine.device.type != "cpu"


class _Run:
    """A run under way: what is trained, by which engine, what it has concluded so far, and its checkpoints.

    best: where the checkpoint of the best look is kept until the run has ended well.
    """

    def __init__(self, prepared: Prepared, engine: Engine, start: Start, progress: Listener):
        self.prepared, self.engine, self.start, self.progress = prepared, engine, start, progress
        self.base = start.gathered.sources.base
        self.settings, self.course = prepared.settings, Course()
        self.output = Path(self.settings.output_dir)
        self.best = self.output / "best"
        self.writer = CheckpointWriter()

    def resume(self) -> int:
        """Take up the checkpoint to go on from, and the output folder; returns the updates that were done."""
        checkpoint, engine = self.start.resume_from, self.engine
        resumed = None if checkpoint is None else load_checkpoint(checkpoint, engine, base_model=self.base)
        engine.any_rank(False)  # all have read it
        if engine.rank == 0:
            self.start.take_over()
        engine.any_rank(False)
        if resumed is None:
            return 0
        first, notice = resumed.updates, f": {resumed.notice}" if resumed.notice else ""
        log.warning("resumed from %s at step %d%s", checkpoint, first, notice)
        if self.prepared.watch is not None:
            self.course = Course(**resumed.watch)
        if self.settings.learning_rate == "auto":
            assert self.course.learning_rate is not None, "`begin` refuses a checkpoint without it"
            engine.base_learning_rate = self.course.learning_rate
        if engine.any_rank(not (self.best / f"checkpoint-{self.course.best_step}").exists()):
            self.course.best_step = first  # what is kept, if anything, is of a look that this run may not come to
            self.discard(self.best)
        return first

    def scrub(self, find: Scrubbing) -> Path:
        """Edit the LLM as well. Its adapters go into the last checkpoint, which is there without them already."""
        assert self.settings.scrub is not None
        scale = self.settings.scrub.rank / self.settings.lora_alpha  # readers fold in lora_alpha / rank of them
        found = find(functools.partial(self.progress, "scrub"))
        return self.save(beside={name: w * scale if name.endswith("lora_B") else w for name, w in found.items()})

    def save(
        self,
        to: Path | None = None,
        keep: int | None = None,
        *,
        behind: bool = False,
        beside: dict[str, Tensor] | None = None,
    ) -> Path:
        """With `behind` training may go on while it is written, where that costs it nothing."""
        more = {} if beside is None else {"beside": beside}
        return self.writer.save(
            self.output if to is None else to,
            self.engine,
            behind=behind and writes_behind(self.engine),
            sampler={"micro_step": self.engine.updates * self.settings.gradient_accumulation_steps},
            settings=self.settings.to_dict(),
            base_model=self.base,
            keep=self.settings.save_total_limit if keep is None else keep,
            watch=None if self.prepared.watch is None else dataclasses.asdict(self.course),
            run=self.start.identity,
            forgotten=self.start.forgotten,
            **more,
        )

    def train(self, first: int, metrics: Metrics, stop_asked: threading.Event) -> bool:
        """Updates `first` to the last, saved on the way; False where `stop_asked` ended them early."""
        settings, engine, course = self.settings, self.engine, self.course
        task, watch, parts = self.prepared.task, self.prepared.watch, settings.gradient_accumulation_steps
        if task is None:
            return True
        with contextlib.ExitStack() as during:
            during.enter_context(_arithmetic(settings, self.prepared.trained))
            is_traced = settings.profile and engine.rank == 0
            tracer = during.enter_context(_tracer(self.output)) if is_traced else None
            load = functools.partial(task.load, rank=engine.rank, world_size=engine.world_size)
            phase = PhaseTimer(engine.device)
            if watch is not None and settings.learning_rate == "auto" and course.learning_rate is None:
                self._find_rate(task, watch, load, metrics)
            engine.schedule = course.schedule(settings)
            steps = range(first * parts, settings.max_steps * parts)
            batches = during.enter_context(prefetched(load, steps, settings.prefetch))
            done = first
            while done < course.steps(settings):
                terms, norm = self._update(task, batches, phase)
                done += 1
                seen: dict[str, float] = {}
                if watch is not None and (done % settings.watch_steps == 0 or done == course.steps(settings)):
                    seen = watch.look(engine)
                metrics.record(done, terms, norm, engine.learning_rate(), phase.take(), seen)
                if tracer is not None:
                    tracer.step()
                if metrics.due(done):
                    self.progress("unlearn", done, course.steps(settings), course.seen | metrics.flush())
                if seen:
                    self._judge(done, seen, metrics)
                asked = stop_asked.is_set()
                if engine.any_rank(asked) if engine.world_size > 1 else asked:
                    log.warning("SIGTERM: saving at step %d and stopping", done)
                    return False
                if settings.save_steps and done % settings.save_steps == 0 and done < course.steps(settings):
                    metrics.flush()
                    self.save(behind=True)
        return True

    def _update(self, task: Task, batches: Iterator[Any], phase: PhaseTimer) -> tuple[dict[str, Tensor], Tensor | None]:
        """One update of the optimiser; returns the last part's terms and the gradient's norm."""
        engine = self.engine
        for _ in range(self.settings.gradient_accumulation_steps):
            with phase("data"):
                loaded = next(batches)
            with phase("teacher"):
                batch = task.place(loaded)
            with phase("forward"):
                terms = engine.forward_module(task.loss, batch)
            with phase("backward"):
                engine.backward(terms["loss"])
            with phase("step"):
                norm = engine.step()
        return terms, norm

    def _find_rate(self, task: Task, watch: Watch, load: Callable[[int], Any], metrics: Metrics) -> None:
        settings, engine, trials = self.settings, self.engine, self.output / "trials"
        parts, phase = settings.gradient_accumulation_steps, PhaseTimer(engine.device)
        start = self.save(trials)

        def update(step: int) -> None:
            self._update(task, map(load, range(step * parts, (step + 1) * parts)), phase)

        def put_back() -> None:
            restored = load_checkpoint(start, engine, base_model=self.base)
            if restored.notice:
                raise SettingsError(f"learning_rate=auto cannot undo its trials ({restored.notice}): set a rate")

        def report(rate: float, cost: float) -> None:
            figures = {"trial_rate": rate, "watched_loss": cost}
            metrics.note({"step": 0, **figures})
            self.progress("rate", 0, 0, figures)

        rate = find_rate(engine, settings, update, lambda: watch.look(engine)["watched_loss"], put_back, report)
        self.course.learning_rate = engine.base_learning_rate = rate
        self.discard(trials)

    def _judge(self, done: int, seen: dict[str, float], metrics: Metrics) -> None:
        """Draw the conclusions of a look. Raises TrainingError where the run damages what must stay."""
        settings, engine, course = self.settings, self.engine, self.course
        is_best = course.note(done, seen, settings)
        engine.schedule = course.schedule(settings)
        harm = course.harm(done, settings, engine.base_learning_rate)
        if harm is not None and course.lower(settings):
            assert course.learning_rate is not None
            engine.base_learning_rate = course.learning_rate
            log.warning("step %d: kept images drift too far, goes on at the rate %g", done, course.learning_rate)
        elif harm is not None:
            metrics.flush()
            self.writer.wait()
            if engine.rank == 0:
                go_back(self.output, done, course.best_step, self.best)
            self.discard(self.best)
            good = self.output / f"checkpoint-{course.best_step}"
            raise TrainingError(
                f"{harm}; {f'{good} is kept' if good.exists() else 'no checkpoint from before is good'}"
            )
        if is_best and settings.max_drift is not None and done < course.steps(settings):
            metrics.flush()
            self.save(self.best, 1)

    def discard(self, folder: Path) -> None:
        """Delete a folder of checkpoints, once no rank reads it any more; one that holds anything else stays."""
        self.engine.any_rank(False)
        ours = ("checkpoint-", UNFINISHED)
        if self.engine.rank == 0 and folder.is_dir() and all(p.name.startswith(ours) for p in folder.iterdir()):
            delete_folder(folder, ignore_errors=True)


def _join_deepspeed(settings: Settings, device: torch.device) -> tuple[dict[str, Any], Any]:
    """The completed DeepSpeed configuration, and what must stay alive while ZeRO-3 loads (None for other stages)."""
    from fastvkd.engines.ds_config import complete_ds_config, read_ds_config

    if "WORLD_SIZE" not in os.environ:
        raise SettingsError("engine=deepspeed needs its launcher: start with `deepspeed fastvkd/train.py --config ...`")
    ds_config = complete_ds_config(
        read_ds_config(settings.deepspeed or "zero2"),
        micro_batch=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        optim=settings.optim,
        quantize_llm=settings.quantize_llm,
        world_size=int(os.environ["WORLD_SIZE"]),
        on_gpu=device.type == "cuda",
    )
    from fastvkd.engines.deepspeed_engine import start_deepspeed

    return ds_config, start_deepspeed(ds_config)


def build_engine(run: Draft | Prepared, device: torch.device, ds_config: dict[str, Any]) -> Engine:
    """The engine that the run's `settings.engine` names, over its trained weights."""
    settings, trained = run.settings, run.trained
    common: dict[str, Any] = {
        "optim": settings.optim,
        "learning_rate": rate_of(settings, trained.parameters),
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup_steps,
        "max_steps": settings.max_steps,
        "lr_scheduler_type": settings.lr_scheduler_type,
    }
    if settings.engine == "deepspeed":
        from fastvkd.engines.deepspeed_engine import DeepSpeedEngine  # late: it takes seconds to import

        return DeepSpeedEngine(trained.runner, trained.parameters, ds_config, **common)
    return LocalEngine(
        trained.parameters,
        module=trained.runner,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        device=device,
        trains=METHODS[settings.method].trains,
        **common,
    )


@contextlib.contextmanager
def _arithmetic(settings: Settings, trained: Trained) -> Iterator[None]:
    """Layers fused and compiled as the settings ask: while training, and while the original is asked what training aims
    at, or retained features would differ from their targets before any weight has moved."""
    with contextlib.ExitStack() as during:
        if settings.fused_frozen_ops:
            during.enter_context(_fused_frozen_ops(trained.model))
        if settings.compile:
            during.enter_context(compiled_blocks(*trained.models))
        yield


@contextlib.contextmanager
def _fused_frozen_ops(model: nn.Module) -> Iterator[None]:
    try:
        with patch_frozen(model):
            yield
    except ValueError as error:
        if "patch" not in str(error):
            raise
        raise SettingsError(f"fused_frozen_ops=true: {error}; set fused_frozen_ops=false") from error


def _tracer(output: Path) -> profile:
    """A profiler of updates 3 to 5, to be told of every update."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    return profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(output / "trace.json")),
        profile_memory=True,
    )


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread, where no handler can be set, one that nothing sets."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)
