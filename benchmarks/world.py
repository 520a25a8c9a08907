"""The demo's data and vanilla model, for benchmarks that train on them: build once, run many, measure alike."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvkd.attacks.relearning import Attacker, Curve, Weights, relearning_curve
from fastvkd.data.sources import evaluation_cells
from fastvkd.demo.run import SIZES, build_data, trained_model
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.exporting import load_trained
from fastvkd.models.loading import load_model, load_processor
from fastvkd.paths import shipped
from fastvkd.settings import Settings, load_settings
from fastvkd.unlearning.loop import Unlearned, unlearn


class World:
    """Data, vanilla model and evaluation cells of one seed; `out` keeps data, caches and runs."""

    def __init__(self, seed: int, out: Path, *, size: str = "default"):
        self.seed, self.out, self.spec = seed, out / f"seed-{seed}", SIZES[size]
        self.out.mkdir(parents=True, exist_ok=True)
        self.cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastvkd"
        self.data, self.folder = build_data(self.spec, seed, self.out)
        self.vanilla = trained_model(self.spec, self.data, seed, self.cache, {}, gold=False)
        self.processor = load_processor(self.vanilla)
        self.prepared = PreparedPhotos(self.processor)
        self.cells = evaluation_cells(str(self.folder), self.data.forget_split, self.data.retain_split)

    def gold(self) -> Path:
        """The model that never saw the forgotten people."""
        return trained_model(self.spec, self.data, self.seed, self.cache, {}, gold=True)

    def settings(
        self, output: Path, overrides: dict[str, Any], *, config: str | None = "configs/demo.yaml"
    ) -> Settings:
        """The settings of a run on this world's data and vanilla model: a recipe with `overrides`."""
        return load_settings(
            shipped(config) if config else None,
            {
                "model_name_or_path": str(self.vanilla),
                "data": str(self.folder),
                "forget_split": self.data.forget_split,
                "retain_split": self.data.retain_split,
                "output_dir": str(output),
                "cache_dir": str(self.out / "teacher_cache"),
                "seed": self.seed,
                "logging_steps": 50,
                **overrides,
            },
        )

    def unlearn(self, overrides: dict[str, Any], *, config: str | None = "configs/demo.yaml") -> tuple[Any, Unlearned]:
        """Run with the demo's recipe and `overrides`; returns the unlearned model and the run's figures."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            result = unlearn(self.settings(Path(folder), overrides, config=config))
            return self.at(result.checkpoint), result

    def at(self, checkpoint: Path) -> Any:
        """The model with the trained weights of a checkpoint."""
        model = load_model(self.vanilla)
        load_trained(model, checkpoint)
        return model

    def follow(self, overrides: dict[str, Any], *, steps: int, every: int) -> Iterator[tuple[int, Any, Unlearned]]:
        """One run without a recipe, at a constant rate, seen along its way: (steps done, model, the run's figures)."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            along = {
                "lr_scheduler_type": "constant",
                "max_steps": steps,
                "save_steps": every,
                "save_total_limit": steps // every,
            }
            result = unlearn(self.settings(Path(folder), {**along, **overrides}, config=None))
            for step in range(every, steps + 1, every):
                yield step, self.at(Path(folder) / f"checkpoint-{step}"), result

    def accuracy(
        self, model: Any, max_samples: int | None = 1008, cells: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Visual multiple-choice accuracy of every cell, or of `cells`."""
        figures = evaluate_cells(
            model,
            self.processor,
            {name: profiles for name, profiles in self.cells.items() if cells is None or name in cells},
            batch_size=64,
            seed=self.seed,
            max_samples=max_samples,
            tasks=("choice",),
            kinds=("vqa",),
            photos=self.prepared,
        )
        return {name: kinds["vqa"]["accuracy"] for name, kinds in figures.items()}

    def relearn(self, model: Any, share: float, max_samples: int) -> dict[Weights, Curve]:
        """The relearning attack on `model` with `share` of the forget photos, by what the attacker trains."""
        attacker = Attacker(self.processor, self.cells["forget"], share=share, seed=self.seed)
        kinds: tuple[Weights, ...] = ("visual", "all")
        return {
            weights: relearning_curve(
                model,
                self.processor,
                attacker,
                self.cells["test"],
                weights=weights,
                measure_at=self.spec.attacks.relearning_steps,
                seed=self.seed,
                max_samples=max_samples,
                prepared=self.prepared,
            )
            for weights in kinds
        }


def command(script: str) -> str:
    """How this process was started, for the head of its results."""
    return " ".join([f"python benchmarks/{Path(script).name}", *sys.argv[1:]])


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
