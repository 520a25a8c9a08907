"""`fastvkd report`: the page of any runs, put together from what training, evaluation, attack and demo left in folders.

A folder is known by the files in it. Folders must be about one model and one data set: what they recorded of these is
compared. A part that no folder holds is left out of the page, and named there.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvkd.data.sources import evaluation_cells
from fastvkd.engines.checkpoints import find_latest
from fastvkd.engines.exporting import read_record
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import DataError, one_line
from fastvkd.files import json_lines
from fastvkd.methods import method_of
from fastvkd.models.folder import identify_base
from fastvkd.models.shards import shards_of
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile
from fastvkd.reporting.html import write_html
from fastvkd.reporting.report import certificate_summary, read_log, read_report
from fastvkd.reporting.schema import FIGURES, MODELS, PLAIN, validate
from fastvkd.settings import Settings

_ROLES = {"vanilla": "before unlearning", "unlearned": "after unlearning", "gold": "of a gold model"}
_PARTS = {
    "vanilla": "an evaluation before unlearning",
    "unlearned": "an evaluation after unlearning",
    "gold": "a gold model",
    "log": "a training run",
    "attacks": "attacks",
    "relearning": "a relearning attack",
    "certificate": "a certificate",
}
_ROUNDED = "how the LLM was quantised"
_SAMPLES = "samples.jsonl"  # goes with `fastvkd purge`
_PHOTOS_A_GROUP = 5
_THUMBNAIL = 256  # px; larger photos are shown smaller

Samples = list[dict[str, Any]]


@dataclass
class Collected:
    """What the folders hold together: parts of a report, rows of metrics.jsonl, answers by model, and for the reader
    what each folder is."""

    report: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] | None = None
    samples: dict[str, Samples] = field(default_factory=dict)
    contents: list[str] = field(default_factory=list)
    evaluations: list["_Evaluation"] = field(default_factory=list)
    attacks_own: dict[str, Any] = field(default_factory=dict)  # the attack's evaluation, where no other is given
    whole: bool = False
    _owners: dict[str, Path] = field(default_factory=dict)
    _facts: dict[str, tuple[Any, Path]] = field(default_factory=dict)

    def put(self, part: str, value: Any, folder: Path) -> None:
        """Note a part of the report. Raises DataError where another folder holds that part too."""
        if part in self._owners:
            raise DataError(
                f"{folder}: holds {_PARTS.get(part, part)}, and so does {self._owners[part]}; give one of them"
            )
        self._owners[part] = folder
        if part == "log":
            self.log = value
        else:
            self.report[part] = value

    def agree(self, what: str, value: Any, folder: Path) -> None:
        """Note a fact that all folders share; None is no fact. Raises DataError where another folder says otherwise."""
        if value is None:
            return
        known, other = self._facts.setdefault(what, (value, folder))
        if known == value or (what == "data" and _same_data(known, value)):
            return
        if isinstance(value, dict) and isinstance(known, dict):
            key = next(key for key in sorted(known.keys() | value.keys()) if known.get(key) != value.get(key))
            what, known, value = f"{what}: {key}", known.get(key), value.get(key)
        raise DataError(
            f"{folder}: {what} is {_short(value)}, but {_short(known)} in {other}; give folders of one model and data"
        )

    def fact(self, what: str) -> Any:
        """What the folders agree on; None where none says."""
        return self._facts.get(what, (None, None))[0]

    def missing(self) -> list[str]:
        """The parts that no folder holds, as the page names them. A demo's report is whole as it is."""
        held = set(self.report) | ({"log"} if self.log is not None else set())
        if not {"attacks", "relearning"} & held:
            held.add("relearning")  # said by `attacks` already
        return [] if self.whole else [name for part, name in _PARTS.items() if part not in held]

    def check(self) -> None:
        """Raise DataError for the first value that a report must not hold, naming its folder."""
        for problem in validate(self.report, cells=(), partial=True)[:1]:
            part = problem.partition(":")[0].partition(".")[0].partition("[")[0]
            owners = [self._owners[part]] if part in self._owners else dict.fromkeys(self._owners.values())
            raise DataError(f"{', '.join(map(str, owners))}: {problem}; run it again with this version of fastvkd")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "..."


