"""Evaluate a model folder on a data folder: what `fastvkd eval` calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvkd.data.hub import data_folder
from fastvkd.data.sources import evaluation_cells, reader_of
from fastvkd.devices import pick_device
from fastvkd.engines.checkpoints import identify_base, local_folder
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.modality_pairs import joint_figures
from fastvkd.evaluation.protocol import MODES, evaluate_cells
from fastvkd.evaluation.truth_ratio import forget_quality, model_utility
from fastvkd.models.loading import load_model, load_processor

SAMPLES = "samples.jsonl"


def evaluate(
    model_name_or_path: str,
    data: str,
    *,
    benchmark: str | None = None,
    forget_split: str = "forget_5",
    retain_split: str = "retain_95",
    mode: str = "corrected",
    batch_size: int = 32,
    max_samples: int | None = None,
    seed: int = 0,
    log_path: str | Path | None = None,
    reference_eval: str | Path | None = None,
    device: str = "auto",
    bf16: bool = False,
    local_files_only: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """What the model knows: `benchmark`, `mode`, `seed`, `model`, `data`, the splits, and
    - `cells`: the figures of every set and kind, see `evaluate_cells`;
    - `summary`: of CLEAR `model_utility` and, with `reference_eval` (the folder of the same evaluation of a model that
      never saw the forget set), `forget_quality`; of UMU-Bench the joint figures of every set; empty for the others.

    `benchmark` None recognises the format. Finished cells found in `log_path` for the same model and settings are not
    computed again. Raises FastVKDError.
    """
    if mode not in MODES:
        raise SettingsError(f"mode: unknown value {mode!r}; allowed: {', '.join(MODES)}")
    folder = str(data_folder(data, local_files_only=local_files_only))
    benchmark = reader_of(folder, benchmark).NAME
    reference = None if reference_eval is None else _reference(benchmark, reference_eval)
    cells = evaluation_cells(folder, forget_split, retain_split)
    processor = load_processor(model_name_or_path)
    model = load_model(model_name_or_path, dtype=torch.bfloat16 if bf16 else torch.float32, device=pick_device(device))
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
        fingerprint=identify_base(local_folder(model_name_or_path)).fingerprint,
        collect=samples,
    )
    summary: dict[str, Any] = {}
    if benchmark == "clear":
        summary = model_utility(figures)
        if reference is not None:
            mine = _forget_truth(samples)
            _refuse_other_samples(mine, reference, reference_eval)
            summary |= forget_quality(mine, reference, mode)
    elif benchmark == "umu":
        summary = joint_figures(samples, seed)
    return {
        "benchmark": benchmark,
        "mode": mode,
        "seed": seed,
        "max_samples": max_samples,
        "model": str(model_name_or_path),
        "data": str(data),
        "forget_split": forget_split,
        "retain_split": retain_split,
        "cells": figures,
        "summary": summary,
    }


def _reference(benchmark: str, folder: str | Path) -> list[dict[str, Any]]:
    """The logged truth samples of the forget set of another evaluation."""
    if benchmark != "clear":
        raise SettingsError(f"reference_eval: {benchmark} has no forget quality; it is a figure of clear")
    log = Path(folder) / SAMPLES
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"reference_eval: {log} cannot be read ({' '.join(str(error).split())}); give the --out folder of an "
            "evaluation of the model that never saw the forget set"
        ) from error
    found = _forget_truth(lines)
    if not found:
        raise DataError(f"reference_eval: {log} holds no truth ratios of a forget set; evaluate it on CLEAR first")
    return found


def _refuse_other_samples(
    mine: list[dict[str, Any]], reference: list[dict[str, Any]], folder: str | Path | None
) -> None:
    asked = [{(sample["entity"], sample["answer"]) for sample in part} for part in (mine, reference)]
    if asked[0] != asked[1]:
        raise DataError(
            f"reference_eval: {folder} is an evaluation of other samples ({len(asked[0] & asked[1])} of "
            f"{len(asked[0])} in common); evaluate it with the same forget_split, max_samples and seed"
        )


def _forget_truth(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if (sample.get("task"), sample["cell"]) == ("truth", "forget")]
