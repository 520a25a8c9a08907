"""The figures of a run, step by step: metrics.jsonl, and where asked TensorBoard and Weights & Biases."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvkd.devices import peak_memory_bytes
from fastvkd.engines.protocol import Engine
from fastvkd.errors import SettingsError, TrainingError
from fastvkd.files import parse_json, text_lines, write_atomically
from fastvkd.settings import Settings
from fastvkd.unlearning.phases import Spans
from fastvkd.unlearning.phases import seconds as phase_seconds


class Metrics:
    """`metrics.jsonl`: one line per step, and before them one per trial of a rate, as step 0.

    Figures stay on the device until those of `logging_steps` steps are read.
    Raises TrainingError when a loss or gradient norm is not finite.
    """

    def __init__(self, output: Path, settings: Settings, engine: Engine, first: int):
        self.path = output / "metrics.jsonl"
        self._settings, self._engine = settings, engine
        self._pending: list[tuple[int, float, Spans, Mapping[str, float], list[str], Tensor]] = []
        self._since = time.perf_counter()
        self._images_per_update = (
            settings.per_device_train_batch_size * settings.gradient_accumulation_steps * engine.world_size
        )
        self._is_main = engine.rank == 0
        self._boards: list[_TensorBoard | _WeightsAndBiases] = []
        if self._is_main:
            kept = lines_up_to(self.path, first) if first else []
            write_atomically(self.path, "".join(kept).encode())
            if "tensorboard" in settings.report_to:
                self._boards.append(_TensorBoard(output))
            if "wandb" in settings.report_to:
                self._boards.append(_WeightsAndBiases(settings))

    def record(
        self,
        step: int,
        terms: dict[str, Tensor],
        norm: Tensor | None,
        learning_rate: float,
        spans: Spans,
        seen: Mapping[str, float] | None = None,
    ) -> None:
        """Note one step; `seen` is what a look after it saw, if there was one."""
        figures = {key: value.detach().float() for key, value in terms.items()}
        if norm is not None:
            figures["grad_norm"] = norm.detach().float()
        self._pending.append(
            (step, learning_rate, spans, seen or {}, list(figures), torch.stack(list(figures.values())))
        )

    def note(self, line: Mapping[str, float]) -> None:
        """Write a line that is no step's."""
        if self._is_main:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def due(self, step: int) -> bool:
        return step % self._settings.logging_steps == 0

    def flush(self) -> dict[str, float]:
        """Read and write the pending figures; returns the last step's. Raises at the first that is not finite."""
        if not self._pending:
            return {}
        problem: TrainingError | None = None
        values = self._engine.mean_over_ranks(torch.stack([v for *_, v in self._pending])).tolist()
        now = time.perf_counter()
        rate = len(self._pending) * self._images_per_update / (now - self._since)
        memory = peak_memory_bytes(self._engine.device)
        lines, line = [], {}
        for (step, learning_rate, spans, seen, names, _), row in zip(self._pending, values, strict=True):
            line = {"step": step, **dict(zip(names, row, strict=True)), "learning_rate": learning_rate}
            line |= {"images_per_second": rate, "peak_memory_bytes": memory, **phase_seconds(spans), **seen}
            if not all(np.isfinite(row)):
                problem = TrainingError(
                    f"step {step}: loss {line['loss']} and gradient norm {line.get('grad_norm')} are not both finite; "
                    "lower learning_rate, or set bf16=false"
                )
                break
            lines.append(line)
        if self._is_main:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for board in self._boards:
                for each in lines:
                    board.write(each)
        self._pending, self._since = [], now
        if problem is not None:
            raise problem
        return line

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        for board in self._boards:
            board.close()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to an update; what a killed run left of the last one is no line.

    Raises TrainingError, naming file and line, for one that is damaged.
    """
    if not path.exists():
        return []
    text, _, _ = path.read_text(errors="replace").rpartition("\n")
    mend = "delete that line"
    kept = []
    for number, line in text_lines(text):
        row = parse_json(line, f"{path}:{number}", TrainingError, mend)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise TrainingError(f"{path}:{number}: has no step; {mend}")
        if row["step"] <= step:
            kept.append(line + "\n")
    return kept


class _TensorBoard:
    def __init__(self, output: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SettingsError(
                "report_to=tensorboard: tensorboard is not installed; pip install fastvkd[tensorboard]"
            ) from error
        self._writer = SummaryWriter(str(output / "tensorboard"))

    def write(self, line: dict[str, float]) -> None:
        for key, value in line.items():
            if key != "step":
                self._writer.add_scalar(f"train/{key}", value, int(line["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, settings: Settings):
        try:
            import wandb
        except ImportError as error:
            raise SettingsError("report_to=wandb: wandb is not installed; pip install fastvkd[wandb]") from error
        self._run = wandb.init(project="fastvkd", config=settings.to_dict())

    def write(self, line: dict[str, float]) -> None:
        self._run.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()
