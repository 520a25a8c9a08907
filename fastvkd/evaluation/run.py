"""Evaluate a model folder on a data folder: what `fastvkd eval` and the demo call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastvkd.data.sources import evaluation_cells
from fastvkd.engines.checkpoints import identify_base, local_folder
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.loading import load_model, load_processor

Figures = dict[str, dict[str, dict[str, Any]]]


def evaluate(
    model_name_or_path: str,
    data: str,
    *,
    forget_split: str = "forget_5",
    retain_split: str = "retain_95",
    mode: str = "corrected",
    batch_size: int = 32,
    max_samples: int | None = None,
    seed: int = 0,
    log_path: str | Path | None = None,
    device: str = "auto",
    bf16: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Figures:
    """Accuracy, ROUGE-L and cloze figures of every cell; see `evaluate_cells` for their form.

    Finished cells found in `log_path` for the same model and settings are not computed again. Raises FastVKDError.
    """
    from fastvkd.unlearning.loop import pick_device

    processor = load_processor(model_name_or_path)
    model = load_model(model_name_or_path, dtype=torch.bfloat16 if bf16 else torch.float32, device=pick_device(device))
    return evaluate_cells(
        model,
        processor,
        evaluation_cells(data, forget_split, retain_split),
        batch_size=batch_size,
        mode=mode,
        seed=seed,
        log_path=log_path,
        progress=progress,
        max_samples=max_samples,
        fingerprint=identify_base(local_folder(model_name_or_path)).fingerprint,
    )
