"""report.html: the run as one self-contained page that a browser shows without a network and without scripts."""

import base64
import math
import os
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastvkd.reporting import svg
from fastvkd.reporting.attacks import (
    attacks_sentence,
    certificate_section,
    membership_section,
    probe_section,
    questions_section,
)
from fastvkd.reporting.report import (
    chance_band,
    criteria,
    headline,
    headline_sentence,
    kept_visual,
    measured_cells,
    percent,
    percent_change,
    points,
    text_accuracy,
    write_atomically,
)
from fastvkd.reporting.stylesheet import CSS

SET_NAMES = {
    "forget": "Forgotten, known photos",
    "test": "Forgotten, unseen photos",
    "retain": "Retained",
    "realworld": "Real world",
}
# What is asked in words alone is not about photos, so the sets are named by whom they are about.
TEXT_SET_NAMES = SET_NAMES | {"forget": "Forgotten people", "test": "Forgotten people, test set"}
SET_COLOURS = {"forget": "forget", "test": "forget", "retain": "retain", "realworld": "retain"}
GROUPS = {
    "forget": ("Forgotten people", "Photos that were used for unlearning. The right answer should be gone."),
    "test": ("The same people, unseen photos", "Photos that unlearning never saw. The right answer should be gone."),
    "retain": ("Retained people", "The right answer should still be there."),
    "realworld": ("Real world", "In neither the forget nor the retain set. The right answer should still be there."),
}
# One line of the page never loads anything: a browser refuses every request and every script, whatever the text holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_html(
    report: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    training_log: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
) -> None:
    """Write the page of one run, atomically.

    Args:
        report: content of report.json (see `fastvkd.reporting.report.build_report`).
        examples: `{"group": "forget"|"test"|"retain"|"realworld", "image_png": PNG bytes, "name", "question", "truth",
            "before", "after"}`: the model's raw answers before and after unlearning.
        training_log: rows of metrics.jsonl: `step`, `loss`, `loss_forget`, `loss_retain` (any `loss_*`), `grad_norm`,
            `images_per_second`. Missing or non-finite values are left out.
        path: the file to write.

    Raises:
        TrainingError: the file cannot be written.
        ValueError: an example has an unknown group or an image that is not a PNG.
    """
    write_atomically(path, render(report, examples, training_log).encode())


