"""`fastvkd attack`: model folders in, attacks.json and certificate.json out, and attacks.jsonl on the way."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from fastvkd.attacks.asking import chance_of, choices_of
from fastvkd.attacks.certificate import certificate, figures_of, relearned, source_sha256, write_certificate
from fastvkd.attacks.journal import Journal
from fastvkd.attacks.suite import Attack
from fastvkd.data.sources import evaluation_cells, reference_strangers
from fastvkd.data.texts import refuse_marks
from fastvkd.engines.exporting import edited_of, read_record, settings_of
from fastvkd.engines.requests import judged as judged_requests
from fastvkd.engines.requests import requests_of
from fastvkd.environment import library_versions
from fastvkd.errors import SettingsError
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.people import likeness
from fastvkd.evaluation.protocol import OnProgress
from fastvkd.evaluation.run import answers_fingerprint, text_files_sha256
from fastvkd.files import held, write_atomically
from fastvkd.models.folder import identify_base, language_model_sha256, local_folder
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.placement import Loading, loading_of
from fastvkd.models.processing import special_tokens
from fastvkd.models.steering import attach, load_steering
from fastvkd.options import AttackOptions
from fastvkd.records import Photo, Profile
from fastvkd.reporting.model_card import with_certificate
from fastvkd.reporting.schema import PLAIN
from fastvkd.reporting.sentences import requests_sentence
from fastvkd.settings import Certificate, load_settings


def attack_run(options: AttackOptions, progress: OnProgress = lambda *_: None) -> dict[str, Any]:
    """Evaluate and attack the unlearned model, and where at hand `vanilla` (before) and `gold`, judge it by the
    thresholds, and write attacks.json and certificate.json into `out`.

    One model at a time is loaded. Whatever is found goes into attacks.jsonl at once; what is there of the same models,
    data, options, code, libraries and kind of device is not computed again.

    Thresholds, splits and the settings that the certificate states are those of the run that made the unlearned model,
    as `export` noted them, and its folder gets the certificate too, with a section in its model card. Of another model
    the certificate states no settings (null); there thresholds and splits default to those of `Settings`. With
    `steering` no folder gets a certificate.

    Returns what attacks.json holds: the result of `Attack.run` with the evaluation, "models" ({model: fingerprint}),
    "loading" (their dtype, quantize and device_map), "max_pixels", "steering", "data", the splits, and "certificate".
    Raises FastVKDError.
    """
    with held(options.out, "--out"):
        return _attack_run(options, progress)


def _attack_run(options: AttackOptions, progress: OnProgress) -> dict[str, Any]:
    thresholds = _thresholds(options)
    given = {"vanilla": options.before, "unlearned": options.model, "gold": options.gold}
    folders = {name: local_folder(folder) for name, folder in given.items() if folder}
    fingerprints = {name: identify_base(folder).fingerprint for name, folder in folders.items()}
    record = read_record(folders["unlearned"])
    made_by = settings_of(record)
    forget_split = options.forget_split or made_by["forget_split"]
    retain_split = options.retain_split or made_by["retain_split"]
    cells = evaluation_cells(options.data, forget_split, retain_split)
    reference = reference_strangers(options.data)
    max_pixels = options.max_pixels or made_by.get("max_pixels")
    processor = load_processor(options.model, max_pixels=max_pixels)
    refuse_marks((profile for cell in cells.values() for profile in cell), special_tokens(processor))
    loading = loading_of(options, folders["unlearned"])
    identities = _identities(options, folders, loading, max_pixels)
    common = {
        "code": source_sha256(),
        "versions": library_versions(),
        "device": loading.device.type,
        "processor": text_files_sha256(folders["unlearned"]),  # through which every model is asked
        "data": _content_sha256(cells, reference),
    }
    journal = Journal(options.out / "attacks.jsonl", common)
    public = None if options.public is None else local_folder(options.public)
    retained = min(options.relearning_retained, options.max_samples or options.relearning_retained)
    found = Attack(
        {name: partial(_load, options, loading, name, folder) for name, folder in folders.items()},
        processor,
        cells,
        PreparedPhotos(processor),
        replace(options, relearning_samples=options.max_samples, relearning_retained=retained),
        options.seed,
        progress,
        reference=reference,
        likeness=_likeness(loading, folders, processor, cells, journal, identities),
        # On the CPU: it only lends weights, and to relearning alone.
        public=None if public is None else cache(partial(load_model, public, dtype=loading.dtype)),
        journal=journal,
        identities=identities,
        scattered=loading.scattered(folders["unlearned"]),
        rounded=loading.quantize or "",
    ).run(options.kind, evaluate=True)
    asked = choices_of(cells["forget"], None, options.seed)
    relearning = relearned(found.get("relearning", []))
    figures = figures_of(
        found["evaluation"],
        found,
        found["people"],
        chance=chance_of(asked) if asked else None,
        relearning=relearning,
        language_model=_digests(folders),
    )
    judged = certificate(
        forget=cells["forget"],
        settings=made_by if record is not None and options.steering is None else None,
        model_fingerprint=fingerprints["unlearned"],
        figures={"perturbation_excess": None} | figures,  # a certificate says what was not tried
        relearning=relearning,
        thresholds=thresholds or Certificate.of(made_by),
        versions=library_versions(),
        loading=loading.described(),
        edited=edited_of(folders["unlearned"]),
        requests=judged_requests(requests_of(folders["unlearned"]), cells["forget"]),
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


def _load(options: AttackOptions, loading: Loading, name: str, folder: Path) -> nn.Module:
    model = loading.model(folder)
    if any(p.is_meta for p in model.parameters()) and loading.scattered(folder) != "host":
        raise SettingsError(
            f"{folder}: part of it went to host memory, since other work fills the cards; free them, or leave out "
            "relearn, quantize and perturb (--kind)"
        )
    if name == "unlearned" and options.steering is not None:
        attach(model, load_steering(options.steering))
    return model


def _identities(
    options: AttackOptions, folders: Mapping[str, Path], loading: Loading, max_pixels: int | None
) -> dict[str, str]:
    """What each model's answers depend on: its weights, how they are loaded, its processor, and the steering."""
    found = {name: answers_fingerprint(folder, loading, max_pixels) for name, folder in folders.items()}
    if options.steering is not None:
        found["unlearned"] += hashlib.sha256(options.steering.read_bytes()).hexdigest()
    if options.public is not None:
        found["public"] = identify_base(local_folder(options.public)).fingerprint
    return found


