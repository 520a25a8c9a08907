"""Evaluate a model folder on a data folder: what `fastvkd eval` calls."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastvkd.data.hub import data_folder
from fastvkd.data.sources import evaluation_cells, reader_of, reference_strangers
from fastvkd.data.texts import refuse_marks
from fastvkd.engines.exporting import read_record, settings_of
from fastvkd.engines.requests import judged, requests_of
from fastvkd.errors import DataError, FastVKDError, ModelError, SettingsError
from fastvkd.evaluation.comparison import LMMS_PART
from fastvkd.evaluation.divergence import Samples, answer_distance, asked, option_divergence, scored_choices
from fastvkd.evaluation.lmms import lmms_figures
from fastvkd.evaluation.modality_pairs import joint_figures
from fastvkd.evaluation.people import examine, likeness
from fastvkd.evaluation.protocol import OnProgress, logged_samples
from fastvkd.evaluation.truth_ratio import forget_quality, model_utility
from fastvkd.files import held, read_json_object, write_atomically
from fastvkd.models.folder import identify_base, local_folder
from fastvkd.models.loading import load_processor
from fastvkd.models.placement import Loading, loading_of
from fastvkd.models.processing import special_tokens
from fastvkd.models.steering import attach, load_steering
from fastvkd.options import EvalOptions
from fastvkd.records import Profile

log = logging.getLogger("fastvkd")

RESULTS, SAMPLES = "results.json", "samples.jsonl"
# What else than config.json and weights decides in a model folder which tokens a prompt becomes and which come out.
_TEXT_FILES = (
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*token*.json",
    "*vocab*",
    "merges.txt",
    "*.model",
    "generation_config.json",
)


def evaluate(options: EvalOptions, progress: OnProgress | None = None) -> dict[str, Any]:
    """What the model knows: `benchmark`, `mode`, `seed`, `model`, its fingerprint, `made_by` (what `export` noted of
    the run that made it, or None), `requests` (those that it has met, and of which this forget set speaks), `data`, the
    splits, and
    - `loading`: dtype, quantize and device_map, see `Loading.described`; `max_pixels` of a photo, or None;
    - `cells`: the figures of every cell and kind, see `evaluate_cells`;
    - the figures person by person that the data allow, see `examine`. `original` is the model before unlearning; by
      default the one that `made_by` names, and of a model that nothing made it is the model itself;
    - `summary`: of CLEAR `model_utility`; of UMU-Bench the joint figures of every cell; and with `reference_eval` (the
      folder of the same evaluation of a model that never saw the forget set) CLEAR's `forget_quality` and, where both
      are in corrected mode, of every cell the divergence of the choices, `js_vqa` and `js_qa`, and the distance of the
      right answers' likelihoods, `answer_ks_vqa`, `answer_js_vqa` and the same of `qa`.

    The result is written to `out` as results.json, beside samples.jsonl. Finished cells found there for the same model,
    dtype, processor, steering and settings are not computed again. Splits that are not named are those of the run that
    the model was exported from, else the defaults of `Settings`.

    Where the benchmark is `lmms:TASK,...`, results.json keeps what it holds of this model, and has beside it what
    lmms-eval measured, as `lmms_eval` (see `lmms_figures`). Raises FastVKDError.
    """
    with held(options.out, "--out"):
        return _evaluate(options, progress) if options.lmms is None else _with_lmms(options, progress)


def _with_lmms(options: EvalOptions, progress: OnProgress | None) -> dict[str, Any]:
    """results.json of this model, as it is, with the part that lmms-eval measured, in place of an earlier such part."""
    fingerprint = identify_base(local_folder(options.model)).fingerprint
    earlier = _earlier(options.out / RESULTS)
    if earlier.get("model_fingerprint", fingerprint) != fingerprint or earlier.get("steering"):
        raise DataError(f"{options.out / RESULTS}: figures of another model; give another --out")
    results = {"model": options.model, "model_fingerprint": fingerprint} | earlier
    results[LMMS_PART] = lmms_figures(options, progress)
    write_atomically(options.out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _of_lmms(options: EvalOptions, fingerprint: str) -> dict[str, Any]:
    """What lmms-eval measured of this model before, as it stands in results.json."""
    earlier: dict[str, Any] = {}
    if options.steering is None:
        with contextlib.suppress(FastVKDError):  # what is damaged is written anew
            earlier = _earlier(options.out / RESULTS)
    same = LMMS_PART in earlier and earlier.get("model_fingerprint") == fingerprint
    return {LMMS_PART: earlier[LMMS_PART]} if same else {}


def _earlier(file: Path) -> dict[str, Any]:
    return read_json_object(file, DataError, "delete it, or give another --out") if file.is_file() else {}


def _evaluate(options: EvalOptions, progress: OnProgress | None) -> dict[str, Any]:
    folder = str(data_folder(options.data, local_files_only=options.local_files_only))
    benchmark = reader_of(folder, options.benchmark).NAME
    reference = None if options.reference_eval is None else _reference(benchmark, options.mode, options.reference_eval)
    local = local_folder(options.model)
    record = read_record(local)
    made_by = settings_of(record)
    forget_split = options.forget_split or made_by["forget_split"]
    retain_split = options.retain_split or made_by["retain_split"]
    cells = evaluation_cells(folder, forget_split, retain_split)
    max_pixels = options.max_pixels or made_by.get("max_pixels")
    processor = load_processor(options.model, max_pixels=max_pixels)
    refuse_marks((profile for cell in cells.values() for profile in cell), special_tokens(processor))
    loading = loading_of(options, local)
    model, fingerprint = _load(options, local, loading, max_pixels)
    samples: list[dict[str, Any]] = []
    same: dict[str, Any] = {
        "benchmark": benchmark,
        "mode": options.mode,
        "seed": options.seed,
        "max_samples": options.max_samples,
    }
    made_of = None if record is None else made_by["model_name_or_path"]
    figures, people = examine(
        model,
        processor,
        cells,
        likeness=_likeness(options, made_of, loading, model, processor, cells),
        reference=reference_strangers(folder),
        batch_size=options.batch_size,
        log_path=options.out / SAMPLES,
        progress=progress,
        fingerprint=fingerprint,
        collect=samples,
        **same,
    )
    results = {
        **same,
        "model": options.model,
        "model_fingerprint": (told := identify_base(local).fingerprint),
        "loading": loading.described(),
        "max_pixels": max_pixels,
        "made_by": record,
        "requests": judged(requests_of(local), cells["forget"]),
        "steering": None if options.steering is None else str(options.steering),
        "data": options.data,
        "forget_split": forget_split,
        "retain_split": retain_split,
        "cells": figures,
        **people,
        "summary": _summary(benchmark, figures, samples, reference, options),
        **_of_lmms(options, told),
    }
    write_atomically(options.out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def _load(options: EvalOptions, folder: Path, loading: Loading, max_pixels: int | None) -> tuple[nn.Module, str]:
    """The model, steered where that is asked for, and the fingerprint of all that decides its answers."""
    model = loading.model(options.model)
    fingerprint = answers_fingerprint(folder, loading, max_pixels)
    if options.steering is not None:
        attach(model, load_steering(options.steering))
        fingerprint += hashlib.sha256(options.steering.read_bytes()).hexdigest()
    return model, fingerprint


def _likeness(
    options: EvalOptions,
    made_of: str | None,
    loading: Loading,
    model: nn.Module,
    processor: Any,
    cells: dict[str, list[Profile]],
) -> dict[str, float] | None:
    """How like the forgotten each retained person is to the model before unlearning, of which no more is loaded than
    leads to the LLM; None where the one that the run started from is not at hand."""
    if options.original is None and made_of is None:
        return likeness(model, processor, cells)
    try:
        folder = local_folder(options.original or made_of or "")
        original = loading.visual_part(folder)
    except ModelError as error:
        if options.original is not None:
            raise
        log.warning("retain_by_likeness is left out, name the model before unlearning with --original: %s", error)
        return None
    return likeness(original, processor, cells)


def _summary(
    benchmark: str, figures: dict[str, Any], samples: Samples, reference: Samples | None, options: EvalOptions
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if benchmark == "clear":
        summary = model_utility(figures)
    elif benchmark == "umu":
        summary = joint_figures(samples, options.seed)
    if reference is None:
        return summary
    if benchmark == "clear":
        mine, others = _forget_truth(samples), _forget_truth(reference)
        _refuse_other_samples(_truths(mine), _truths(others), options.reference_eval)
        summary |= forget_quality(mine, others, options.mode)
    choices, theirs = scored_choices(samples), scored_choices(reference)
    for part in choices.keys() & theirs.keys():
        _refuse_other_samples(asked(choices[part]), asked(theirs[part]), options.reference_eval)
    for cell, divergences in option_divergence(choices, theirs, options.seed).items():
        summary[cell] = summary.get(cell, {}) | divergences
    for cell, distances in answer_distance(choices, theirs).items():
        summary[cell] |= distances
    return summary


def answers_fingerprint(folder: Path, loading: Loading, max_pixels: int | None = None) -> str:
    """Of everything in a model folder, in how it is loaded, and in how it sees photos, that decides what it answers."""
    rounded = f" {loading.quantize}" if loading.quantize else ""
    facts = f"{identify_base(folder).fingerprint} {loading.dtype}{rounded} {text_files_sha256(folder)}"
    facts += "" if max_pixels is None else f" {max_pixels}"
    return hashlib.sha256(facts.encode()).hexdigest()


def text_files_sha256(folder: Path) -> str:
    """Of the files that make a model's processor: tokenizer, templates, preprocessing."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _TEXT_FILES for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f" {file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _reference(benchmark: str, mode: str, folder: str | Path) -> Samples:
    """The logged samples of another evaluation, if they hold what this one can be compared by."""
    if benchmark != "clear" and mode == "paper":
        raise SettingsError(
            f"reference_eval: {benchmark} in paper mode has no likelihoods to compare; use mode=corrected"
        )
    logged = Path(folder) / SAMPLES
    mend = "give the --out folder of an evaluation of the model that never saw the forget set"
    try:
        lines = logged_samples(logged, mend, _needed)
    except DataError as error:
        raise DataError(f"reference_eval: {error}") from error
    if benchmark == "clear" and not _forget_truth(lines):
        raise DataError(f"reference_eval: {logged} holds no truth ratios of a forget set; evaluate it on CLEAR first")
    if benchmark != "clear" and not scored_choices(lines):
        raise DataError(
            f"reference_eval: {logged} holds no likelihoods of options; evaluate it in corrected mode first"
        )
    return lines


def _needed(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a sample that another evaluation is compared with."""
    if sample.get("task") == "truth":
        return ("entity", "answer")
    return ("kind", "entity", "question", "options", "answer") if "log_likelihood" in sample else ()


def _refuse_other_samples(mine: Collection[Any], reference: Collection[Any], folder: str | Path | None) -> None:
    if mine != reference:
        raise DataError(
            f"reference_eval: {folder} is an evaluation of other samples ({len(set(mine) & set(reference))} of "
            f"{len(set(mine))} in common); evaluate it with the same forget_split, max_samples and seed"
        )


def _truths(samples: Samples) -> set[tuple[str, str]]:
    return {(sample["entity"], sample["answer"]) for sample in samples}


def _forget_truth(samples: Samples) -> Samples:
    return [sample for sample in samples if (sample.get("task"), sample.get("cell")) == ("truth", "forget")]
