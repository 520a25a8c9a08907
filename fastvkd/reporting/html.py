"""report.html: the run as one self-contained page that a browser shows without a network and without scripts."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastvkd import __version__
from fastvkd.files import write_atomically
from fastvkd.reporting import sentences, words
from fastvkd.reporting.sections import SECTIONS, Page
from fastvkd.reporting.verdict import headline_sentence

_HEADS = {"vanilla": "Before", "unlearned": "After", "gold": "Gold"}

TEMPLATES = Environment(
    loader=PackageLoader("fastvkd.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "head": _HEADS.__getitem__,
    "weights": sentences.WEIGHTS.__getitem__,
    "attack_kind": lambda kind: sentences.ATTACK_KINDS.get(kind, kind),
    **{
        function.__name__: function
        for function in (
            words.bound,
            words.duration,
            words.percent,
            words.points,
            words.points_change,
            words.set_name,
            words.signed,
            sentences.attacks_sentence,
            sentences.certificate_sentence,
            sentences.requests_sentence,
            sentences.figure_text,
            sentences.probe_sentence,
            sentences.rank_sentence,
            sentences.relearning_sentence,
            sentences.variant_name,
        )
    },
}


def write_html(
    report: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    training_log: Sequence[Mapping[str, Any]] | None,
    path: str | os.PathLike[str],
    missing: Sequence[str] = (),
    people: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page of one run, atomically.

    Args:
        report: content of report.json (see `fastvkd.reporting.report.build_report`), of which any part may be missing.
        examples: `{"group": "forget"|"test"|"retain"|"realworld", "image_png": PNG bytes, "name", "question", "truth",
            "before", "after"}`: the model's raw answers before and after unlearning, one of which may be missing.
        training_log: rows of metrics.jsonl: `step`, `loss`, `loss_forget`, `loss_retain` (any `loss_*`), `grad_norm`,
            `images_per_second`. Missing or non-finite values are left out. None where there is no log.
        path: the file to write.
        missing: names of what could not be shown, said at the top of the page.
        people: `{"entity", "stranger": whether it is one, "name", "question", "said": {model: raw answer}, "image_png"
            (may be missing)}` of every forgotten person, and of a stranger.

    Raises:
        TrainingError: the file cannot be written.
        ValueError: an example has an unknown group, or an image is not a PNG.
    """
    write_atomically(path, render(report, examples, training_log, missing, people).encode())


def render(
    report: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    training_log: Sequence[Mapping[str, Any]] | None,
    missing: Sequence[str] = (),
    people: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text; arguments as in `write_html`."""
    page = Page(report, examples, training_log, missing, people)
    return TEMPLATES.get_template("page.html").render(
        title=headline_sentence(report),
        model=words.model_name(report.get("settings", {})),
        sections=[section(name, page) for name in SECTIONS],
        version=report.get("versions", {}).get("fastvkd", __version__),
        files="schema_version" in report,
    )


def section(name: str, page: Page) -> Markup:
    """One section of the page; empty where `page` holds nothing for it."""
    shown = SECTIONS[name](page)
    if shown is None:
        return Markup()
    return Markup(TEMPLATES.get_template(f"sections/{name}").render(report=page.report, **shown))
