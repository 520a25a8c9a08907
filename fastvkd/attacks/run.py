"""All attacks on one set of models, and `fastvkd attack`: model folders in, attacks.json and certificate.json out."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from fastvkd.attacks import fewshot, images, membership, paraphrase, probe, quantize, reverse
from fastvkd.attacks.asking import Asked, Examiner, Figures, chance_of, choices_of, figures, plain_query
from fastvkd.attacks.certificate import certificate, figures_of, mean_gaps, write_certificate
from fastvkd.attacks.relearning import hold_out, relearn
from fastvkd.data.sources import evaluation_cells, reference_strangers
from fastvkd.engines.exporting import read_record, settings_of
from fastvkd.environment import library_versions
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.people import examine, likeness
from fastvkd.evaluation.protocol import OnProgress
from fastvkd.files import write_atomically
from fastvkd.models.answers import Query
from fastvkd.models.folder import identify_base, language_model_sha256, local_folder
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.placement import Loading, loading_of
from fastvkd.models.steering import attach, load_steering
from fastvkd.options import AttackKind, AttackOptions, Budget
from fastvkd.records import Photo, Profile
from fastvkd.reporting.model_card import with_certificate
from fastvkd.reporting.schema import PLAIN
from fastvkd.settings import Certificate, load_settings

log = logging.getLogger("fastvkd")

KINDS = tuple(kind for kind in get_args(AttackKind) if kind != "all")  # in the order in which they run
QUESTION_KINDS = ("paraphrase", "fewshot", "reverse", "images", "quantize")
_EXAMPLES = 2000  # solved questions that few-shot prompts draw from


def parse_kinds(kinds: Sequence[str]) -> list[str]:
    """The attacks in the order in which they run; `all` stands for every one. Raises SettingsError."""
    for kind in kinds:
        if kind not in get_args(AttackKind):
            raise SettingsError(f"kind={kind!r}: allowed are {', '.join(get_args(AttackKind))}")
    return [kind for kind in KINDS if "all" in kinds or kind in kinds]


def _leave_out(kind: str, wanted: list[str], named: Sequence[str], why: str) -> None:
    """Take a kind that data or models cannot serve from `wanted`. Raises DataError where the user named it."""
    if kind not in wanted:
        return
    if kind in named:
        raise DataError(f"{kind}: {why}; mend that or leave this kind out")
    log.warning("%s is left out: %s", kind, why)
    wanted.remove(kind)


@dataclass(frozen=True)
class Attack:
    """The models under attack (`unlearned`, and where they are at hand `vanilla`, the one before, and `gold`), and what
    an attacker has: data, as `evaluation_cells` gives them, and a budget."""

    models: Mapping[str, nn.Module]
    processor: Any
    cells: Mapping[str, list[Profile]]
    prepared: PreparedPhotos
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    progress: OnProgress = lambda *_: None
    reference: Sequence[Photo] = ()  # of strangers who are in none of the cells
    public: nn.Module | None = None  # what everybody can download: the model before it learnt anything that is asked

    @property
    def unseen(self) -> list[Profile]:
        return self.cells.get("test") or []

    def evaluate(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """By model, the figures of the cells (see `evaluate_cells`) and those person by person (see `examine`).

        Free answers are asked for only where they say something of people: where the data know strangers."""
        original = self.models.get("vanilla")
        alike = None if original is None else likeness(original, self.processor, self.cells)
        figures, people = {}, {}
        for name, model in self.models.items():
            figures[name], people[name] = examine(
                model,
                self.processor,
                dict(self.cells),
                likeness=alike,
                reference=self.reference,
                batch_size=self.budget.batch_size,
                seed=self.seed,
                tasks=("choice", "generation", "description") if "stranger" in self.cells else ("choice",),
                max_samples=self.budget.max_samples,
                photos=self.prepared,
                progress=self.progress,
            )
        return figures, people

    def run(self, kinds: Sequence[str] = ("all",)) -> dict[str, Any]:
        """Attack in the named kinds.

        Questions are about photos of forgotten people, known and unseen together; relearning is judged on unseen ones
        alone, or where there are none on those that `hold_out` keeps from the attacker.

        Returns, for the kinds that ran: "questions", a list of {"kind", "variant", "chance", "figures": {model:
        {"accuracy", "ci95", "n"}}}, and for `quantize` "left_alone", the names of the linear layers that were not
        rounded; "relearning", the rows of `relearn`, each with "judged_on", `unseen` or `held out`; "membership",
        {model: {set: {score: AUC}}}; "probe", {"sites": [...], "models": {model: {site: {group: figures}}}}.

        Raises DataError, before anything runs, where the data cannot serve a kind that is named: no second photo of
        anybody for `relearn`, fewer than two forgotten entities for `probe`; `all` leaves those out. Also without any
        multiple-choice question for the kinds that ask one.
        """
        wanted = parse_kinds(kinds)
        forget, retain = self.cells["forget"], self.cells["retain"]
        if not choices_of(self.unseen or hold_out(forget)[1], 1, self.seed):
            needs = "unseen photos of the forgotten entities (Test_Set, or test.jsonl), or several photos of one"
            _leave_out("relearn", wanted, kinds, f"the data hold no {needs}, to judge by")
        if any(p.is_meta for model in self.models.values() for p in model.parameters()):
            for kind in ("relearn", "quantize"):
                _leave_out(kind, wanted, kinds, "it changes weights, and some lie in host memory (--device-map auto)")
        data = probe.ProbeData(forget, self.unseen, retain, seed=self.seed) if "probe" in wanted else None
        if data is None or "forget" not in data.groups:
            _leave_out("probe", wanted, kinds, "the data hold no two forgotten entities with two photos each")
        found: dict[str, Any] = {}
        if set(wanted) & set(QUESTION_KINDS):
            found["questions"] = self._questions(wanted)
        if "relearn" in wanted:
            found["relearning"] = self._relearning()
        if "membership" in wanted:
            found["membership"] = self._membership()
        if "probe" in wanted and data is not None:
            found["probe"] = self._probe(data)
        return found

    def examiner(self, model: nn.Module) -> Examiner:
        return Examiner(model, self.processor, self.budget.batch_size, self.prepared)

    def plain(self, asked: Sequence[Asked]) -> list[Query]:
        return [plain_query(self.processor, one.choice.question, one.photo) for one in asked]

    def _questions(self, kinds: Sequence[str]) -> list[dict[str, Any]]:
        questions = _Questions(self, kinds)
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for done, (name, model) in enumerate(self.models.items()):
            for row, measured in questions.put_to(model):
                self.progress(done, len(self.models), f"{name} {row['variant']}")
                row = rows.setdefault((row["kind"], row["variant"]), row | {"figures": {}})
                row["figures"][name] = measured
        return list(rows.values())

    def _relearning(self) -> list[dict[str, Any]]:
        rows = relearn(
            {name: model for name, model in self.models.items() if name != "vanilla"},
            self.processor,
            self.cells,
            self.budget,
            public=self.public,
            prepared=self.prepared,
            progress=lambda done, total: self.progress(done, total, "relearn"),
        )
        return [{**row, "judged_on": "unseen" if self.unseen else "held out"} for row in rows]

    def _membership(self) -> dict[str, Any]:
        limit = self.budget.max_samples
        members = choices_of(self.cells["forget"], limit, self.seed)
        sets = {"pairs": membership.pair_sets(members, self.seed)}
        if self.unseen:
            sets["photos"] = membership.photo_sets(members, choices_of(self.unseen, limit, self.seed))
        sets = {name: both for name, both in sets.items() if all(both)}
        size = self.budget.batch_size
        return self._of_each(
            "membership",
            lambda model: membership.membership(model, self.processor, sets, seed=self.seed, batch_size=size),
        )

    def _probe(self, data: probe.ProbeData) -> dict[str, Any]:
        sites = probe.every_site(next(iter(self.models.values())))
        by_model = self._of_each("probe", lambda model: probe.probe(model, self.processor, data, sites))
        return {"sites": sites, "models": by_model}

    def _of_each(self, kind: str, measure: Callable[[nn.Module], Any]) -> dict[str, Any]:
        found = {}
        for done, (name, model) in enumerate(self.models.items()):
            self.progress(done, len(self.models), kind)
            found[name] = measure(model)
        return found


class _Questions:
    """What is asked in the kinds of attack that ask: prepared once, then put to every model."""

    def __init__(self, target: Attack, kinds: Sequence[str]) -> None:
        cells, budget, seed, processor = target.cells, target.budget, target.seed, target.processor
        asked = choices_of([*cells["forget"], *target.unseen], budget.max_samples, seed)
        if not asked:
            raise DataError(
                "attack: the forget set has no multiple-choice question about a photo; nothing can be asked"
            )
        self.target, self.asked, self.chance = target, asked, chance_of(asked)
        self.plain = target.plain(asked)
        reworded = paraphrase.paraphrased(processor, asked) if "paraphrase" in kinds else {"plain": self.plain}
        self.wordings = [("plain" if name == "plain" else "paraphrase", name, of) for name, of in reworded.items()]
        if "fewshot" in kinds:
            retained = choices_of(cells["retain"], _EXAMPLES, seed)
            self.wordings += [
                ("fewshot", f"{shots}-shot", fewshot.few_shot(processor, asked, retained, shots, seed))
                for shots in budget.shots
            ]
        self.groups = reverse.groups_of(asked, budget.max_samples, seed) if "reverse" in kinds else []
        edits = images.EDITS if "images" in kinds else ()
        self.edited = {edit: images.with_edited_photos(asked, edit, seed) for edit in edits}
        self.bits = quantize.BITS if "quantize" in kinds else ()

    def put_to(self, model: nn.Module) -> Iterator[tuple[dict[str, Any], Figures]]:
        """Kind, variant and chance of each row, with the model's figures."""
        seed, examiner = self.target.seed, self.target.examiner(model)

        def row(kind: str, variant: str, chance: float = self.chance) -> dict[str, Any]:
            return {"kind": kind, "variant": variant, "chance": chance}

        for kind, variant, queries in self.wordings:
            yield row(kind, variant), figures(examiner.right(self.asked, queries), seed)
        if self.groups:
            chance = 1 / len(self.groups[0])
            yield row("reverse", "which photo", chance), reverse.reverse(examiner, self.groups, seed)
        for edit, dressed in self.edited.items():
            yield row("images", edit), figures(examiner.right(dressed, self.target.plain(dressed)), seed)
        for bits in self.bits:
            rounded = quantize.quantized(model, bits)
            right = self.target.examiner(rounded).right(self.asked, self.plain)
            yield row("quantize", bits) | {"left_alone": quantize.left_alone(rounded)}, figures(right, seed)