def _same_data(one: str, other: str) -> bool:
    """Whether two data folders hold files of the same names and sizes; a hub id may be any folder's source."""

    def files(folder: str) -> dict[str, int]:
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {os.path.relpath(path, folder): path.stat().st_size for path in paths}

    here = [Path(folder).is_dir() for folder in (one, other)]
    return os.path.abspath(one) == os.path.abspath(other) or (files(one) == files(other) if all(here) else any(here))


def _lines(file: Path) -> list[dict[str, Any]]:
    mend = "delete the damaged line, or make the figures again"
    return [line for _, line in json_lines(file, DataError, mend)] if file.is_file() else []


# Reading a folder: each function knows one kind of run, by the file that `_READERS` names.


def _training(folder: Path, found: Collected) -> None:
    checkpoint = find_latest(folder)
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        _made_by(found, manifest, folder)
    rows = read_log(folder / "metrics.jsonl")
    found.put("log", rows, folder)
    if rows and rows[-1].get("peak_memory_bytes"):
        found.put("peak_memory_bytes", rows[-1]["peak_memory_bytes"], folder)
    found.contents.append(f"{folder}: a training run")


def _made_by(found: Collected, record: Mapping[str, Any], folder: Path) -> None:
    """Note which run made the model: content of checkpoint.json, or what `export` wrote of it."""
    found.agree("the model before unlearning", record["base_model"]["fingerprint"], folder)
    found.agree("the run's number of updates", record["updates"], folder)
    _settings(found, record["settings"], folder)


def _settings(found: Collected, settings: Mapping[str, Any] | None, folder: Path) -> None:
    if settings is not None:
        found.agree("the run's settings", dict(settings), folder)
        found.report["settings"] = dict(settings)
        _data(found, settings, folder)


def _data(found: Collected, content: Mapping[str, Any], folder: Path) -> None:
    for key in ("data", "forget_split", "retain_split"):
        found.agree(key, content[key], folder)


def _demo(folder: Path, found: Collected) -> None:
    for part, value in read_report(folder / "report.json", cells=()).items():
        found.put(part, value, folder)
    found.put("log", read_log(folder / "run" / "metrics.jsonl"), folder)
    found.samples = {model: _lines(folder / f"samples-{model}.jsonl") for model in MODELS}
    checkpoint = find_latest(folder / "run")
    if checkpoint is not None:
        _made_by(found, read_manifest(checkpoint), folder)
    if (folder / "certificate.json").is_file():
        paper = json.loads((folder / "certificate.json").read_text())
        found.agree("the model after unlearning", paper["model_fingerprint"], folder)
    found.whole = True
    found.contents.append(f"{folder}: a demo")


def _attack(folder: Path, found: Collected) -> None:
    content = _attack_of_earlier_versions(json.loads((folder / "attacks.json").read_text()))
    paper, models = content["certificate"], content["models"]
    found.agree("the model before unlearning", models.get("vanilla"), folder)
    found.agree("the model after unlearning", _identity(models["unlearned"], content["steering"]), folder)
    found.agree("the gold model", models.get("gold"), folder)
    found.agree(_ROUNDED, content.get("loading", {}).get("quantize"), folder)
    _settings(found, paper["settings"], folder)
    _data(found, content, folder)
    attacks = {key: content[key] for key in ("questions", "membership", "probe", "perturbation") if key in content}
    if attacks:
        found.put("attacks", attacks, folder)
    if content.get("relearning"):
        parts = relearning_parts(content["relearning"])
        found.put("relearning", parts["relearning"], folder)
        found.report |= parts | {"notes": [_relearning_note(content["relearning"])]}
    found.put("certificate", certificate_summary(paper), folder)
    found.report["versions"] = paper["code"]["versions"]
    if paper["figures"].get("chance") is not None:
        found.report["chance"] = paper["figures"]["chance"]
    found.attacks_own = content["evaluation"]
    found.contents.append(f"{folder}: attacks with a certificate")


