"""Evaluate a model folder on a data folder: what `fastvkd eval` calls."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from fastvkd.data.hub import data_folder
from fastvkd.data.sources import evaluation_cells, reader_of
from fastvkd.devices import pick_device
from fastvkd.engines.checkpoints import identify_base, local_folder
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.divergence import asked, option_divergence, scored_choices
from fastvkd.evaluation.modality_pairs import joint_figures
from fastvkd.evaluation.protocol import MODES, check_counts, evaluate_cells
from fastvkd.evaluation.truth_ratio import forget_quality, model_utility
from fastvkd.exporting import read_record, settings_of
from fastvkd.models.loading import load_model, load_processor
from fastvkd.unlearning.methods.steering import attach, load_steering

SAMPLES = "samples.jsonl"
# What else than config.json and weights decides in a model folder which tokens a prompt becomes and which come out.
_TEXT_FILES = (
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*token*.json",
    "*vocab*",
    "merges.txt",
    "*.model",
    "generation_config.json",
)


def evaluate(
    model_name_or_path: str,
    data: str,
    *,
    benchmark: str | None = None,
    forget_split: str | None = None,
    retain_split: str | None = None,
    mode: str = "corrected",
    batch_size: int = 32,
    max_samples: int | None = None,
    seed: int = 0,
    log_path: str | Path | None = None,
    reference_eval: str | Path | None = None,
    steering: Path | None = None,
    device: str = "auto",
    bf16: bool = False,
    local_files_only: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """What the model knows: `benchmark`, `mode`, `seed`, `model`, `data`, the splits, and
    - `cells`: the figures of every set and kind, see `evaluate_cells`;
    - `summary`: of CLEAR `model_utility`; of UMU-Bench the joint figures of every set; and with `reference_eval` (the
      folder of the same evaluation of a model that never saw the forget set) CLEAR's `forget_quality` and, where both
      are in corrected mode, of every set the divergence of the choices, `js_vqa` and `js_qa`.

    `benchmark` None recognises the format. Splits that are not named are those of the run that the model was exported
    from, else the defaults of `Settings`. `steering` is a file of `Steering.save`, switched on. Finished cells found
    in `log_path` for the same model, dtype, processor, steering and settings are not computed again. Raises
    FastVKDError.
    """
    if mode not in MODES:
        raise SettingsError(f"mode: unknown value {mode!r}; allowed: {', '.join(MODES)}")
    check_counts(batch_size=batch_size, max_samples=max_samples)
    folder = str(data_folder(data, local_files_only=local_files_only))
    benchmark = reader_of(folder, benchmark).NAME
    reference = None if reference_eval is None else _reference(benchmark, mode, reference_eval)
    local = local_folder(model_name_or_path)
    made_by = settings_of(read_record(local))
    forget_split, retain_split = forget_split or made_by["forget_split"], retain_split or made_by["retain_split"]
    cells = evaluation_cells(folder, forget_split, retain_split)
    processor = load_processor(model_name_or_path)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = load_model(model_name_or_path, dtype=dtype, device=pick_device(device))
    fingerprint = _fingerprint(local, dtype)
    if steering is not None:
        attach(model, load_steering(steering))
        fingerprint += hashlib.sha256(steering.read_bytes()).hexdigest()
    samples: list[dict[str, Any]] = []
    figures = evaluate_cells(
        model,
        processor,
        cells,
        batch_size=batch_size,
        benchmark=benchmark,
        mode=mode,
        seed=seed,
        log_path=log_path,
        progress=progress,
        max_samples=max_samples,
        fingerprint=fingerprint,
        collect=samples,
    )
    summary: dict[str, Any] = {}
    if benchmark == "clear":
        summary = model_utility(figures)
        if reference is not None:
            mine, others = _forget_truth(samples), _forget_truth(reference)
            _refuse_other_samples(_truths(mine), _truths(others), reference_eval)
            summary |= forget_quality(mine, others, mode)
    elif benchmark == "umu":
        summary = joint_figures(samples, seed)
    if reference is not None:
        choices, theirs = scored_choices(samples), scored_choices(reference)
        for part in choices.keys() & theirs.keys():
            _refuse_other_samples(asked(choices[part]), asked(theirs[part]), reference_eval)
        for cell, divergences in option_divergence(choices, theirs, seed).items():
            summary[cell] = summary.get(cell, {}) | divergences
    return {
        "benchmark": benchmark,
        "mode": mode,
        "seed": seed,
        "max_samples": max_samples,
        "model": str(model_name_or_path),
        "steering": None if steering is None else str(steering),
        "data": str(data),
        "forget_split": forget_split,
        "retain_split": retain_split,
        "cells": figures,
        "summary": summary,
    }


def _fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """Of everything in a model folder, and of the dtype, that decides what the model answers."""
    digest = hashlib.sha256(f"{identify_base(folder).fingerprint} {dtype}".encode())
    for file in sorted({file for pattern in _TEXT_FILES for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f" {file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _reference(benchmark: str, mode: str, folder: str | Path) -> list[dict[str, Any]]:
    """The logged samples of another evaluation, if they hold what this one can be compared by."""
    if benchmark != "clear" and mode == "paper":
        raise SettingsError(
            f"reference_eval: {benchmark} in paper mode has no likelihoods to compare; use mode=corrected"
        )
    log = Path(folder) / SAMPLES
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"reference_eval: {log} cannot be read ({' '.join(str(error).split())}); give the --out folder of an "
            "evaluation of the model that never saw the forget set"
        ) from error
    if benchmark == "clear" and not _forget_truth(lines):
        raise DataError(f"reference_eval: {log} holds no truth ratios of a forget set; evaluate it on CLEAR first")
    if benchmark != "clear" and not scored_choices(lines):
        raise DataError(f"reference_eval: {log} holds no likelihoods of options; evaluate it in corrected mode first")
    return lines


def _refuse_other_samples(mine: Collection[Any], reference: Collection[Any], folder: str | Path | None) -> None:
    if mine != reference:
        raise DataError(
            f"reference_eval: {folder} is an evaluation of other samples ({len(set(mine) & set(reference))} of "
            f"{len(set(mine))} in common); evaluate it with the same forget_split, max_samples and seed"
        )


def _truths(samples: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(sample["entity"], sample["answer"]) for sample in samples}


def _forget_truth(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if (sample.get("task"), sample.get("cell")) == ("truth", "forget")]