def attack_run(options: AttackOptions, progress: OnProgress = lambda *_: None) -> dict[str, Any]:
    """Evaluate and attack the unlearned model, and where at hand `vanilla` (before) and `gold`, judge it by the
    thresholds, and write attacks.json and certificate.json into `out`.

    Thresholds, splits and the settings that the certificate states are those of the run that made the unlearned model,
    as `export` noted them, and its folder gets the certificate too, with a section in its model card. Of another model
    the certificate states no settings (null); there thresholds and splits default to those of `Settings`. With
    `steering` no folder gets a certificate.

    Returns what attacks.json holds: the result of `Attack.run`, "models" ({model: fingerprint}), "loading" (their
    dtype, quantize and device_map), "steering", "data", the splits, "evaluation" ({model: figures of
    `evaluate_cells`}), "people" ({model: figures of `examine` person by person}) and "certificate". Raises
    FastVKDError.
    """
    thresholds = _thresholds(options)
    given = {"vanilla": options.before, "unlearned": options.model, "gold": options.gold}
    folders = {name: local_folder(folder) for name, folder in given.items() if folder}
    fingerprints = {name: identify_base(folder).fingerprint for name, folder in folders.items()}
    record = read_record(folders["unlearned"])
    made_by = settings_of(record)
    forget_split = options.forget_split or made_by["forget_split"]
    retain_split = options.retain_split or made_by["retain_split"]
    cells = evaluation_cells(options.data, forget_split, retain_split)
    max_pixels = options.max_pixels or made_by.get("max_pixels")
    processor = load_processor(options.model, max_pixels=max_pixels)
    budget = replace(options, relearning_samples=options.max_samples)
    kinds = parse_kinds(options.kind)
    # relearning and rounding work on a copy of one model at a time
    loading = loading_of(options, list(folders.values()), copies=int(bool({"relearn", "quantize"} & set(kinds))))
    models = _load(options, folders, loading)
    target = Attack(
        models,
        processor,
        cells,
        PreparedPhotos(processor),
        budget,
        options.seed,
        progress,
        reference_strangers(options.data),
        _public(options, loading),
    )
    evaluation, people = target.evaluate()
    found = target.run(options.kind)
    asked = choices_of(cells["forget"], None, options.seed)
    judged = certificate(
        forget=cells["forget"],
        settings=made_by if record is not None and options.steering is None else None,
        model_fingerprint=fingerprints["unlearned"],
        figures=figures_of(
            evaluation,
            found,
            people,
            chance=chance_of(asked) if asked else None,
            relearning_gaps=mean_gaps(found.get("relearning", [])),
            language_model=_digests(folders),
        ),
        thresholds=thresholds or Certificate(**made_by["certificate"]),
        versions=library_versions(),
        loading=loading.described(),
    )
    result = {
        **found,
        "models": fingerprints,
        "loading": loading.described(),
        "max_pixels": max_pixels,
        "steering": None if options.steering is None else str(options.steering),
        "data": options.data,
        "forget_split": forget_split,
        "retain_split": retain_split,
        "evaluation": evaluation,
        "people": people,
        "certificate": judged,
    }
    write_atomically(options.out / "attacks.json", (json.dumps(result, indent=1) + "\n").encode())
    write_certificate(judged, options.out / "certificate.json")
    if judged["settings"] is not None:
        _certify_folder(judged, folders["unlearned"])
    return result