def _attack_of_earlier_versions(content: dict[str, Any]) -> dict[str, Any]:
    """attacks.json with what earlier versions left out, as far as the certificate says it: which model was attacked,
    and of which run. It has a run's settings only where no steering was on."""
    paper = content["certificate"]
    if "models" in content or not paper.get("settings"):
        return content
    said = {key: paper["settings"][key] for key in ("data", "forget_split", "retain_split")}
    return {"models": {"unlearned": paper["model_fingerprint"]}, "steering": None, **said, **content}


def relearning_parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a report says of relearning: `relearning`, `relearning_auc` and `relearning_variants`, of the attacker who
    holds most photos, as means over seeds at the learning rate that regains most. Curves are those of the plain attack;
    `relearning_variants`, where there are variants or rates, has the areas of all.

    `rows` are those of attacks.json: `share`, `weights`, `seed`, `curves`, `auc`, `variant` unless it is plain, and
    since there are several `learning_rate` and `collapsed`.
    """
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in _strongest(rows):
        group = (row.get("variant", PLAIN), row["weights"], row.get("learning_rate", 0.0))
        groups.setdefault(group, []).append(row)
    every: list[dict[str, Any]] = []
    for (variant, weights, rate), runs in groups.items():
        auc = {model: _mean([run["auc"][model] for run in runs]) for model in runs[0]["auc"]}
        lost = any(run.get("collapsed", {}).get("unlearned") for run in runs)
        told = ({"learning_rate": rate} if rate else {}) | ({"collapsed": True} if lost else {})
        every.append({"variant": variant, "weights": weights, **told, "auc": auc})
    plain: dict[str, tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = {}
    for one, runs in zip(every, groups.values(), strict=True):
        best = plain.get(one["weights"])
        if one["variant"] == PLAIN and (best is None or one["auc"]["unlearned"] > best[0]["auc"]["unlearned"]):
            plain[one["weights"]] = one, runs
    return {
        "relearning": {weights: _mean_curves(runs) for weights, (_, runs) in plain.items()},
        "relearning_auc": {weights: one["auc"] for weights, (one, _) in plain.items()},
        **({"relearning_variants": every} if len(every) > len(plain) else {}),
    }


def _strongest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the plain attack those with the largest share, and all variants, which are of that attacker."""
    share = max((row["share"] for row in rows if row.get("variant", PLAIN) == PLAIN), default=None)
    return [row for row in rows if row.get("variant", PLAIN) != PLAIN or row["share"] == share]


def _mean_curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        model: [
            {"step": points[0]["step"], "accuracy": _mean([point["accuracy"] for point in points])}
            for points in zip(*(run["curves"][model] for run in runs), strict=True)
        ]
        for model in runs[0]["curves"]
    }


def _relearning_note(rows: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for row in _strongest(rows) if row.get("variant", PLAIN) == PLAIN]
    seeds = len({row["seed"] for row in rows})
    note = f"Relearning: an attacker with {rows[0]['share']:.0%} of the forget photos, mean over seeds ({seeds})."
    if rates := sorted({row["learning_rate"] for row in rows if "learning_rate" in row}):
        note += f" Learning rates tried: {', '.join(f'{rate:g}' for rate in rates)}; the curves are of the strongest."
    if rows[0].get("judged_on") == "held out":
        note += " It was judged on photos that unlearning had used, but the attacker did not."
    return note


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass
class _Evaluation:
    """Content of results.json and samples.jsonl."""

    folder: Path
    results: dict[str, Any]
    samples: Samples

    @property
    def model(self) -> str:
        """Which model answered: the fingerprint of its folder, and whether it was steered."""
        return _identity(self.results["model_fingerprint"], self.results["steering"])

    @property
    def asked(self) -> set[tuple[Any, ...]]:
        keys = ("cell", "kind", "task", "entity", "question")
        return {tuple(sample.get(key) for key in keys) for sample in self.samples if "task" in sample}