def _content_sha256(cells: Mapping[str, Iterable[Profile]], reference: Iterable[Photo]) -> str:
    """SHA-256 (hex) over all photos and questions."""
    digest = hashlib.sha256(json.dumps([photo.key for photo in reference]).encode())
    for name, profiles in cells.items():
        for one in profiles:
            content = [name, one.entity, one.name, [photo.key for photo in one.photos], asdict(one.visual)]
            digest.update(json.dumps([*content, asdict(one.textual)]).encode())
    return digest.hexdigest()


def _likeness(
    loading: Loading,
    folders: Mapping[str, Path],
    processor: Any,
    cells: Mapping[str, list[Profile]],
    journal: Journal,
    identities: Mapping[str, str],
) -> dict[str, float] | None:
    """How like a forgotten person each retained one is to the model before, of which no more is loaded than leads to
    the LLM."""
    if "vanilla" not in folders:
        return None
    facts = {"kind": "likeness", "identity": identities["vanilla"]}
    found: dict[str, float] = journal.kept(
        facts, lambda: likeness(loading.visual_part(folders["vanilla"]), processor, cells)
    )
    return found


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
    head = f"{'attack':14} {'variant':42}" + "".join(f"{name:>{width}}" for name in models) + f"{'chance':>9}"

    def row(kind: str, variant: str, values: Mapping[str, float], chance: float | None) -> None:
        cells = "".join(f"{values[name]:>{width}.3f}" if name in values else f"{'-':>{width}}" for name in models)
        lines.append(f"{kind:14} {variant:42}{cells}" + (f"{chance:>9.3f}" if chance is not None else ""))

    for one in found.get("questions", []):
        accuracy = {name: cell["accuracy"] for name, cell in one["figures"].items()}
        row(one["kind"], one["variant"], accuracy, one["chance"])
        if one.get("left_alone"):
            lines[-1] += f"  not rounded: {', '.join(one['left_alone'])}"
    for one in found.get("relearning", []):
        named = "" if one["variant"] == PLAIN else f" {one['variant']}"
        way = f"{one['weights']} {one['share']:.0%} #{one['seed']} {one['learning_rate']:g}{named}"
        row("relearn AUC", way, one["auc"], None)
        if lost := [name for name, is_lost in one["collapsed"].items() if is_lost]:
            lines[-1] += f"  no evidence, retained people lost too: {', '.join(lost)}"
    for one in found.get("perturbation", []):
        accuracy = {name: cell["accuracy"] for name, cell in one["figures"].items()}
        row("perturbation", f"{one['size']}/255, {one['on']}", accuracy, one["chance"])
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
    if said := requests_sentence(found["certificate"]):
        lines.append(said)
    return "\n".join(lines)
