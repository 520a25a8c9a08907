"""`fastvkd demo`: draw people, teach a small LLaVA to know them, make it forget some, attack it, and report."""

import contextlib
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file

from fastvkd.attacks.certificate import certificate, figures_of, relearned, write_certificate
from fastvkd.attacks.suite import KINDS, Attack
from fastvkd.data import mllmu, wording
from fastvkd.data.sources import evaluation_cells, reference_strangers
from fastvkd.demo import data as demo_data
from fastvkd.demo import descent, flags, people, photos, pretraining, sight, visual_input
from fastvkd.demo import model as demo_model
from fastvkd.demo.data import CHANCE, DemoData, make_demo_data, one_photo_a_person, vocabulary, write_photos
from fastvkd.demo.model import LLAVA, Blueprint, Shape
from fastvkd.demo.people import PHOTO_SIZE
from fastvkd.demo.pretraining import Schedule, train_vanilla
from fastvkd.demo.sight import SightSchedule, teach_sight
from fastvkd.demo.visual_input import VisualInput
from fastvkd.devices import peak_memory_bytes
from fastvkd.engines.exporting import edited_of, export
from fastvkd.engines.requests import judged, requests_of
from fastvkd.environment import library_versions
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.people import examine, likeness
from fastvkd.files import delete_folder, delete_unfinished
from fastvkd.models.folder import identify_base, language_model_sha256
from fastvkd.models.loading import VISUAL_KEY, load_model, load_processor
from fastvkd.options import Budget, DemoOptions
from fastvkd.paths import shipped
from fastvkd.progress import Progress
from fastvkd.records import Photo, Profile
from fastvkd.reporting import build_report, model_card, relearning_parts, write_page, write_report
from fastvkd.settings import Certificate, Settings, load_settings, parse_override
from fastvkd.unlearning.loop import Unlearned, unlearn

# The code that draws, words and trains: a change in it makes another model.
_SHAPING = (people, flags, demo_data, demo_model, photos, descent, sight, pretraining, visual_input, wording)


# What an attack in a demo does without: a sweep of learning rates, relearning of the vanilla model, and in
# `_Exam.attack` the perturbation. So many questions tell whether relearning wrecks the model.
_CHEAP: dict[str, Any] = {
    "learning_rates": (1e-3,),
    "relearning_models": ("unlearned", "gold"),
    "relearning_retained": 24,
}


@dataclass(frozen=True)
class Size:
    """How large a demo is; `max_samples` caps a cell's questions, `attacks` is what an attacker may spend."""

    people: int = 40
    forget_percent: int = 10
    photos: int = 18
    test_photos: int = 6
    flag_photos: int = 6
    countries: int = 34
    strangers: int = 600
    stranger_photos: int = 2
    unseen_strangers: int = 24
    halves: int = 8
    neighbours: int = 12
    shape: Shape = field(default_factory=Shape)
    sight: SightSchedule = field(default_factory=SightSchedule)
    schedule: Schedule = field(default_factory=Schedule)
    overrides: dict[str, Any] = field(default_factory=dict)
    max_samples: int = 1008
    attacks: Budget = field(
        default_factory=lambda: Budget(
            max_samples=168,
            shots=(1, 5),
            relearning_shares=(0.2,),
            relearning_samples=168,
            relearning_variants=("shifted_biases",),
            **_CHEAP,
        )
    )