def render(
    report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], training_log: Sequence[Mapping[str, Any]]
) -> str:
    """The page as text; arguments as in `write_html`."""
    sections = [
        _top(report),
        _gallery(examples),
        _tables(report),
        _trade_off(report),
        _training(training_log, report["settings"]),
        _relearning(report),
        questions_section(report),
        membership_section(report),
        probe_section(report),
        certificate_section(report),
        _settings(report),
        _limits(report),
    ]
    title = escape(headline_sentence(report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="description" content="{title}">\n'
        f"<title>Unlearning report: {escape(_model_name(report))}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}{_footer(report)}</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------- words


def _model_name(report: Mapping[str, Any]) -> str:
    """The model as a reader knows it: a hub id, or the last two parts of a local folder."""
    parts = Path(str(report["settings"].get("model_name_or_path") or "model")).parts
    return "/".join(part for part in parts[-2:] if part != "/")


def _bound(fraction: float) -> str:
    """An end of an interval: as `points`, but '100' for '100.0', which leaves room for the other end on a phone."""
    return points(fraction).replace("100.0", "100")


def _change(before: float, after: float) -> str:
    # From the rounded figures, so that the table adds up.
    difference = round(100 * after, 1) - round(100 * before, 1)
    if abs(difference) < 0.05:
        return "0.0"
    return f"{'+' if difference > 0 else '−'}{abs(difference):.1f}"


def duration(seconds: float) -> str:
    """'8.4 s', '4 min 32 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(count: float) -> str:
    """'1.9 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _phase(name: str) -> str:
    return name.replace("_", " ").capitalize()


# ----------------------------------------------------------------------------------------------------- sections


def _top(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    facts = [_model_name(report)]
    if settings.get("method"):
        facts.append(f"method {settings['method']}")
    if settings.get("seed") is not None:
        facts.append(f"seed {settings['seed']}")
    clauses = [
        f'{escape(clause.text)} <span class="figures {clause.topic}">({escape(clause.figures)})</span>'
        for clause in headline(report)
    ]
    sentence = "The model " + ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."
    return (
        f'<header><p class="kicker">Unlearning report · {escape(" · ".join(facts))}</p>\n<h1>{sentence}</h1></header>\n'
        f'<div class="keys">{_key_figures(report)}</div>\n{_criteria(report)}'
    )


def _key_figures(report: Mapping[str, Any]) -> str:
    cells = measured_cells(report)

    def vqa(name: str) -> tuple[float, float]:
        return report["vanilla"][name]["vqa"]["accuracy"], report["unlearned"][name]["vqa"]["accuracy"]

    def beside(name: str, label: str) -> str:
        before, after = vqa(name)
        return f"{label}: {percent_change(before, after)}."

    notes = {"forget": f"The dashed line is chance, {percent(report['chance'])}.", "retain": ""}
    if ("test", "vqa") in cells:
        notes["forget"] = beside("test", "In photos that unlearning never saw") + " " + notes["forget"]
    if ("realworld", "vqa") in cells:
        notes["retain"] = beside("realworld", "Real world")
    blocks = [
        _key("forget", "Forgotten people, right from a photo", *vqa("forget"), report["chance"], notes["forget"]),
        _key("retain", "Retained people, right from a photo", *vqa("retain"), report["chance"], notes["retain"]),
    ]
    before_text, after_text = (text_accuracy(report, model) for model in ("vanilla", "unlearned"))
    if before_text is not None and after_text is not None:
        note = "All sets together, asked in words without a photo."
        if ("forget", "qa") in cells:
            forgotten = percent(report["unlearned"]["forget"]["qa"]["accuracy"])
            note += f" About the forgotten people: {forgotten} right after."
        blocks.append(_key("text", "Text knowledge", before_text, after_text, report["chance"], note))
    return "".join(blocks)


def _key(css: str, label: str, before: float, after: float, chance: float, note: str) -> str:
    strip = svg.strip(
        before,
        after,
        chance=chance,
        css=css,
        description=f"{label}: {percent_change(before, after)}, chance {percent(chance)}",
    )
    was, arrow, now = percent_change(before, after).partition("\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
    return (
        f'<div class="key {css}"><h3>{escape(label)}</h3><p class="big"><span class="from">{was}{arrow}</span>'
        f'<span class="to">{now}</span></p>{strip}<p class="note">{escape(note)}</p></div>'
    )


def _criteria(report: Mapping[str, Any]) -> str:
    checks = criteria(report)
    items = []
    for check in checks:
        sign = '<span class="yes">✓</span>' if check.met else '<span class="no">✗</span>'
        items.append(
            f'<li>{sign}<span>{escape(check.name)}<span class="sr">: {"met" if check.met else "not met"}</span></span>'
            f"<b>{escape(check.found)}</b>"
            f'<span class="asked">asked: {escape(check.asked)}</span></li>'
        )
    met = sum(check.met for check in checks)
    return (
        f'<p class="criteria-title">{met} of {len(checks)} requirements met</p>\n'
        f'<ul class="criteria">{"".join(items)}</ul>\n'
    )


def _gallery(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    for i, example in enumerate(examples):
        if example["group"] not in GROUPS:
            raise ValueError(f"examples[{i}]: group {example['group']!r}, expected one of {', '.join(GROUPS)}")
    groups = []
    for group, (name, explanation) in GROUPS.items():
        cards = [_card(example, f"examples[{i}]") for i, example in enumerate(examples) if example["group"] == group]
        if cards:
            groups.append(
                f'<div class="group"><h3>{escape(name)}</h3><p class="note">{escape(explanation)}</p>'
                f'<div class="cards">{"".join(cards)}</div></div>'
            )
    return (
        "<section><h2>What the model says</h2><p>The same photo and the same question, before and after unlearning. "
        '<span class="yes">✓</span> marks the right answer, <span class="no">✗</span> a wrong one.</p>'
        f"{''.join(groups)}</section>\n"
    )


def is_right(answer: str, truth: str) -> bool:
    """Whether the answer holds the truth as whole words, ignoring case and punctuation."""

    def words(text: str) -> str:
        return " " + " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split()) + " "

    return bool(words(truth).strip()) and words(truth) in words(answer)


def _card(example: Mapping[str, Any], where: str) -> str:
    png: bytes = example["image_png"]
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{where}: image_png is not a PNG file (it begins with {png[:8]!r})")
    width, height = struct.unpack(">II", png[16:24])
    data = base64.b64encode(png).decode("ascii")
    # Enlarging a face of 48 pixels smoothly would only blur it.
    small = ' class="small"' if max(width, height) <= 128 else ""
    name = escape(str(example["name"]))
    rows = []
    for label, key in (("Before", "before"), ("After", "after")):
        answer = str(example[key]).strip()
        right = is_right(answer, str(example["truth"]))
        sign = '<span class="yes">✓</span><span class="sr"> right</span>'
        if not right:
            sign = '<span class="no">✗</span><span class="sr"> wrong</span>'
        rows.append(f'<dt>{label}</dt><dd class="mark">{escape(answer) or "(nothing)"}&nbsp;{sign}</dd>')
    rows.append(f"<dt>Truth</dt><dd>{escape(str(example['truth']))}</dd>")
    return (
        f'<figure class="card"><img{small} src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="Photo of {name}"><p class="name">{name}</p><p class="question">{escape(str(example["question"]))}</p>'
        f"<dl>{''.join(rows)}</dl></figure>"
    )


def _tables(report: Mapping[str, Any]) -> str:
    gold = "gold" in report
    columns = 4 + gold
    rows = []
    for kind, title in (("vqa", "Asked with a photo"), ("qa", "Asked in words, no photo")):
        sets = [name for name, k in measured_cells(report) if k == kind]
        if sets:
            rows.append(
                f'<tr class="head"><th scope="colgroup" colspan="{columns}">{title}</th>'
                '<th class="strip-cell"></th></tr>'
            )
        rows += [_accuracy_row(report, name, kind) for name in sets]
    explanation = (
        "Multiple choice, percent right; below each figure its 95 % bootstrap interval, below each set the number of "
        "questions. The change is in percentage points."
    )
    if gold:
        explanation += " Gold is a model trained the same way but never shown the forgotten people: the ideal."
    tables = (
        f'<table><thead><tr><th scope="col">Accuracy, %</th>{_heads(gold)}<th class="strip-cell" scope="col">'
        f'<span class="scale" aria-hidden="true"><span>0</span><span>50</span><span>100</span></span></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    open_questions = [
        _metric_table(report, key, title)
        for key, title in (("rouge_l", "Free answers: ROUGE-L × 100"), ("cloze", "Fill the blank: % right"))
    ]
    others = "".join(table for table in open_questions if table)
    return (
        f"<section><h2>Every figure</h2><p>{explanation}</p>{tables}"
        + (f'<div class="pair">{others}</div>' if others else "")
        + "</section>\n"
    )


def _heads(gold: bool) -> str:
    heads = '<th scope="col">Before</th><th scope="col">After</th><th scope="col" class="change">Change</th>'
    return heads + ('<th scope="col">Gold</th>' if gold else "")


def _set_name(name: str, kind: str) -> str:
    return (SET_NAMES if kind == "vqa" else TEXT_SET_NAMES)[name]


def _accuracy_row(report: Mapping[str, Any], name: str, kind: str) -> str:
    vanilla, unlearned = report["vanilla"][name][kind], report["unlearned"][name][kind]
    chance = report["chance"]

    def cell(model: str, css: str = "") -> str:
        value = report[model].get(name, {}).get(kind)
        if value is None:
            return "<td>–</td>"
        low, high = value["ci95"]
        return f'<td class="{css}">{points(value["accuracy"])}<small>{_bound(low)}–{_bound(high)}</small></td>'

    label = _set_name(name, kind)
    strip = svg.strip(
        vanilla["accuracy"],
        unlearned["accuracy"],
        chance=chance,
        css=SET_COLOURS[name] if kind == "vqa" else "text",
        interval=tuple(unlearned["ci95"]),
        description=f"{label}: {points(vanilla['accuracy'])}% before, {points(unlearned['accuracy'])}% after",
    )
    return (
        f'<tr><th scope="row">{escape(label)}<small>n = {unlearned["n"]:,}</small></th>{cell("vanilla")}'
        f"{cell('unlearned', 'after')}<td>{_change(vanilla['accuracy'], unlearned['accuracy'])}</td>"
        f"{cell('gold') if 'gold' in report else ''}"
        f'<td class="strip-cell">{strip}</td></tr>'
    )


def _metric_table(report: Mapping[str, Any], key: str, title: str) -> str:
    rows = []
    for kind, heading in (("vqa", "With a photo"), ("qa", "In words")):
        body = []
        for name, k in measured_cells(report):
            before, after = report["vanilla"][name][k][key], report["unlearned"][name][k][key]
            if k != kind or before is None or after is None:
                continue
            gold = ""
            if "gold" in report:
                value = report["gold"].get(name, {}).get(k, {}).get(key)
                gold = "<td>–</td>" if value is None else f"<td>{points(value)}</td>"
            body.append(
                f'<tr><th scope="row">{escape(_set_name(name, kind))}</th><td>{points(before)}</td>'
                f'<td class="after">{points(after)}</td><td>{_change(before, after)}</td>{gold}</tr>'
            )
        if body:
            rows.append(f'<tr class="head"><th scope="colgroup" colspan="{4 + ("gold" in report)}">{heading}</th></tr>')
            rows += body
    if not rows:
        return ""
    return (
        f'<table><thead><tr><th scope="col">{escape(title)}</th>{_heads("gold" in report)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _trade_off(report: Mapping[str, Any]) -> str:
    marks = []
    looks = {"vanilla": ("before", "grey", "circle"), "unlearned": ("unlearned", "ink", "circle")}
    looks["gold"] = ("gold", "gold", "diamond")
    for model, (label, css, shape) in looks.items():
        if model in report:
            forget, retain = report[model]["forget"]["vqa"], report[model]["retain"]["vqa"]
            marks.append(
                svg.Point(
                    label,
                    forget["accuracy"],
                    retain["accuracy"],
                    css,
                    shape,
                    tuple(forget["ci95"]),
                    tuple(retain["ci95"]),
                )
            )
    for other in report.get("comparison", []):
        marks.append(svg.Point(other["name"], other["forget"], other["retain"], "grey", "square"))
    chance = report["chance"]
    band, share = chance_band(report), kept_visual(report)
    goal = (chance - band, chance + band, share * report["vanilla"]["retain"]["vqa"]["accuracy"])
    description = "Forgotten against retained visual accuracy: " + "; ".join(
        f"{p.label} {points(p.x)}% and {points(p.y)}%" for p in marks
    )
    charts = "".join(
        svg.scatter_chart(
            marks,
            x_label="forgotten people, % right",
            y_label="retained people, % right",
            description=description,
            chance=chance,
            goal=goal,
            arrow=(0, 1),
            width=width,
            height=height,
            css=f"chart {css}",
        )
        for css, width, height in (("wide", 700, 400), ("narrow", 350, 330))
    )
    more = " Squares are the same task solved by other methods." if report.get("comparison") else ""
    return (
        "<section><h2>What forgetting cost</h2><p>Each point is a model. Good unlearning moves straight left, to "
        "chance, and loses no height: guessing about the forgotten people, unchanged about the rest.</p>"
        f"<figure>{charts}<figcaption>Accuracy of multiple-choice questions with a photo (known photos of the "
        "forgotten people). Lines through a point: 95 % intervals. "
        f"Shaded: within {100 * band:.3g} points of chance, and at least {100 * share:.3g} % of the "
        f"retained accuracy before.{more}</figcaption></figure></section>\n"
    )


LOSS_COLOURS = {"loss": "grey", "loss_forget": "forget", "loss_retain": "retain"}
LOSS_NAMES = {"loss": "total", "loss_forget": "forget", "loss_retain": "retain"}


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite `key`."""
    found = []
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and "step" in row:
            found.append((float(row["step"]), float(value)))
    return found


# What the forget term does, by `forget_target`, completing "The forget term ...".
FORGET_TERMS = {
    "noise": "pulls the features of forgotten people towards those of a noise image",
    "mean": "pulls the features of forgotten people towards the mean of the retained people's",
    "redirect": "pulls the features of forgotten people towards those of other, retained people",
    "reference": "pulls the features of forgotten people towards those that a second model sees",
    "repel": "pushes the features of forgotten people away from where they were",
    "saturate": "drives the projector's hidden units below zero at photos of forgotten people, so that nothing of "
    "them passes",
}


def _training(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    keys = ["loss", *sorted({key for row in rows for key in row if key.startswith("loss_")})]
    losses = []
    for key in keys:
        line, band = svg.bin_points(_column(rows, key))
        if line:
            name = LOSS_NAMES.get(key, key.removeprefix("loss_").replace("_", " "))
            # The total is the sum of the others: its band would only hide theirs.
            losses.append(svg.Series(name, line, LOSS_COLOURS.get(key, "text"), band if key != "loss" else ()))
    if not losses:
        return (
            "<section><h2>How it trained</h2><p>The training log holds no losses, so there is nothing to draw.</p>"
            "</section>\n"
        )
    values = sorted(y for s in losses for _, y in s.points)
    smallest = values[len(values) // 20]
    log = smallest > 0 and values[-1] / smallest > 30
    steps = f"{int(max(x for s in losses for x, _ in s.points)):,}"
    figures = [
        (
            "Loss terms",
            svg.line_chart(
                losses,
                x_label="step",
                y_label="loss (log scale)" if log else "loss",
                log=log,
                description=f"Loss terms over {steps} steps: "
                + ", ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in losses),
            ),
        )
    ]
    for key, title, unit in (
        ("grad_norm", "Gradient norm", "L2 norm before clipping"),
        ("images_per_second", "Speed", "images per second"),
    ):
        line, band = svg.bin_points(_column(rows, key))
        if line:
            series = [svg.Series("", line, "ink", band)]
            text = f"{title} over {steps} steps, from {line[0][1]:.3g} to {line[-1][1]:.3g}"
            figures.append((title, svg.line_chart(series, x_label="step", y_label=unit, description=text)))
    plots = "".join(f"<figure><h3>{title}</h3>{chart}</figure>" for title, chart in figures)
    binned = any(s.band for s in losses)
    how = " Lines are means of neighbouring steps, bands run from the lowest to the highest of them." if binned else ""
    return f'<section><h2>How it trained</h2><p>{_terms(settings)}{how}</p><div class="plots">{plots}</div></section>\n'


def _terms(settings: Mapping[str, Any]) -> str:
    """What the terms of the objective do, in a sentence."""
    if settings.get("method", "vkd") != "vkd":
        return (
            "The forget term is on the answers about forgotten people, the retain term on those about everybody else."
        )
    forget = FORGET_TERMS.get(settings.get("forget_target", "noise"), "moves the features of forgotten people")
    return f"The forget term {forget}; the retain term holds everybody else's features where they were."


def relearning_sentence(report: Mapping[str, Any]) -> str:
    """What the attacks brought back, in words; empty if none was run."""
    parts = []
    for attack, weights in (("visual", "visual weights alone"), ("all", "all weights")):
        curves = report["relearning"].get(attack)
        if curves:
            end = curves["unlearned"][-1]
            part = f"{end['step']:,} steps on {weights} bring the unlearned model to {percent(end['accuracy'])}"
            if "gold" in curves:
                part += f" (gold model: {percent(curves['gold'][-1]['accuracy'])})"
            parts.append(part)
    return ("; ".join(parts) + ".")[:1].upper() + ("; ".join(parts) + ".")[1:] if parts else ""


def _relearning(report: Mapping[str, Any]) -> str:
    curves = report["relearning"]
    if not curves:
        return "<section><h2>Can it be relearned?</h2><p>No relearning attack was run.</p></section>\n"
    plots = []
    for attack, title in (("visual", "Attacker trains visual weights"), ("all", "Attacker trains all weights")):
        if attack not in curves:
            continue
        series = [
            svg.Series(label, [(p["step"], p["accuracy"]) for p in curves[attack][label]], css)
            for label, css in (("unlearned", "ink"), ("gold", "gold"))
            if label in curves[attack]
        ]
        rules = [svg.Rule("chance", report["chance"])]
        if ("test", "vqa") in measured_cells(report):
            rules.append(svg.Rule("before", report["vanilla"]["test"]["vqa"]["accuracy"], "grey"))
        chart = svg.line_chart(
            series,
            x_label="relearning step",
            y_label="unseen photos, % right",
            y_range=(0.0, 1.0),
            in_percent=True,
            rules=rules,
            dots=True,
            description=f"{title}: "
            + ", ".join(f"{s.label} from {percent(s.points[0][1])} to {percent(s.points[-1][1])}" for s in series),
        )
        plots.append(f"<figure><h3>{title}</h3>{chart}{_areas(report, attack)}</figure>")
    gold = any("gold" in c for c in curves.values())
    reading = "Dashed: chance, and the model before unlearning. " + (
        "The gold model never knew these people, so where its curve rises the attack is teaching, not recovering: the "
        "space between the curves is what unlearning left behind."
        if gold
        else "The steeper the curve, the more was hidden rather than gone."
    )
    return (
        "<section><h2>Can it be relearned?</h2><p>An attacker fine-tunes the model on photos of the forgotten people; "
        "each point is its accuracy on photos that neither unlearning nor the attack used. "
        f'{escape(relearning_sentence(report))}</p><div class="plots two">{"".join(plots)}</div>'
        f'<p class="note after-plots">{reading}</p></section>\n'
    )


def _areas(report: Mapping[str, Any], attack: str) -> str:
    """A caption with the areas under the curves, where the report has them."""
    areas = report.get("relearning_auc", {}).get(attack)
    if not areas:
        return ""
    parts = [f"{name} {points(areas[name])}%" for name in ("unlearned", "gold") if name in areas]
    gap = ""
    if "relearning_gap" in areas:
        gap = f"; relearning gap {100 * areas['relearning_gap']:+.1f} points".replace("-", "−")
    return f"<figcaption>Area under the curve: {', '.join(parts)}{gap}.</figcaption>"


MAIN_SETTINGS = (
    "model_name_or_path",
    "data",
    "method",
    "sites",
    "forget_target",
    "distance",
    "trainable",
    "saliency",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "optim",
    "seed",
)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with readable values."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(str(item) for item in value) or "none"
        else:
            words = {"None": "none", "True": "yes", "False": "no"}
            flat[name] = words.get(str(value), str(value))
    return flat


def _settings(report: Mapping[str, Any]) -> str:
    flat = flatten(report["settings"])
    main = {key: value for key, value in flat.items() if key.split(".")[0] in MAIN_SETTINGS}
    parameters = report["parameters"]
    share = parameters["trainable"] / parameters["total"] if parameters["total"] else 0.0
    hardware = report.get("hardware", {})
    machine = {"Peak memory of the run": byte_size(report["peak_memory_bytes"])}
    if hardware.get("gpu"):
        machine["GPU"] = str(hardware["gpu"])
    if hardware.get("cpu"):
        cores = hardware.get("cpu_cores")
        machine["CPU"] = str(hardware["cpu"]) + (f", {cores} core{'s' if cores != 1 else ''}" if cores else "")
    if hardware.get("memory_bytes"):
        machine["Memory"] = byte_size(hardware["memory_bytes"])
    machine |= {
        "Weights trained": f"{parameters['trainable']:,} ({100 * share:.1f}%)",
        "Weights frozen": f"{parameters['frozen']:,}",
        "Weights in all": f"{parameters['total']:,}",
    }
    digest = report["language_model_sha256"]
    same = digest["before"] == digest["after"]
    total = sum(report["seconds"].values())
    longest = max(report["seconds"].values(), default=0.0) or 1.0
    times = "".join(
        f"<li><span>{escape(_phase(phase))}</span><span>{duration(took)}</span>"
        f'<span class="bar"><i style="width:{100 * took / longest:.1f}%"></i></span></li>'
        for phase, took in report["seconds"].items()
    )
    checksum = (
        f"The language model’s weights have the same SHA-256 before and after: <code>{escape(digest['before'])}</code>"
        if same
        else "The language model’s weights changed. SHA-256 before: "
        f"<code>{escape(digest['before'])}</code>, after: <code>{escape(digest['after'])}</code>"
    )
    everything = flat | {f"version of {library}": version for library, version in report["versions"].items()}
    return (
        '<section><h2>How it was made</h2><div class="facts">'
        f"<div><h3>Settings</h3>{_list(main)}</div>"
        f'<div><h3>Time: {duration(total)} in all</h3><ul class="times">{times}</ul></div>'
        f"<div><h3>Machine and weights</h3>{_list(machine)}</div>"
        f'</div><p class="note checksum">{checksum}</p>'
        f"<details><summary>All settings and versions</summary>{_list(everything)}</details>"
        "</section>\n"
    )


def _list(items: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in items.items())
    return f'<dl class="list">{rows}</dl>'


def limits(report: Mapping[str, Any]) -> list[str]:
    """What the figures do not show, one sentence or two each; the run's own notes come first."""
    found = [str(note) for note in report.get("notes", [])]
    found.append(
        "This is one training run with one seed. The intervals say how much the figures depend on which questions were "
        "asked, not how much another seed or another choice of people would change them."
    )
    chance = "Accuracy at chance says that the model no longer picks the right answer, not that every trace is gone."
    attack = relearning_sentence(report)
    found.append(f"{chance} In the relearning attack, {attack[0].lower()}{attack[1:]}" if attack else chance)
    if "gold" not in report:
        found.append(
            "No model trained without the forgotten people was measured, so how close this one comes to never having "
            "seen them is open."
        )
    if "qa" in report["unlearned"]["forget"]:
        found.append(
            "Text knowledge was kept on purpose: whoever asks by name, without a photo, still gets the answers."
        )
    strongest = attacks_sentence(report)
    found.append(
        f"{strongest} That is a handful of attacks; others may do better. No ability outside the sets was measured."
        if strongest
        else "Paraphrased questions, few-shot prompts, quantised weights and edited photos were not tried here, nor "
        "any ability outside the sets in the table."
    )
    return found


def _limits(report: Mapping[str, Any]) -> str:
    return f"<section><h2>What this does not show</h2><p>{escape(' '.join(limits(report)))}</p></section>\n"


def _footer(report: Mapping[str, Any]) -> str:
    version = report["versions"].get("fastvkd", "")
    return (
        f'<footer class="note">Made by fastvkd {escape(version)}. The figures are also in report.json, '
        "the training curves in metrics.jsonl.</footer>\n"
    )