def _identity(fingerprint: str, steering: str | None) -> str:
    return fingerprint + (" steered" if steering else "")


def _evaluation(folder: Path, found: Collected) -> None:
    one = _Evaluation(folder, _results(folder / "results.json"), _lines(folder / _SAMPLES))
    if "lmms_eval" in one.results and "cells" not in one.results:
        found.contents.append(f"{folder}: figures of lmms-eval alone, which the page does not show")
        return
    for key in ("model", "model_fingerprint", "made_by", "steering", "cells"):
        if key not in one.results:
            raise KeyError(key)
    for key in ("benchmark", "mode", "seed", "max_samples"):
        found.agree(f"the evaluation's {key}", str(one.results[key]), folder)
    found.agree(_ROUNDED, one.results.get("loading", {}).get("quantize"), folder)
    _data(found, one.results, folder)
    found.evaluations.append(one)


def _results(file: Path) -> dict[str, Any]:
    """results.json. Where an earlier version wrote it, without saying which model answered, the model's folder says it,
    unless that is gone or was written later."""
    results: dict[str, Any] = json.loads(file.read_text())
    model = Path(results["model"])
    if "model_fingerprint" in results or not (model / "config.json").is_file():
        return results
    if any(shard.stat().st_mtime > file.stat().st_mtime for shard in shards_of(model)):
        return results
    return results | {"model_fingerprint": identify_base(model).fingerprint, "made_by": read_record(model)}


_READERS: dict[str, Callable[[Path, Collected], None]] = {
    "report.json": _demo,
    "metrics.jsonl": _training,
    "attacks.json": _attack,
    "results.json": _evaluation,
}


def _place_evaluations(found: Collected) -> None:
    """Find out which model each evaluation is of, from the others and from the runs; note its figures under that."""
    for one in found.evaluations:
        record, run = one.results["made_by"], found.fact("the run's settings")
        if one.results["steering"]:
            found.agree("the model before unlearning", one.results["model_fingerprint"], one.folder)
            found.agree("the model after unlearning", one.model, one.folder)
        elif record and (not method_of(record["settings"]).split_key or record["settings"] == run):
            found.agree("the model after unlearning", one.model, one.folder)
            _made_by(found, record, one.folder)
    for one in found.evaluations:
        role = _role(one, found)
        beside = {name: one.results[name] for name in FIGURES if name in one.results}
        found.put(role, one.results["cells"] | beside, one.folder)
        found.samples[role] = one.samples
        no_samples = "" if (one.folder / _SAMPLES).is_file() else f", without its {_SAMPLES}: the page shows no answers"
        found.contents.append(f"{one.folder}: an evaluation {_ROLES[role]}{no_samples}")
        first = found.evaluations[0]
        if one.asked and first.asked and one.asked != first.asked:
            raise DataError(
                f"{one.folder}: an evaluation with other questions than {first.folder} "
                f"({len(one.asked & first.asked)} of {len(one.asked)} in common); give both the same data and seed"
            )
    own = [model for model in MODELS if model in found.attacks_own and model not in found.report]
    for model in own:
        found.report[model] = found.attacks_own[model]
    if own and found.evaluations:
        words = ", ".join(_ROLES[model] for model in own)
        found.report.setdefault("notes", []).append(f"The figures {words} are the attack's, multiple choice only.")


