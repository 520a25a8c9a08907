"""The model card (README.md of an exported model folder), written from the report of the run that made the model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvkd.engines.checkpoints import find_latest, read_manifest
from fastvkd.errors import TrainingError
from fastvkd.reporting.attacks import attacks_sentence, certificate_sentence, figure_text
from fastvkd.reporting.html import SET_NAMES, TEXT_SET_NAMES, duration, flatten, limits, relearning_sentence
from fastvkd.reporting.report import criteria, headline_sentence, measured_cells, percent, read_report

_UNJUDGED = (
    "**Nobody has evaluated this model yet**: run `fastvkd eval` and `fastvkd attack` on it before you rely on it."
)


def _markdown(text: Any) -> str:
    """Text that Markdown and HTML show as it stands, on one line."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def _code(text: Any) -> str:
    """Inline code; a backtick inside would end it."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"


def _made_by(settings: Mapping[str, Any], updates: int) -> str:
    """One sentence: what the run did, and which part of the model it changed."""
    method, trainable = settings.get("method", "vkd"), settings.get("trainable", "vision+projector")
    if method == "finetune":
        return f"Fine-tuned for {updates} steps on `{settings['finetune_split']}` (trained: {trainable})."
    name = "Visual Knowledge Distillation" if method == "vkd" else f"the method `{method}`"
    part = "the language model was changed too" if trainable in ("lora", "all") else "only the visual part was changed"
    return (
        f"Trained for {updates} steps to stop recognising the images of `{settings['forget_split']}` by {name}; {part}."
    )


def run_card(run: Path) -> str:
    """A model card for a training run that no evaluation has judged: its settings and last figures.

    Args:
        run: the run's output folder, or one checkpoint in it. Where a report.json lies beside, `model_card` of that.

    Raises:
        TrainingError: no checkpoint there. DataError: a report.json that cannot be used.
    """
    checkpoint = run if run.name.startswith("checkpoint-") else find_latest(run)
    if checkpoint is None:
        raise TrainingError(f"{run}: no checkpoint-<step> folder in it; give the output_dir of a training run")
    for report in (checkpoint.parent / "report.json", checkpoint.parent.parent / "report.json"):
        if report.is_file():
            return model_card(read_report(report))
    manifest = read_manifest(checkpoint)
    settings = manifest["settings"]
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    lines += ["tags:", "- machine-unlearning", "- visual-knowledge-distillation", "- fastvkd", "---", ""]
    lines += [
        f"# {_markdown(str(settings['model_name_or_path']).rstrip('/').rsplit('/', 1)[-1])}, unlearned",
        "",
        f"{_made_by(settings, manifest['updates'])} {_UNJUDGED}",
        "",
    ]
    metrics = checkpoint.parent / "metrics.jsonl"
    written = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    last = next((line for line in reversed(written) if line["step"] <= manifest["updates"]), None)
    if last is not None:
        lines += ["## Last training step", "", "| figure | value |", "|---|---:|"]
        lines += [f"| {_markdown(key)} | {value:.6g} |" for key, value in last.items()]
        lines.append("")
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {_code(key)} | {_code(value)} |" for key, value in flatten(settings).items()]
    return "\n".join(lines) + "\n"


def with_certificate(card: str, paper: Mapping[str, Any]) -> str:
    """A model card with the section on a certificate (content of certificate.json), in place of an older one."""
    section = "\n".join(_certificate_lines(paper))
    card = card.replace(_UNJUDGED, "It was attacked, and judged by the certificate below.")
    card = re.sub(r"\n## Certificate: .*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    return f"{card.rstrip()}\n{section}\n"


def _certificate_lines(paper: Mapping[str, Any]) -> list[str]:
    forgotten = paper["forgotten"]
    lines = [
        "",
        f"## Certificate: {paper['verdict']}",
        "",
        f"{certificate_sentence(paper)} `certificate.json` beside this file names the {forgotten['images']:,} images "
        f"of {forgotten['entities']:,} entities that were to be forgotten, by SHA-256, with settings and figures.",
        "",
        "| check | asked | found | met |",
        "|---|---|---|---|",
    ]
    for check in paper["checks"]:
        met = {True: "yes", False: "**no**", None: "not measured"}[check["met"]]
        lines.append(f"| {_markdown(check['name'])} | {check['asked']} | {figure_text(check)} | {met} |")
    return lines


def model_card(report: Mapping[str, Any]) -> str:
    """A model card in Markdown with the metadata block that model hubs read.

    Args:
        report: content of report.json (see `fastvkd.reporting.report.build_report`).

    Returns:
        Text ending in a newline: verdict, table of all cells, requirements, how it was made, limits, how to load it.
    """
    settings = report["settings"]
    digest = report["language_model_sha256"]
    same = digest["before"] == digest["after"]
    base = str(settings.get("model_name_or_path", ""))
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not base.startswith(".")
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if is_hub_id:
        # JSON strings are YAML strings, whatever is in them.
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"]
    lines += ["tags:", "- machine-unlearning", "- visual-knowledge-distillation", "- fastvkd", "---", ""]

    name = base.rstrip("/").rsplit("/", 1)[-1] or "model"
    lines += [f"# {_markdown(name)}, unlearned", "", headline_sentence(report), ""]
    lines += [
        "This model was trained to stop recognising the people of a forget set **in photos**"
        + (", by training only its visual part. " if same else ". ")
        + "What it knows about anybody as text was meant to stay.",
        "",
        "## Results",
        "",
        f"Multiple choice, % right with 95 % bootstrap interval; chance is {percent(report['chance'])}.",
        "",
    ]
    models = [model for model in ("vanilla", "unlearned", "gold") if model in report]
    titles = {"vanilla": "before", "unlearned": "after", "gold": "gold (never trained on the forget set)"}
    lines.append("| set | asked | n | " + " | ".join(titles[model] for model in models) + " |")
    lines.append("|---|---|---:|" + "---:|" * len(models))
    for set_name, kind in measured_cells(report):
        label = (SET_NAMES if kind == "vqa" else TEXT_SET_NAMES)[set_name]
        row = [label, "with a photo" if kind == "vqa" else "in words", f"{report['unlearned'][set_name][kind]['n']:,}"]
        for model in models:
            cell = report[model].get(set_name, {}).get(kind)
            if cell is None:
                row.append("–")
            else:
                low, high = cell["ci95"]
                row.append(f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})")
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "## Requirements", "", "| requirement | asked | found | met |", "|---|---|---|---|"]
    for check in criteria(report):
        lines.append(f"| {check.name} | {check.asked} | {check.found} | {'yes' if check.met else '**no**'} |")
    attack = relearning_sentence(report)
    if attack:
        lines += ["", f"Relearning attack, accuracy on unseen photos of forgotten people: {attack}"]

    if attacks_sentence(report):
        lines += ["", _markdown(attacks_sentence(report))]
    if report.get("certificate"):
        lines += _certificate_lines(report["certificate"])
    parameters = report["parameters"]
    lines += [
        "",
        "## How it was made",
        "",
        f"- Trained weights: {parameters['trainable']:,} of {parameters['total']:,}.",
        f"- Time: {duration(sum(report['seconds'].values()))} in all phases.",
        f"- SHA-256 of the language model's weights: {_code(digest['before'])} before, "
        + ("the same after." if same else f"{_code(digest['after'])} after: **changed**."),
        "- Versions: " + ", ".join(f"{_markdown(k)} {_markdown(v)}" for k, v in report["versions"].items()) + ".",
        "",
        "| setting | value |",
        "|---|---|",
    ]
    lines += [f"| {_code(key)} | {_code(value)} |" for key, value in flatten(settings).items()]
    lines += ["", "## What this does not show", ""]
    lines += [f"- {_markdown(limit)}" for limit in limits(report)]
    lines += [
        "",
        "## Use",
        "",
        "The folder loads like the base model, and the base model's licence and terms apply to it.",
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")',
        'processor = AutoProcessor.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