SIZES = {
    "default": Size(),
    # For benchmarks: between the two, so that a model of any family is made and unlearned in some ten minutes.
    "small": Size(
        people=20,
        forget_percent=20,
        photos=16,
        flag_photos=4,
        countries=20,
        strangers=300,
        unseen_strangers=16,
        halves=6,
        neighbours=8,
        shape=Shape(vision_width=96, vision_layers=3, llm_width=96, llm_layers=4),
        sight=SightSchedule(steps=350),
        schedule=Schedule(steps=320, people=12, strangers=8, flags=4, pairs=8, texts_per_step=24),
        max_samples=336,
    ),
    "tiny": Size(
        people=12,
        forget_percent=25,
        photos=12,
        test_photos=4,
        flag_photos=2,
        countries=16,
        strangers=120,
        stranger_photos=2,
        unseen_strangers=8,
        halves=3,
        neighbours=4,
        shape=Shape(vision_width=96, vision_layers=3, llm_width=96, llm_layers=3),
        sight=SightSchedule(steps=250, photos=32, pairs=16),
        schedule=Schedule(steps=200, people=10, strangers=6, flags=4, pairs=4, texts_per_step=24),
        # Four people are few to look at: the watched loss is too noisy to end by, and less is retained.
        overrides={
            "learning_rate": 2e-3,
            "ends": "max_steps",
            "max_steps": 800,
            "lambda_forget": 16.0,
            "elsewhere": 0.1,
            "beside": 0.1,
            "auxiliary_images": 128,
            "auxiliary_share": 0.5,
            "forget_share": 0.5,
        },
        max_samples=200,
        attacks=Budget(
            max_samples=56,
            shots=(2,),
            relearning_shares=(0.2,),
            relearning_steps=(0, 2, 5, 10),
            relearning_variants=("shifted_biases", "redrawn_projector"),
            **_CHEAP,
        ),
    ),
}


def demo(options: DemoOptions) -> dict[str, Any]:
    """Run the whole demo into `out` and return the report. Trained vanilla and gold models are kept in `cache`, by a
    hash of all that shaped them. Raises FastVKDError."""
    spec, seed, out = SIZES[options.size], options.seed, options.out
    # DeepSpeed, which transformers imports, warns otherwise that it sees no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.logging.disable_progress_bar()
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    delete_unfinished(out)  # of a demo that was killed

    with _timed(seconds, "data"), Progress("Drawing people, strangers and flags"):
        data, folder = build_data(spec, seed, out, options.photos)
    models = _trained_models(options, data, seconds)
    vanilla_dir, unlearned_dir = models["vanilla"], models["unlearned"]
    settings = _settings(options, data, folder, vanilla_dir)
    _remove(out / "run")  # an earlier demo's checkpoints would be taken for this one's
    with _timed(seconds, "unlearn"), Progress("Unlearning") as bar:
        run = unlearn(settings, progress=_show(bar))
    with _timed(seconds, "evaluate"):
        _remove(unlearned_dir)
        export(Path(settings.output_dir), unlearned_dir, model_card="")
        cells = evaluation_cells(str(folder), data.forget_split, data.retain_split)
        processor = load_processor(vanilla_dir)
        alike = likeness(load_model(vanilla_dir, llm_layers=0), processor, cells)
        exam = _Exam(
            spec, seed, out, cells, processor, PreparedPhotos(processor), alike, reference_strangers(str(folder))
        )
        figures, people = exam.evaluate(models)
    attacks = exam.attack(models, seconds)
    digests = {"before": language_model_sha256(vanilla_dir), "after": language_model_sha256(unlearned_dir)}
    paper = _judge(settings, exam, unlearned_dir, figures, people, attacks, digests)
    relearned = relearning_parts(attacks.pop("relearning"))
    report = build_report(
        settings=settings.to_dict(),
        chance=CHANCE,
        **{name: figures[name] | people[name] for name in models},
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
        parameters=_parameters(run, vanilla_dir),
        language_model_sha256=digests,
        **relearned,
        attacks=attacks,
        certificate=paper,
        notes=[
            "The people are drawings made by a program, the flags too; real photographs vary far more.",
            "The model is a real LLaVA in every part, but with about two million parameters; larger models store "
            "more, and in more places.",
        ],
    )
    write_report(report, out / "report.json")
    write_certificate(paper, out / "certificate.json")
    write_page([out], out / "report.html", str(folder))
    (unlearned_dir / "README.md").write_text(model_card(report))
    write_certificate(paper, unlearned_dir / "certificate.json")
    return report