def _role(one: _Evaluation, found: Collected) -> str:
    before, after, gold = (
        found.fact(what) for what in ("the model before unlearning", "the model after unlearning", "the gold model")
    )
    known = {gold: "gold", after: "unlearned", before: "vanilla"}
    if one.model in known:
        return known[one.model]
    settings = (one.results["made_by"] or {}).get("settings", {})
    if str(settings.get("finetune_split")).endswith(f"-{one.results['forget_split']}"):
        return "gold"  # trained on everybody but the forgotten
    base = found.report.get("settings", {}).get("model_name_or_path")
    if before is None and base in (None, one.results["model"]):
        found.agree("the model before unlearning", one.model, one.folder)
        return "vanilla"
    raise DataError(
        f"{one.folder}: an evaluation of {one.results['model']}, which is none of the models of the other folders; "
        "give folders of one model and data"
    )


@contextlib.contextmanager
def _as_written(*files: Path) -> Iterator[None]:
    """What comes of reading files of another make, or damaged ones, as a DataError that names them."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else one_line(error, 120)
        raise DataError(
            f"{', '.join(map(str, files))}: not as this version of fastvkd writes it ({told}); run that again"
        ) from error


def collect(folders: Sequence[Path]) -> Collected:
    """Read the folders of any number of runs, in any order.

    Raises DataError, in one line: a folder that holds no run, a file that is not what its run writes, two folders that
    contradict each other or hold the same part. Raises ModelError where an earlier version's evaluation is of a model
    folder that is damaged.
    """
    found = Collected()
    for folder in folders:
        names = [name for name in _READERS if (folder / name).is_file()]
        names = names[:1] if "report.json" in names else names  # a demo's folder is whole, whatever else lies in it
        if not names:
            raise DataError(
                f"{folder}: holds no run; give the output_dir of fastvkd train, or the --out folder of eval, attack or "
                f"demo ({', '.join(_READERS)})"
            )
        for name in names:
            with _as_written(folder / name):
                _READERS[name](folder, found)
    with _as_written(*(one.folder / _SAMPLES for one in found.evaluations)):
        _place_evaluations(found)
        if "chance" not in found.report:
            asked = [one for samples in found.samples.values() for one in _choices(samples).values()]
            chances = [1 / len(one["options"]) for one in asked if one["cell"] == "forget"]
            found.report |= {"chance": _mean(chances)} if chances else {}
    if found.fact(_ROUNDED) not in (None, "none"):
        note = f"All models were asked with the weights of their LLM rounded to {found.fact(_ROUNDED)} (--quantize)."
        found.report.setdefault("notes", []).append(note)
    found.check()
    return found


def write_page(folders: Sequence[Path], out: Path, data: str | None = None) -> list[str]:
    """Write the page of these runs and return what to tell the user: what each folder is, and what is left out.

    Args:
        folders: output folders of `fastvkd train`, `eval`, `attack` and `demo`.
        out: the page.
        data: folder or hub id of the data, for the photos in the page; without it the page has none.

    Raises DataError as `collect`, and as `evaluation_cells` where `data` cannot be read; TrainingError where `out`
    cannot be written.
    """
    found = collect(folders)
    cells: Mapping[str, Sequence[Profile]] = {}
    if data is not None:
        found.agree("data", data, Path("--data"))
        defaults = Settings()
        forget, retain = (found.fact(key) or getattr(defaults, key) for key in ("forget_split", "retain_split"))
        cells = evaluation_cells(data, forget, retain)
    with _as_written(*folders):  # answers and figures of which the schema does not ask everything
        examples = gallery(cells, found.samples) if cells else []
        missing = found.missing() + ([] if examples or (found.whole and data) else ["photos"])
        write_html(found.report, examples, found.log, out, missing, people(cells, found.samples))
    lines = [*found.contents, f"Left out, since none of the folders holds it: {', '.join(missing)}"]
    if not examples:
        lines.append("Photos are shown with --data DATA, beside an evaluation's samples.jsonl")
    return (lines if missing else found.contents) + [f"Report: {out}"]


def _place(source: str) -> str:
    """Where a photo stands within its set, wherever the data folder lies: 'file:row' and what follows."""
    file, mark, rest = source.partition(" (")
    return Path(file).name + mark + rest


def _choices(samples: Samples) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The multiple-choice questions about photos, by set, place of the photo, and question."""
    return {
        (sample["cell"], _place(sample["source"]), sample["question"]): sample
        for sample in samples
        if sample.get("task") == "choice" and sample["kind"] == "vqa"
    }


