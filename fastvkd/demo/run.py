"""`fastvkd demo`: draw people, teach a small LLaVA to know them, make it forget some, attack it, and report."""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from fastvkd.attacks.certificate import certificate, figures_of, mean_gaps, write_certificate
from fastvkd.attacks.run import KINDS, Budget, attack
from fastvkd.data import demo_data, flags, mllmu, people
from fastvkd.data.demo_data import CHANCE, DemoData, make_demo_data
from fastvkd.data.people import PHOTO_SIZE
from fastvkd.data.records import Profile
from fastvkd.data.sources import evaluation_cells
from fastvkd.demo import model as demo_model
from fastvkd.demo import pretraining
from fastvkd.demo.model import Shape, build_model, build_processor
from fastvkd.demo.pretraining import Schedule, train_vanilla
from fastvkd.devices import peak_memory_bytes
from fastvkd.engines.checkpoints import identify_base
from fastvkd.errors import SettingsError
from fastvkd.evaluation import cloze, wording
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.exporting import export
from fastvkd.models.hashing import language_model_sha256
from fastvkd.models.loading import load_model, load_processor
from fastvkd.paths import shipped
from fastvkd.progress import Progress
from fastvkd.reporting import build_report, model_card, write_html, write_report
from fastvkd.reporting.report import library_versions
from fastvkd.settings import load_settings, parse_override
from fastvkd.unlearning.loop import Unlearned, unlearn


@dataclass(frozen=True)
class Size:
    """How large a demo is; `max_samples` caps a cell's questions, `attacks` is what an attacker may spend."""

    people: int = 40
    forget_percent: int = 10
    photos: int = 18
    test_photos: int = 6
    flag_photos: int = 6
    countries: int = 34
    shape: Shape = field(default_factory=lambda: Shape(llm_layers=4))
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=650, questions_per_photo=3))
    overrides: dict[str, Any] = field(default_factory=dict)
    max_samples: int = 1008
    attacks: Budget = field(
        default_factory=lambda: Budget(max_samples=168, shots=(1, 5), relearning_shares=(0.2,), relearning_samples=168)
    )


SIZES = {
    "default": Size(),
    "tiny": Size(
        people=12,
        forget_percent=25,
        photos=12,
        test_photos=4,
        flag_photos=2,
        countries=16,
        shape=Shape(vision_width=96, vision_layers=3, llm_width=96, llm_layers=3),
        schedule=Schedule(steps=240, photos_per_step=20, questions_per_photo=3, texts_per_step=24, learning_rate=2e-3),
        overrides={
            "max_steps": 250,
            "learning_rate": 1.5e-3,
            "auxiliary_images": 256,
            "auxiliary_share": 0.5,
            "forget_share": 0.45,
            "lambda_forget": 20.0,
            "saturation_margin": 20.0,
        },
        max_samples=200,
        attacks=Budget(
            max_samples=56,
            shots=(2,),
            relearning_shares=(0.2,),
            relearning_steps=(0, 2, 5, 10),
        ),
    ),
}


