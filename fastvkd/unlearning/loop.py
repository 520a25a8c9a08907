"""Unlearning from settings to checkpoint: the loop behind `fastvkd train`, the DeepSpeed launcher and the library.

What is trained (objective, targets, masks) is put together in `tasks.py`; the engine updates the weights.
"""

import contextlib
import dataclasses
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
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from fastvkd.devices import peak_memory_bytes, pick_device
from fastvkd.engines.checkpoints import find_latest, identify_base, load_checkpoint, local_folder, save_checkpoint
from fastvkd.engines.local import LocalEngine
from fastvkd.engines.protocol import Engine
from fastvkd.errors import SettingsError
from fastvkd.models.compiled import compiled_blocks
from fastvkd.settings import Settings
from fastvkd.unlearning.metrics import Metrics
from fastvkd.unlearning.phases import PhaseTimer
from fastvkd.unlearning.prefetch import prefetched
from fastvkd.unlearning.tasks import Task, prepare

log = logging.getLogger("fastvkd")

Progress = Callable[[str, int, int, dict[str, float]], None]  # phase, done, total, figures


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


def unlearn(settings: Settings, *, progress: Progress = lambda *_: None) -> Unlearned:
    """Make the model of `settings` forget the forget split, and write a checkpoint of its visual weights.

    `progress(phase, done, total, figures)` is called as work goes on. Raises FastVKDError (one line, naming the mend)
    for settings, data or models that cannot be used; nothing is left half-written.
    """
    settings.check()
    torch.manual_seed(settings.seed)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    device = pick_device(settings.device)
    output = Path(settings.output_dir)
    resume_from = _resume_folder(settings, output)
    base = identify_base(local_folder(settings.model_name_or_path))

    ds_config, partitioning = _join_deepspeed(settings, device) if settings.engine == "deepspeed" else ({}, None)
    if settings.engine == "deepspeed" and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    task = prepare(
        settings,
        device,
        base,
        lambda done, total: progress("teacher", done, total, {}),
        partitioned=partitioning is not None,
    )
    if task.max_steps:  # it may come from num_train_epochs; none where the method is free of training
        settings = dataclasses.replace(settings, max_steps=task.max_steps)
    engine = build_engine(settings, task, device, ds_config)
    if task.see_teacher is not None:
        task.see_teacher(engine.forward_module)
    seconds["prepare"] = time.perf_counter() - started

    first = 0
    if resume_from is not None:
        resumed = load_checkpoint(resume_from, engine, base_model=base)
        first = resumed.updates
        log.warning("resumed from %s at step %d%s", resume_from, first, f": {resumed.notice}" if resumed.notice else "")

    def save() -> Path:
        return save_checkpoint(
            output,
            engine,
            sampler={"micro_step": engine.updates * settings.gradient_accumulation_steps},
            settings=settings.to_dict(),
            base_model=base,
            keep=settings.save_total_limit,
        )

    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    checkpoint: Path | None = None
    finished = True
    with contextlib.ExitStack() as during:
        metrics = during.enter_context(Metrics(output, settings, engine, first))
        stop_asked = during.enter_context(_sigterm())
        if settings.fused_frozen_ops:
            during.enter_context(_fused_frozen_ops(task.model))
        if settings.compile:
            during.enter_context(compiled_blocks(*task.models))
        tracer = during.enter_context(_tracer(output)) if settings.profile and engine.rank == 0 else None
        parts = settings.gradient_accumulation_steps
        batches = during.enter_context(
            prefetched(
                lambda step: task.load(step, engine.rank, engine.world_size),
                range(first * parts, task.max_steps * parts),
                settings.prefetch,
            )
        )
        phase = PhaseTimer(engine.device)
        for update in range(first, task.max_steps):
            for _ in range(parts):
                with phase("data"):
                    loaded = next(batches)
                with phase("teacher"):
                    batch = task.place(loaded)
                with phase("forward"):
                    terms = engine.forward_module(batch)
                with phase("backward"):
                    engine.backward(terms["loss"])
                with phase("step"):
                    norm = engine.step()
            metrics.record(update + 1, terms, norm, engine.learning_rate(), phase.take())
            if tracer is not None:
                tracer.step()
            if metrics.due(update + 1):
                figures = metrics.flush()
                progress("unlearn", update + 1, settings.max_steps, figures)
            asked = engine.any_rank(stop_asked.is_set()) if engine.world_size > 1 else stop_asked.is_set()
            if asked:
                log.warning("SIGTERM: saving at step %d and stopping", update + 1)
                finished = False
                break
            if settings.save_steps and (update + 1) % settings.save_steps == 0 and update + 1 < settings.max_steps:
                metrics.flush()
                checkpoint = save()
        metrics.flush()
        checkpoint = save()
    seconds["unlearn"] = time.perf_counter() - started
    return Unlearned(
        checkpoint=checkpoint,
        metrics=metrics.path,
        steps=engine.updates,
        images_seen=(engine.updates - first)
        * settings.gradient_accumulation_steps
        * task.images_per_step
        * engine.world_size,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        trainable_parameters=task.trainable_parameters,
        frozen_parameters=task.frozen_parameters,
        trained_share=task.trained_share,
        finished=finished,
    )


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


def build_engine(settings: Settings, task: Task, device: torch.device, ds_config: dict[str, Any]) -> Engine:
    """The engine that `settings.engine` names, over the task's trainable parameters."""
    if settings.engine == "deepspeed":
        from fastvkd.engines.deepspeed_engine import DeepSpeedEngine  # late: it takes seconds to import

        return DeepSpeedEngine(
            task.module,
            task.parameters,
            ds_config,
            optim=settings.optim,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_steps,
            max_steps=settings.max_steps,
            lr_scheduler_type=settings.lr_scheduler_type,
        )
    return LocalEngine(
        task.parameters,
        module=task.module,
        optim=settings.optim,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        device=device,
    )


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


def _resume_folder(settings: Settings, output: Path) -> Path | None:
    wanted = settings.resume_from_checkpoint
    if wanted is None:
        return None
    return find_latest(output) if wanted == "auto" else Path(wanted)