def build_data(spec: Size, seed: int, out: Path, photos: Literal["all", "one"] = "all") -> tuple[DemoData, Path]:
    """Draw the world and write it to `out / "data"`; with one photo a person, the unlearning run has no other."""
    data = make_demo_data(
        people=spec.people,
        forget_percent=spec.forget_percent,
        photos=spec.photos,
        test_photos=spec.test_photos,
        flag_photos=spec.flag_photos,
        countries=spec.countries,
        strangers=spec.strangers,
        stranger_photos=spec.stranger_photos,
        unseen_strangers=spec.unseen_strangers,
        halves=spec.halves,
        neighbours=spec.neighbours,
        seed=seed,
        workers=torch.get_num_threads(),
    )
    if photos == "one":
        data = one_photo_a_person(data)
    folder = out / "data"
    for split, profiles in data.splits.items():
        mllmu.write_split(folder, split, profiles)
    write_photos(folder / "strangers", data.strangers)
    return data, folder


def trained_model(
    spec: Size,
    data: DemoData,
    seed: int,
    cache: Path,
    seconds: dict[str, float],
    *,
    gold: bool,
    blueprint: Blueprint = LLAVA,
) -> Path:
    """The folder of the vanilla (or gold) model, trained now or found in the cache."""
    name = "gold" if gold else "vanilla"
    folder = cache / f"demo-{name}-{_fingerprint(spec, seed, gold, blueprint)}"
    if (folder / "config.json").exists():
        return folder
    processor = blueprint.processor(vocabulary(data), spec.shape)
    model = blueprint.model(processor, spec.shape, seed)
    visual = blueprint.visual_input(model, processor)
    with _timed(seconds, f"train_{name}"):
        _see(visual, spec, data, seed, cache / f"demo-sight-{_fingerprint(spec, seed, False, blueprint)}.safetensors")
        with Progress(f"Training the {name} model") as bar:
            train_vanilla(visual, data, spec.schedule, seed, _loss(bar), gold=gold)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
        delete_folder(unfinished)  # another demo was faster
    return folder


