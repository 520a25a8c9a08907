"""What metrics.jsonl and the boards get, also of a run that breaks off."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastvkd.errors import TrainingError
from fastvkd.settings import load_settings
from fastvkd.unlearning.metrics import Metrics


def engine() -> SimpleNamespace:
    return SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), mean_over_ranks=lambda values: values)


def settings(**overrides):
    return load_settings(None, {"model_name_or_path": "m", "data": "d", **overrides})


def test_both_boards_get_every_line_and_are_closed(tmp_path: Path, monkeypatch) -> None:
    seen: dict[str, list] = {"tensorboard": [], "wandb": []}

    class SummaryWriter:
        def __init__(self, folder: str):
            seen["tensorboard"].append(folder)

        def add_scalar(self, *scalar) -> None:
            seen["tensorboard"].append(scalar)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            seen["tensorboard"].append("closed")

    run = SimpleNamespace(
        log=lambda line, step: seen["wandb"].append((step, line["loss"])), finish=lambda: seen["wandb"].append("closed")
    )
    for name, content in (
        ("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}),
        ("wandb", {"init": lambda **_: run}),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with Metrics(tmp_path, settings(report_to=["tensorboard", "wandb"]), engine(), 0) as metrics:
        for step in (1, 2):
            metrics.record(step, {"loss": torch.tensor(float(step))}, torch.tensor(0.5), 1e-3, {})
        assert metrics.flush()["loss"] == 2.0
    assert seen["wandb"] == [(1, 1.0), (2, 2.0), "closed"]
    scalars = [scalar for scalar in seen["tensorboard"] if scalar[0] == "train/grad_norm"]
    assert scalars == [("train/grad_norm", 0.5, 1), ("train/grad_norm", 0.5, 2)]
    assert seen["tensorboard"][0] == str(tmp_path / "tensorboard") and seen["tensorboard"][-1] == "closed"


def test_what_came_before_a_loss_that_is_not_finite_is_written(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 3: loss nan"), Metrics(tmp_path, settings(), engine(), 0) as metrics:
        for step, loss in enumerate((1.0, 2.0, float("nan"), 4.0), 1):
            metrics.record(step, {"loss": torch.tensor(loss)}, None, 1e-3, {})
        metrics.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0)]
