"""All attacks on one set of models, and `fastvkd attack`: model folders in, attacks.json and certificate.json out."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvkd.attacks import fewshot, images, membership, paraphrase, probe, quantize, reverse
from fastvkd.attacks.asking import Examiner, ask_all, chance_of, choices_of, figures, plain_query
from fastvkd.attacks.certificate import certificate, figures_of, mean_gaps, write_certificate
from fastvkd.attacks.relearning import MEASURE_AT, SHARES, hold_out, relearn
from fastvkd.data.records import Profile
from fastvkd.data.sources import evaluation_cells
from fastvkd.devices import pick_device
from fastvkd.engines.checkpoints import identify_base, local_folder
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.exporting import read_record, settings_of
from fastvkd.models.hashing import language_model_sha256
from fastvkd.models.loading import load_model, load_processor
from fastvkd.reporting.model_card import with_certificate
from fastvkd.reporting.report import library_versions, write_atomically
from fastvkd.settings import Certificate
from fastvkd.unlearning.methods.steering import attach, load_steering

log = logging.getLogger("fastvkd")

QUESTION_KINDS = ("paraphrase", "fewshot", "reverse", "images", "quantize")
_EXAMPLES = 2000  # solved questions that few-shot prompts draw from
KINDS = ("relearn", *QUESTION_KINDS, "membership", "probe")


@dataclass(frozen=True)
class Budget:
    """How much each attack may spend. `max_samples` questions a variant (None: all), `batch_size` at once; relearning
    runs every share of the forget photos with every seed, as far as the last of `relearning_steps`."""

    max_samples: int | None = 400
    batch_size: int = 64
    shots: tuple[int, ...] = fewshot.SHOTS
    relearning_shares: tuple[float, ...] = SHARES
    relearning_steps: tuple[int, ...] = MEASURE_AT
    relearning_seeds: tuple[int, ...] = (0, 1, 2)
    relearning_samples: int | None = None
    learning_rate: float = 1e-3

    def check(self) -> "Budget":
        """Refuse what cannot be run; returns self. Raises SettingsError."""
        for share in self.relearning_shares:
            if not 0 < share <= 1:
                raise SettingsError(f"shares={share:g}: must lie above 0 and at most at 1")
        if min(self.relearning_steps) < 0 or max(self.relearning_steps) < 1:
            raise SettingsError(f"steps={max(self.relearning_steps)}: at least one step is needed, and none below 0")
        for key, value in (("max_samples", self.max_samples), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise SettingsError(f"{key}={value}: at least 1 is needed")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate={self.learning_rate:g}: must be above 0")
        return self


def parse_kinds(kinds: Sequence[str]) -> list[str]:
    """The attacks in the order in which they run; `all` stands for every one. Raises SettingsError."""
    for kind in kinds:
        if kind not in (*KINDS, "all"):
            raise SettingsError(f"kind={kind!r}: allowed are {', '.join(KINDS)} and all")
    return [kind for kind in KINDS if "all" in kinds or kind in kinds]


def attack(
    models: Mapping[str, nn.Module],
    processor: Any,
    cells: Mapping[str, list[Profile]],
    *,
    kinds: Sequence[str] = ("all",),
    budget: Budget | None = None,
    seed: int = 0,
    prepared: PreparedPhotos | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Run attacks on `models`: `unlearned`, and where they are at hand `vanilla` (before) and `gold`.

    `cells` as `evaluation_cells` gives them. Questions are about photos of forgotten people, known and unseen
    together; relearning is judged on unseen ones alone, or where there are none on those that `hold_out` keeps from the
    attacker.

    Returns, for the kinds that ran: "questions", a list of {"kind", "variant", "chance", "figures": {model:
    {"accuracy", "ci95", "n"}}}; "relearning", the rows of `relearn`, each with "judged_on", `unseen` or `held out`;
    "membership", {model: {set: {score: AUC}}}; "probe", {"sites": [...], "models": {model: {site: {group: figures}}}}.

    Raises DataError, before anything runs, where the data cannot serve a kind that is named: no second photo of anybody
    for `relearn`, fewer than two forgotten entities for `probe`; `all` leaves those out. Also without any
    multiple-choice question for the kinds that ask one.
    """
    budget = budget or Budget()
    prepared = prepared or PreparedPhotos(processor)
    wanted = parse_kinds(kinds)
    unseen = cells.get("test") or []
    known, judged = (list(cells["forget"]), list(unseen)) if unseen else hold_out(cells["forget"])
    data = probe.ProbeData(cells["forget"], unseen, cells["retain"], seed=seed) if "probe" in wanted else None
    for kind, able, needs in (
        (
            "relearn",
            bool(choices_of(judged, 1, seed)),
            "unseen photos of the forgotten entities (Test_Set, or test.jsonl), or several photos of one, to judge by",
        ),
        ("probe", data is not None and "forget" in data.groups, "at least two forgotten entities with two photos each"),
    ):
        if kind in wanted and not able:
            if kind in kinds:
                raise DataError(f"{kind}: the data hold no {needs}; add them or leave this kind out")
            log.warning("%s is left out: the data hold no %s", kind, needs)
            wanted.remove(kind)
    found: dict[str, Any] = {}
    if set(wanted) & set(QUESTION_KINDS):
        found["questions"] = _questions(models, processor, cells, wanted, budget, seed, prepared, progress)
    if "relearn" in wanted:
        rows = relearn(
            {name: model for name, model in models.items() if name != "vanilla"},
            processor,
            known,
            judged,
            shares=budget.relearning_shares,
            seeds=budget.relearning_seeds,
            measure_at=budget.relearning_steps,
            learning_rate=budget.learning_rate,
            max_samples=budget.relearning_samples,
            batch_size=budget.batch_size,
            prepared=prepared,
            progress=lambda done, total: progress(done, total, "relearn"),
        )
        found["relearning"] = [{**row, "judged_on": "unseen" if unseen else "held out"} for row in rows]
    if "membership" in wanted:
        members = choices_of(cells["forget"], budget.max_samples, seed)
        sets = {"pairs": membership.pair_sets(members, seed)}
        if unseen:
            sets["photos"] = membership.photo_sets(members, choices_of(unseen, budget.max_samples, seed))
        sets = {name: both for name, both in sets.items() if all(both)}
        found["membership"] = {}
        for i, (name, model) in enumerate(models.items()):
            progress(i, len(models), "membership")
            found["membership"][name] = membership.membership(
                model, processor, sets, seed=seed, batch_size=budget.batch_size
            )
    if "probe" in wanted and data is not None:
        sites = probe.every_site(next(iter(models.values())))
        by_model = {}
        for i, (name, model) in enumerate(models.items()):
            progress(i, len(models), "probe")
            by_model[name] = probe.probe(model, processor, data, sites)
        found["probe"] = {"sites": sites, "models": by_model}
    return found