def _see(visual: VisualInput, spec: Size, data: DemoData, seed: int, file: Path) -> None:
    """Give the model its sight: taught now, or found in `file`, for vanilla and gold share it."""
    if file.exists():
        visual.model.load_state_dict(load_file(file), strict=False)
        return
    with Progress("Teaching the tower to see") as bar:
        teach_sight(visual, data, spec.sight, seed, _loss(bar))
    weights = {name: w for name, w in visual.model.state_dict().items() if VISUAL_KEY.search(name)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(weights, unfinished)
    unfinished.rename(file)


def _loss(bar: Progress) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: bar(step, steps, f"loss {loss:.3f}")


def _fingerprint(spec: Size, seed: int, gold: bool, blueprint: Blueprint) -> str:
    """All that shapes the trained model: sizes, seed, the code that draws, words and trains, library versions."""
    sources = [blueprint.name, *map(inspect.getsource, (*_SHAPING, sys.modules[blueprint.model.__module__]))]
    later = ("overrides", "max_samples", "attacks")  # what comes after training
    shaping = {k: v for k, v in asdict(spec).items() if k not in later}
    facts = [shaping, seed, gold, torch.__version__, transformers.__version__, PHOTO_SIZE, sources]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _trained_models(options: DemoOptions, data: DemoData, seconds: dict[str, float]) -> dict[str, Path]:
    """The folder of each model; the unlearned one's is yet to be filled."""
    cache = options.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastvkd"
    spec, seed = SIZES[options.size], options.seed
    vanilla = trained_model(spec, data, seed, cache, seconds, gold=False)
    models = {"vanilla": vanilla, "unlearned": options.out / "unlearned"}
    if options.gold:
        models["gold"] = trained_model(spec, data, seed, cache, seconds, gold=True)
    return models


def _settings(options: DemoOptions, data: DemoData, folder: Path, vanilla_dir: Path) -> Settings:
    return load_settings(
        shipped("configs/demo.yaml"),
        {
            "model_name_or_path": str(vanilla_dir),
            "data": str(folder),
            "strangers": str(folder / "strangers"),
            "forget_split": data.forget_split,
            "retain_split": data.retain_split,
            "output_dir": str(options.out / "run"),
            "cache_dir": str(options.out / "teacher_cache"),
            "overwrite_output_dir": True,
            "seed": options.seed,
            **SIZES[options.size].overrides,
            **dict(map(parse_override, options.overrides)),
        },
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        delete_folder(folder)


def _show(bar: Progress) -> Callable[[str, int, int, dict[str, float]], None]:
    def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        if phase == "unlearn":
            losses = {name.removeprefix("loss_"): value for name, value in figures.items() if name.startswith("loss_")}
            bar(done, total, " ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    return show


@dataclass(frozen=True)
class _Exam:
    """What every model is asked and attacked with."""

    spec: Size
    seed: int
    out: Path
    cells: dict[str, list[Profile]]
    processor: Any
    prepared: PreparedPhotos
    likeness: dict[str, float]
    reference: list[Photo]

    def evaluate(self, models: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
        """By model, the figures of the cells and those person by person."""
        figures, people = {}, {}
        for name, path in models.items():
            with Progress(f"Evaluating the {name} model") as bar:
                figures[name], people[name] = examine(
                    load_model(path),
                    self.processor,
                    self.cells,
                    likeness=self.likeness,
                    reference=self.reference,
                    batch_size=64,
                    seed=self.seed,
                    log_path=self.out / f"samples-{name}.jsonl",
                    progress=bar,
                    max_samples=self.spec.max_samples,
                    fingerprint=identify_base(path).fingerprint,
                    photos=self.prepared,
                )
        return figures, people

    def attack(self, models: dict[str, Path], seconds: dict[str, float]) -> dict[str, Any]:
        """Every attack, relearning first; its time is noted apart from the others'."""
        loaders = {name: partial(load_model, path) for name, path in models.items()}
        budget = replace(self.spec.attacks, relearning_seeds=(self.seed,))
        attack = Attack(loaders, self.processor, self.cells, self.prepared, budget, self.seed)
        others = [kind for kind in KINDS if kind not in ("relearn", "perturb")]
        phases = {"relearn": ("Relearning attack", ["relearn"]), "attack": ("Other attacks", others)}
        found: dict[str, Any] = {}
        for phase, (label, kinds) in phases.items():
            with _timed(seconds, phase), Progress(label) as bar:
                found |= replace(attack, progress=bar).run(kinds)
        return found


def _judge(
    settings: Settings,
    exam: _Exam,
    unlearned_dir: Path,
    figures: dict[str, Any],
    people: dict[str, Any],
    attacks: dict[str, Any],
    digests: dict[str, str],
) -> dict[str, Any]:
    """The certificate."""
    relearning = relearned(attacks["relearning"])
    return certificate(
        forget=exam.cells["forget"],
        settings=settings.to_dict(),
        model_fingerprint=identify_base(unlearned_dir).fingerprint,
        figures=figures_of(figures, attacks, people, chance=CHANCE, relearning=relearning, language_model=digests),
        relearning=relearning,
        thresholds=Certificate.of(settings.to_dict()),
        versions=library_versions(),
        edited=edited_of(unlearned_dir),
        requests=judged(requests_of(unlearned_dir), exam.cells["forget"]),
    )


def _parameters(run: Unlearned, vanilla_dir: Path) -> dict[str, int]:
    total = sum(p.numel() for p in load_model(vanilla_dir).parameters())
    return {"trainable": run.trainable_parameters, "frozen": total - run.trainable_parameters, "total": total}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Notes the time that a block took."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