def demo(
    out: Path,
    *,
    size: str = "default",
    seed: int = 0,
    gold: bool = False,
    cache: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the whole demo into `out` and return the report.

    Args:
        size: "default" (under 12 minutes on two cores) or "tiny" (for tests).
        gold: also train a model that never saw the forgotten people, as the yardstick of perfect forgetting.
        cache: where trained vanilla and gold models are kept, by a hash of all that shaped them.
        overrides: `key=value` settings of the unlearning run.
    """
    if size not in SIZES:
        raise SettingsError(f"size={size!r}: allowed are {', '.join(SIZES)}")
    spec = SIZES[size]
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # or DeepSpeed, which transformers imports, warns that it sees no GPU
    transformers.logging.disable_progress_bar()
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastvkd"
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)

    with _timed(seconds, "data"), Progress("Drawing people and flags"):
        data, folder = build_data(spec, seed, out)
    vanilla_dir = trained_model(spec, data, seed, cache, seconds, gold=False)
    gold_dir = trained_model(spec, data, seed, cache, seconds, gold=True) if gold else None

    settings = load_settings(
        shipped("configs/demo.yaml"),
        {
            "model_name_or_path": str(vanilla_dir),
            "data": str(folder),
            "forget_split": data.forget_split,
            "retain_split": data.retain_split,
            "output_dir": str(out / "run"),
            "cache_dir": str(out / "teacher_cache"),
            "seed": seed,
            **spec.overrides,
            **dict(map(parse_override, overrides)),
        },
    )
    if (out / "run").exists():
        shutil.rmtree(out / "run")  # an earlier demo's checkpoints would be taken for this one's
    with _timed(seconds, "unlearn"), Progress("Unlearning") as bar:
        run = unlearn(settings, progress=_show(bar))

    with _timed(seconds, "evaluate"):
        cells = evaluation_cells(str(folder), data.forget_split, data.retain_split)
        processor = load_processor(vanilla_dir)
        prepared = PreparedPhotos(processor)
        unlearned_dir = out / "unlearned"
        if unlearned_dir.exists():
            shutil.rmtree(unlearned_dir)
        export(Path(settings.output_dir), unlearned_dir, model_card="")
        models = {"vanilla": vanilla_dir, "unlearned": unlearned_dir} | ({"gold": gold_dir} if gold_dir else {})
        figures = {
            name: _evaluate(name, path, processor, cells, spec, seed, out, prepared) for name, path in models.items()
        }
    budget = replace(spec.attacks, relearning_seeds=(seed,))
    attacks = _attack(models, processor, cells, budget, seed, prepared, seconds)
    relearned = attacks.pop("relearning")
    curves = {row["weights"]: row["curves"] for row in relearned}
    digests = {"before": language_model_sha256(vanilla_dir), "after": language_model_sha256(unlearned_dir)}
    paper = certificate(
        forget=cells["forget"],
        settings=settings.to_dict(),
        model_fingerprint=identify_base(unlearned_dir).fingerprint,
        figures=figures_of(
            figures, attacks, chance=CHANCE, relearning_gaps=mean_gaps(relearned), language_model=digests
        ),
        thresholds=settings.certificate,
        versions=library_versions(),
    )

    report = build_report(
        settings=settings.to_dict(),
        chance=CHANCE,
        vanilla=figures["vanilla"],
        unlearned=figures["unlearned"],
        gold=figures.get("gold"),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(torch.device("cpu")),
        parameters=_parameters(run, vanilla_dir),
        language_model_sha256=digests,
        relearning=curves,
        relearning_auc={row["weights"]: row["auc"] for row in relearned},
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
    write_html(report, _examples(cells, out), _lines(run.metrics), out / "report.html")
    (unlearned_dir / "README.md").write_text(model_card(report))
    write_certificate(paper, unlearned_dir / "certificate.json")
    return report


def build_data(spec: Size, seed: int, out: Path) -> tuple[DemoData, Path]:
    data = make_demo_data(
        people=spec.people,
        forget_percent=spec.forget_percent,
        photos=spec.photos,
        test_photos=spec.test_photos,
        flag_photos=spec.flag_photos,
        countries=spec.countries,
        seed=seed,
    )
    folder = out / "data"
    for split, profiles in data.splits.items():
        mllmu.write_split(folder, split, profiles)
    return data, folder


def trained_model(spec: Size, data: DemoData, seed: int, cache: Path, seconds: dict[str, float], *, gold: bool) -> Path:
    """The folder of the vanilla (or gold) model, trained now or found in the cache."""
    name = "gold" if gold else "vanilla"
    folder = cache / f"demo-{name}-{_fingerprint(spec, seed, gold)}"
    if (folder / "config.json").exists():
        return folder
    everybody = data.splits["Full_Set"]
    seen = data.splits[data.retain_split] if gold else everybody
    processor = build_processor(everybody + data.splits["Retain_Set"], spec.shape)
    model = build_model(processor, spec.shape, seed)
    with _timed(seconds, f"train_{name}"), Progress(f"Training the {name} model") as bar:
        train_vanilla(
            model,
            processor,
            seen + data.training_flags,
            spec.schedule,
            seed,
            lambda step, steps, loss: bar(step, steps, f"loss {loss:.3f}"),
            # The gold model has read about everybody: only the faces are to be unknown to it.
            textual_profiles=everybody + data.training_flags,
        )
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def _fingerprint(spec: Size, seed: int, gold: bool) -> str:
    """All that shapes the trained model: sizes, seed, the code that draws, words and trains, library versions."""
    sources = [inspect.getsource(m) for m in (people, flags, demo_data, demo_model, pretraining, wording, cloze)]
    later = ("overrides", "max_samples", "attacks")  # what comes after training
    shaping = {k: v for k, v in asdict(spec).items() if k not in later}
    facts = [shaping, seed, gold, torch.__version__, transformers.__version__, PHOTO_SIZE, sources]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _show(bar: Progress) -> Callable[[str, int, int, dict[str, float]], None]:
    def show(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        if phase == "unlearn":
            losses = {name.removeprefix("loss_"): value for name, value in figures.items() if name.startswith("loss_")}
            bar(done, total, " ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    return show


def _evaluate(
    name: str,
    path: Path,
    processor: Any,
    cells: dict[str, list[Profile]],
    spec: Size,
    seed: int,
    out: Path,
    prepared: PreparedPhotos,
) -> dict[str, Any]:
    with Progress(f"Evaluating the {name} model") as bar:
        return evaluate_cells(
            load_model(path),
            processor,
            cells,
            batch_size=64,
            seed=seed,
            log_path=out / f"samples-{name}.jsonl",
            progress=lambda done, total, what: bar(done, total, what),
            max_samples=spec.max_samples,
            fingerprint=identify_base(path).fingerprint,
            photos=prepared,
        )


def _attack(
    models: dict[str, Path],
    processor: Any,
    cells: dict[str, list[Profile]],
    budget: Budget,
    seed: int,
    prepared: PreparedPhotos,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Every attack, relearning first; its time is noted apart from the others'."""
    loaded = {name: load_model(path) for name, path in models.items()}
    phases = {"relearn": ("Relearning attack", ["relearn"]), "attack": ("Other attacks", list(KINDS[1:]))}
    found: dict[str, Any] = {}
    for phase, (label, kinds) in phases.items():
        with _timed(seconds, phase), Progress(label) as bar:
            found |= attack(
                loaded, processor, cells, kinds=kinds, budget=budget, seed=seed, prepared=prepared, progress=bar
            )
    return found


def _parameters(run: Unlearned, vanilla_dir: Path) -> dict[str, int]:
    total = sum(p.numel() for p in load_model(vanilla_dir).parameters())
    return {"trainable": run.trainable_parameters, "frozen": total - run.trainable_parameters, "total": total}


def _examples(cells: dict[str, list[Profile]], out: Path) -> list[dict[str, Any]]:
    """A few photos of every set with what the model answered before and after, from the evaluation's own log."""
    before, after = (_answers(out / f"samples-{name}.jsonl") for name in ("vanilla", "unlearned"))
    examples: list[dict[str, Any]] = []
    for group, profiles in cells.items():
        shown: dict[str, dict[str, Any]] = {}
        for profile in profiles:
            if profile.entity in shown or len(shown) == 5:
                continue
            # Another question for each face: the gallery shows more than names. The log may hold a sample of them only.
            asked = len(shown)
            choices = profile.visual.choice[asked:] + profile.visual.choice[:asked]
            photo = profile.photos[0]
            choice = next((c for c in choices if (photo.source, c.question) in before), None)
            if choice is not None:
                shown[profile.entity] = {
                    "group": group,
                    "image_png": photo.data,
                    "name": profile.biography.split(" is a ")[0].split(" lies in ")[0],
                    "question": choice.question,
                    "truth": choice.answer_text,
                    "before": before[photo.source, choice.question],
                    "after": after[photo.source, choice.question],
                }
        examples += shown.values()
    return examples


def _answers(samples: Path) -> dict[tuple[str, str], str]:
    """(photo, question) -> the option that the model chose."""
    return {
        (sample["source"], sample["question"]): sample["options"][sample["prediction"]]
        for sample in _lines(samples)
        if sample.get("task") == "choice" and sample["kind"] == "vqa"
    }


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Notes the time that a block took."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