def gallery(cells: Mapping[str, Sequence[Profile]], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """A few photos of every set with what the models answered before and after, from the evaluations' own logs; as
    `write_html` takes them."""
    answers = {
        key: _choices(samples[model])
        for key, model in (("before", "vanilla"), ("after", "unlearned"))
        if samples.get(model)
    }
    examples: list[dict[str, Any]] = []
    for group in ("forget", "test", "retain", "realworld"):
        shown: dict[str, dict[str, Any]] = {}
        for profile in cells.get(group, ()):
            if profile.entity in shown or len(shown) == _PHOTOS_A_GROUP or not profile.photos:
                continue
            # Another question for each face: the gallery shows more than names. The log may hold a sample of them only.
            asked, photo = len(shown), profile.photos[0]
            choices = profile.visual.choice[asked:] + profile.visual.choice[:asked]
            for choice in choices:
                key = group, _place(photo.source), choice.question
                if answers and all(key in of for of in answers.values()):
                    shown[profile.entity] = {
                        "group": group,
                        "image_png": _png(photo),
                        "name": _name(profile),
                        "question": choice.question,
                        "truth": choice.answer_text,
                        **{when: _answer(of[key]) for when, of in answers.items()},
                    }
                    break
        examples += shown.values()
    return examples


def people(cells: Mapping[str, Sequence[Profile]], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """What the models said of every forgotten person and of one stranger, from the evaluations' own logs; as
    `write_html` takes them. Each is about one unseen photo, or a known one where there are no others; the photos are
    those of `cells`."""
    said = {
        model: {(one["cell"], _place(one["source"]), one["question"]): one for one in log if _says(one)}
        for model, log in samples.items()
    }
    asked = next((said[model] for model in ("unlearned", "vanilla", "gold") if said.get(model)), {})
    own = "test" if any(cell == "test" for cell, *_ in asked) else "forget"
    shown = {
        (cell, _place(photo.source)): (profile, photo)
        for cell, profiles in cells.items()
        for profile in profiles
        for photo in profile.photos
    }
    found: dict[str, dict[str, Any]] = {}
    for (cell, place, question), one in asked.items():
        # Of a person the first question in the log counts, which asks who it is; of the strangers the first one.
        row = "" if cell == "stranger" else one["entity"]
        if cell not in (own, "stranger") or row in found:
            continue
        profile, photo = shown.get((cell, place), (None, None))
        found[row] = {
            "entity": one["entity"],
            "stranger": cell == "stranger",
            "name": _name(profile) if profile else one["entity"],
            "question": question,
            "said": {model: of[key]["output"] for model, of in said.items() if (key := (cell, place, question)) in of},
            **({"image_png": _png(photo)} if photo else {}),
        }
    return sorted(found.values(), key=lambda row: bool(row["stranger"]))


def _says(sample: Mapping[str, Any]) -> bool:
    """Whether the sample is a free answer about a photo."""
    return sample.get("task") == "generation" and sample.get("kind") == "vqa"


def _answer(sample: Mapping[str, Any]) -> str:
    """The option that the model chose; where it chose none, what it said."""
    return str(sample["options"].get(sample["prediction"], sample.get("output", "")))


def _name(profile: Profile) -> str:
    """The person's name where the data know it, the one with which a biography begins, or the entity's number."""
    return profile.name or profile.biography.split(" is a ")[0].split(" lies in ")[0] or profile.entity


def _png(photo: Photo) -> bytes:
    """The photo itself where it is a small PNG, or a small PNG of it."""
    if photo.data.startswith(b"\x89PNG\r\n\x1a\n") and len(photo.data) < 1 << 16:
        return photo.data
    image = decode_image(photo.data, photo.source)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return packed.getvalue()