def _thresholds(options: AttackOptions) -> Certificate | None:
    """Those of another YAML than the run's."""
    if options.config is None:
        return None
    return load_settings(options.config, {"model_name_or_path": options.model, "data": options.data}).certificate


def _load(options: AttackOptions, folders: Mapping[str, Path], loading: Loading) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {name: loading.model(folder) for name, folder in folders.items()}
    if options.steering is not None:
        attach(models["unlearned"], load_steering(options.steering))
    return models


def _public(options: AttackOptions, loading: Loading) -> nn.Module | None:
    """On the CPU: it only lends weights, and to relearning alone."""
    if options.public is None or "relearn" not in parse_kinds(options.kind):
        return None
    return load_model(local_folder(options.public), dtype=loading.dtype)


def _digests(folders: Mapping[str, Path]) -> dict[str, str] | None:
    if "vanilla" not in folders:
        return None
    sides = {"before": "vanilla", "after": "unlearned"}
    return {side: language_model_sha256(folders[name]) for side, name in sides.items()}


def _certify_folder(judged: Mapping[str, Any], folder: Path) -> None:
    write_certificate(judged, folder / "certificate.json")
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    write_atomically(card, with_certificate(text, judged).encode())


def attack_table(found: Mapping[str, Any]) -> str:
    """The result of `attack_run` as text: one line a variant, areas under curves, and the certificate's checks."""
    lines = []
    models = list(found["evaluation"])
    width = max(len(name) for name in models) + 2
    head = f"{'attack':14} {'variant':32}" + "".join(f"{name:>{width}}" for name in models) + f"{'chance':>9}"

    def row(kind: str, variant: str, values: Mapping[str, float], chance: float | None) -> None:
        cells = "".join(f"{values[name]:>{width}.3f}" if name in values else f"{'-':>{width}}" for name in models)
        lines.append(f"{kind:14} {variant:32}{cells}" + (f"{chance:>9.3f}" if chance is not None else ""))

    for one in found.get("questions", []):
        accuracy = {name: cell["accuracy"] for name, cell in one["figures"].items()}
        row(one["kind"], one["variant"], accuracy, one["chance"])
        if one.get("left_alone"):
            lines[-1] += f"  not rounded: {', '.join(one['left_alone'])}"
    for one in found.get("relearning", []):
        named = "" if one["variant"] == PLAIN else f" {one['variant']}"
        row("relearn AUC", f"{one['weights']} {one['share']:.0%} #{one['seed']}{named}", one["auc"], None)
    sets = found.get("membership", {})
    for name, by_score in next(iter(sets.values()), {}).items():
        for score in by_score:
            row(f"member {name}", score, {model: of[name][score]["auc"] for model, of in sets.items()}, 0.5)
    if "probe" in found:
        by_model = found["probe"]["models"]
        for site in found["probe"]["sites"]:
            here = {model: of[site]["forget"] for model, of in by_model.items()}
            chance = next(iter(here.values()))["chance"]
            row("probe", site, {model: of["accuracy"] for model, of in here.items()}, chance)
    lines = [head, *lines, ""]
    for check in found["certificate"]["checks"]:
        mark = {True: "met   ", False: "MISSED", None: "-     "}[check["met"]]
        figure = "not measured" if check["figure"] is None else f"{check['figure']:.3f}"
        lines.append(f"  {mark} {check['name']}: {figure} (asked: {check['asked']})")
    return "\n".join(lines)