def _questions(
    models: Mapping[str, nn.Module],
    processor: Any,
    cells: Mapping[str, list[Profile]],
    kinds: Sequence[str],
    budget: Budget,
    seed: int,
    prepared: PreparedPhotos,
    progress: Callable[[int, int, str], None],
) -> list[dict[str, Any]]:
    asked = choices_of([*cells["forget"], *(cells.get("test") or [])], budget.max_samples, seed)
    if not asked:
        raise DataError("attack: the forget set has no multiple-choice question about a photo; nothing can be asked")
    plain = [plain_query(processor, one.choice.question, one.photo) for one in asked]
    variants = {"paraphrase": paraphrase.paraphrased(processor, asked) if "paraphrase" in kinds else {"plain": plain}}
    if "fewshot" in kinds:
        retained = choices_of(cells["retain"], _EXAMPLES, seed)
        variants["fewshot"] = {
            f"{shots}-shot": fewshot.few_shot(processor, asked, retained, shots, seed) for shots in budget.shots
        }
    groups = reverse.groups_of(asked, budget.max_samples, seed) if "reverse" in kinds else []
    edited = {edit: images.with_edited_photos(asked, edit, seed) for edit in images.EDITS} if "images" in kinds else {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def note(kind: str, variant: str, name: str, measured: dict[str, Any], chance: float) -> None:
        row = rows.setdefault((kind, variant), {"kind": kind, "variant": variant, "chance": chance, "figures": {}})
        row["figures"][name] = measured

    chance = chance_of(asked)
    for done, (name, model) in enumerate(models.items()):
        examiner = Examiner(model, processor, prepared=prepared, batch_size=budget.batch_size)
        for kind, by_variant in variants.items():
            progress(done, len(models), f"{name} {kind}")
            for variant, measured in ask_all(examiner, asked, by_variant, seed):
                note("plain" if variant == "plain" else kind, variant, name, measured, chance)
        if groups:
            note("reverse", "which photo", name, reverse.reverse(examiner, groups, seed), 1 / len(groups[0]))
        for edit, dressed in edited.items():
            progress(done, len(models), f"{name} {edit}")
            queries = [plain_query(processor, one.choice.question, one.photo) for one in dressed]
            note("images", edit, name, figures(examiner.right(dressed, queries), seed), chance)
        if "quantize" in kinds:
            for bits in quantize.BITS:
                progress(done, len(models), f"{name} {bits}")
                rounded = Examiner(
                    quantize.quantized(model, bits), processor, prepared=prepared, batch_size=budget.batch_size
                )
                note("quantize", bits, name, figures(rounded.right(asked, plain), seed), chance)
    return list(rows.values())


def attack_run(
    folders: Mapping[str, str],
    data: str,
    *,
    out: Path,
    thresholds: Certificate | None = None,
    steering: Path | None = None,
    forget_split: str | None = None,
    retain_split: str | None = None,
    kinds: Sequence[str] = ("all",),
    budget: Budget | None = None,
    seed: int = 0,
    device: str = "auto",
    bf16: bool = False,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Evaluate and attack the models in `folders` (`unlearned`, and where at hand `vanilla` and `gold`), judge them by
    `thresholds`, and write attacks.json and certificate.json into `out`.

    Thresholds, splits and the settings that the certificate states are those of the run that made the unlearned model,
    as `export` noted them, and its folder gets the certificate too, with a section in its model card. Of another model
    the certificate states no settings (null); there `thresholds` and the splits default to those of `Settings`.
    `steering` is a file of `Steering.save`, switched on in the unlearned model, and no folder gets a certificate then.

    Returns what attacks.json holds: the result of `attack`, "evaluation" ({model: figures of `evaluate_cells` for
    multiple choice}) and "certificate". Raises FastVKDError.
    """
    parse_kinds(kinds)  # refuses what is no kind before any model is loaded
    budget = (budget or Budget()).check()
    local = {name: local_folder(folder) for name, folder in folders.items()}
    record = read_record(local["unlearned"])
    made_by = settings_of(record)
    cells = evaluation_cells(data, forget_split or made_by["forget_split"], retain_split or made_by["retain_split"])
    processor = load_processor(folders["unlearned"])
    prepared = PreparedPhotos(processor)
    where, dtype = pick_device(device), torch.bfloat16 if bf16 else torch.float32
    models = {name: load_model(folder, dtype=dtype, device=where) for name, folder in folders.items()}
    if steering is not None:
        attach(models["unlearned"], load_steering(steering))
    evaluation = {
        name: evaluate_cells(
            model,
            processor,
            cells,
            batch_size=budget.batch_size,
            seed=seed,
            tasks=("choice",),
            max_samples=budget.max_samples,
            photos=prepared,
            progress=progress,
        )
        for name, model in models.items()
    }
    found = attack(
        models, processor, cells, kinds=kinds, budget=budget, seed=seed, prepared=prepared, progress=progress
    )
    digests = None
    if "vanilla" in local:
        digests = {
            "before": language_model_sha256(local["vanilla"]),
            "after": language_model_sha256(local["unlearned"]),
        }
    asked = choices_of(cells["forget"], None, seed)
    paper = certificate(
        forget=cells["forget"],
        settings=made_by if record is not None and steering is None else None,
        model_fingerprint=identify_base(local["unlearned"]).fingerprint,
        figures=figures_of(
            evaluation,
            found,
            chance=chance_of(asked) if asked else None,
            relearning_gaps=mean_gaps(found.get("relearning", [])),
            language_model=digests,
        ),
        thresholds=thresholds or Certificate(**made_by["certificate"]),
        versions=library_versions(),
    )
    result = {**found, "evaluation": evaluation, "certificate": paper}
    write_atomically(out / "attacks.json", (json.dumps(result, indent=1) + "\n").encode())
    write_certificate(paper, out / "certificate.json")
    if record is not None and steering is None:
        write_certificate(paper, local["unlearned"] / "certificate.json")
        card = local["unlearned"] / "README.md"
        text = card.read_text("utf-8") if card.is_file() else ""
        write_atomically(card, with_certificate(text, paper).encode())
    return result


def table(found: Mapping[str, Any]) -> str:
    """The result of `attack_run` as text: one line a variant, areas under curves, and the certificate's checks."""
    lines = []
    models = list(found["evaluation"])
    width = max(len(name) for name in models) + 2
    head = f"{'attack':14} {'variant':14}" + "".join(f"{name:>{width}}" for name in models) + f"{'chance':>9}"

    def row(kind: str, variant: str, values: Mapping[str, float], chance: float | None) -> None:
        cells = "".join(f"{values[name]:>{width}.3f}" if name in values else f"{'-':>{width}}" for name in models)
        lines.append(f"{kind:14} {variant:14}{cells}" + (f"{chance:>9.3f}" if chance is not None else ""))

    for one in found.get("questions", []):
        accuracy = {name: cell["accuracy"] for name, cell in one["figures"].items()}
        row(one["kind"], one["variant"], accuracy, one["chance"])
    for one in found.get("relearning", []):
        row("relearn AUC", f"{one['weights']} {one['share']:.0%} #{one['seed']}", one["auc"], None)
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
