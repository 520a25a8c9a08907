"""The demo's data and vanilla model, for studies that train on them: build once, run many, measure alike."""

import copy
import fcntl
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvkd.attacks.relearning import Attacker, Curve, Weights, relearning_curve
from fastvkd.data import mllmu
from fastvkd.data.sources import evaluation_cells, reference_strangers
from fastvkd.demo.data import one_photo_a_person
from fastvkd.demo.model import LLAVA, Blueprint
from fastvkd.demo.run import SIZES, build_data, trained_model
from fastvkd.engines.exporting import load_trained
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.people import examine, likeness
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.models.loading import load_model, load_processor
from fastvkd.paths import shipped
from fastvkd.settings import Settings, load_settings
from fastvkd.unlearning.loop import Unlearned, unlearn

RECIPE = "configs/demo.yaml"
KNOWN = ("forget", "test", "retain", "realworld")  # cells about whom or what the vanilla model knows, in photos of one


class World:
    """Data, models and evaluation cells of one seed; `out` keeps data, caches and runs.

    Models are trained when they are first asked for, once for all processes. `overrides` are settings of every run.
    What several processes share lies in `shared`.
    """

    blueprint = LLAVA

    def __init__(
        self,
        seed: int,
        out: Path,
        *,
        size: str = "default",
        overrides: dict[str, Any] | None = None,
        shared: Path | None = None,
    ):
        self.seed, self.size, self.spec, self.overrides = seed, size, SIZES[size], overrides or {}
        self.out, self.shared = (folder / f"seed-{seed}" for folder in (out, shared or out))
        self.out.mkdir(parents=True, exist_ok=True)
        self.data, self.folder = build_data(self.spec, seed, self.out)
        self.cells = evaluation_cells(str(self.folder), self.data.forget_split, self.data.retain_split)

    def of(self, blueprint: Blueprint) -> "World":
        """The same data with models of another family."""
        other = copy.copy(self)
        other.blueprint = blueprint
        for name in ("vanilla", "gold", "likeness", "processor", "prepared"):
            other.__dict__.pop(name, None)
        return other

    @functools.cached_property
    def vanilla(self) -> Path:
        """The model that knows everybody."""
        return self._trained(gold=False)

    @functools.cached_property
    def gold(self) -> Path:
        """The model that never saw the forgotten people."""
        return self._trained(gold=True)

    def _trained(self, gold: bool) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastvkd"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"benchmarks-{self.blueprint.name}-{self.size}-{self.seed}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
            return trained_model(self.spec, self.data, self.seed, cache, {}, gold=gold, blueprint=self.blueprint)

    @functools.cached_property
    def one_photo(self) -> Path:
        """The folder of the same data with one photo a person to unlearn with."""
        folder = self.out / "one-photo"
        for split, profiles in one_photo_a_person(self.data).splits.items():
            mllmu.write_split(folder, split, profiles)
        return folder

    @functools.cached_property
    def likeness(self) -> dict[str, float]:
        """How like the forgotten each retained person is to the vanilla model."""
        return likeness(load_model(self.vanilla, llm_layers=0), self.processor, self.cells)

    @functools.cached_property
    def processor(self) -> Any:
        return load_processor(self.vanilla)

    @functools.cached_property
    def prepared(self) -> PreparedPhotos:
        return PreparedPhotos(self.processor)

    def settings(self, output: Path, overrides: dict[str, Any], *, config: str | None = RECIPE) -> Settings:
        """The settings of a run on this world's data and vanilla model: a recipe with `overrides`."""
        own = {
            "model_name_or_path": str(self.vanilla),
            "data": str(self.folder),
            "forget_split": self.data.forget_split,
            "retain_split": self.data.retain_split,
            "output_dir": str(output),
            "cache_dir": str(self.out / "teacher_cache"),
            "seed": self.seed,
            "logging_steps": 50,
        }
        strangers = self.folder / "strangers"
        if config and strangers.is_dir():
            own["strangers"] = str(strangers)
        return load_settings(shipped(config) if config else None, {**own, **overrides, **self.overrides})

    def unlearn(self, overrides: dict[str, Any], *, config: str | None = RECIPE) -> tuple[Any, Unlearned]:
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
        along = {"lr_scheduler_type": "constant", "max_steps": steps}
        along |= {"save_steps": every, "save_total_limit": steps // every}
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            result = unlearn(self.settings(Path(folder), {**along, **overrides}, config=None))
            for step in range(every, steps + 1, every):
                yield step, self.at(Path(folder) / f"checkpoint-{step}"), result

    def evaluate(
        self, model: Any, max_samples: int | None, cells: Sequence[str] = KNOWN, **options: Any
    ) -> dict[str, Any]:
        """Multiple choice on `cells`; at most `max_samples` questions a cell and kind."""
        asked = {name: profiles for name, profiles in self.cells.items() if name in cells}
        common = {"batch_size": 64, "seed": self.seed, "max_samples": max_samples, "photos": self.prepared}
        return evaluate_cells(model, self.processor, asked, tasks=("choice",), **common, **options)

    def examine(
        self, model: Any, max_samples: int | None, collect: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every cell, and the figures person by person; `collect` takes the raw answers."""
        return examine(
            model,
            self.processor,
            self.cells,
            batch_size=64,
            seed=self.seed,
            max_samples=max_samples,
            photos=self.prepared,
            likeness=self.likeness,
            reference=reference_strangers(str(self.folder)),
            collect=collect,
        )

    def accuracy(self, model: Any, max_samples: int | None = 1008, cells: Sequence[str] = KNOWN) -> dict[str, float]:
        """Visual multiple-choice accuracy of `cells`."""
        figures = self.evaluate(model, max_samples, cells, kinds=("vqa",))
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
