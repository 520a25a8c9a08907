"""The model card (README.md of an exported model folder), written from the report of the run that made the model."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastvkd.engines.checkpoints import find_latest
from fastvkd.engines.exporting import history_of
from fastvkd.engines.manifests import read_manifest
from fastvkd.errors import TrainingError
from fastvkd.files import json_lines
from fastvkd.methods import method_of
from fastvkd.reporting.html import TEMPLATES
from fastvkd.reporting.report import cells_of, models_of, read_report
from fastvkd.reporting.sentences import limits
from fastvkd.reporting.stranger import not_measured
from fastvkd.reporting.verdict import criteria, headline_sentence
from fastvkd.reporting.words import flatten

_UNJUDGED = (
    "**Nobody has evaluated this model yet**: run `fastvkd eval` and `fastvkd attack` on it before you rely on it."
)
_MODELS = {"vanilla": "before", "unlearned": "after", "gold": "gold (never trained on the forget set)"}


def _markdown(text: Any) -> Markup:
    """Text that Markdown and HTML show as it stands, on one line."""
    if isinstance(text, Markup):
        return text
    line = re.sub(r"[^\S\N{NO-BREAK SPACE}]+", " ", str(text)).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line))


def _code(text: Any) -> Markup:
    """Inline code; a backtick inside would end it."""
    return Markup("`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`")


# Every value is escaped as the page's are, but for Markdown. A cache of its own, since it compiles templates otherwise.
_CARDS = TEMPLATES.overlay(finalize=_markdown, keep_trailing_newline=True)
_CARDS.filters = TEMPLATES.filters | {
    "code": _code,
    "json": lambda text: Markup(json.dumps(text)),
    "headline_sentence": headline_sentence,
    "not_measured": not_measured,
}


def _name_of(settings: Mapping[str, Any]) -> str:
    return str(settings.get("model_name_or_path", "")).rstrip("/").rsplit("/", 1)[-1] or "model"


def run_card(run: Path, base: Path | None = None) -> str:
    """A model card for a training run that no evaluation has judged: its settings and last figures.

    Args:
        run: the run's output folder, or one checkpoint in it. Where a report.json of this very run lies beside,
            `model_card` of that.
        base: the base model's folder, if it moved since; what it was made to forget before is told too.

    Raises:
        TrainingError: no checkpoint there. DataError: a report.json that cannot be used. ModelError: the record of the
        base cannot be read.
    """
    checkpoint = run if run.name.startswith("checkpoint-") else find_latest(run)
    if checkpoint is None:
        raise TrainingError(f"{run}: no checkpoint-<step> folder in it; give the output_dir of a training run")
    manifest = read_manifest(checkpoint)
    settings = manifest["settings"]
    history = history_of(base or Path(manifest["base_model"]["path"]))
    for file in (checkpoint.parent / "report.json", checkpoint.parent.parent / "report.json"):
        if file.is_file() and (report := read_report(file))["settings"] == settings:
            return model_card(report, history)
    metrics = checkpoint.parent / "metrics.jsonl"
    mend = "delete the damaged line"
    written = [line for _, line in json_lines(metrics, TrainingError, mend)] if metrics.is_file() else []
    return _CARDS.get_template("card/run.md").render(
        hub_id=None,
        name=_name_of(settings),
        settings=settings,
        method=method_of(settings),
        trainable=settings.get("trainable", "vision+projector"),
        updates=manifest["updates"],
        unjudged=Markup(_UNJUDGED),
        last=next((line for line in reversed(written) if line["step"] <= manifest["updates"]), None),
        everything=flatten(settings),
        history=history,
    )


def with_certificate(card: str, paper: Mapping[str, Any]) -> str:
    """A model card with the section on a certificate (content of certificate.json), in place of an older one."""
    section = _CARDS.get_template("card/certificate.md").render(paper=paper).strip("\n")
    card = card.replace(_UNJUDGED, "It was attacked, and judged by the certificate below.")
    card = re.sub(r"\n## Certificate: .*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    return f"{card.rstrip()}\n\n{section}\n"


def model_card(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> str:
    """A model card in Markdown with the metadata block that model hubs read.

    Args:
        report: content of report.json (see `fastvkd.reporting.report.build_report`).
        history: of the base model, see `fastvkd.engines.exporting.history_of`.

    Returns:
        Text ending in a newline: verdict, table of all cells, requirements, how it was made, limits, how to load it.
    """
    base, digest = str(report["settings"].get("model_name_or_path", "")), report["language_model_sha256"]
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not base.startswith(".")
    return _CARDS.get_template("card/report.md").render(
        report=report,
        hub_id=base if is_hub_id else None,
        name=_name_of(report["settings"]),
        digest=digest,
        same=digest["before"] == digest["after"],
        models={model: _MODELS[model] for model in models_of(report)},
        cells=cells_of(report),
        checks=criteria(report),
        everything=flatten(report["settings"]),
        limits=limits(report),
        history=history,
    )
