"""The sections of the page. Each is a template in `templates/sections/` and at most one function that prepares what the
template shows beyond the report itself; `SECTIONS` joins the two, in the order of the page.
"""

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fastvkd.bounds import is_finite_number
from fastvkd.methods import method_of
from fastvkd.reporting import svg
from fastvkd.reporting.report import cells_of, every_threshold, models_of
from fastvkd.reporting.schema import MODELS
from fastvkd.reporting.sentences import MODEL_WORDS, limits, question_rows, variant_name
from fastvkd.reporting.stranger import accuracies, beside_strangers, not_measured
from fastvkd.reporting.stranger_tables import tables
from fastvkd.reporting.verdict import criteria, headline, text_accuracy
from fastvkd.reporting.words import (
    byte_size,
    flatten,
    is_right,
    model_name,
    percent,
    percent_change,
    points,
    set_name,
    site_label,
)

Report = Mapping[str, Any]
_PEOPLE = 20  # rows; of more people the page shows those whom the model knows best


@dataclass(frozen=True)
class Page:
    """What a page shows: a report, of which parts may be missing; photos with answers; rows of metrics.jsonl, None
    where there is no log; the names of the parts that are missing; and what was said of each person."""

    report: Report
    examples: Sequence[Mapping[str, Any]] = ()
    log: Sequence[Mapping[str, Any]] | None = None
    missing: Sequence[str] = ()
    people: Sequence[Mapping[str, Any]] = ()


# What a section shows, by the names in its template; None leaves the section out.
Shown = Mapping[str, Any] | None


def _top(page: Page) -> Shown:
    report, settings = page.report, page.report.get("settings", {})
    facts = [model_name(settings)]
    facts += [f"method {settings['method']}"] if settings.get("method") else []
    facts += [f"seed {settings['seed']}"] if settings.get("seed") is not None else []
    clauses = headline(report)
    return {
        "facts": facts,
        "clauses": clauses,
        "sentence": _without_verdict(report),
        "keys": _key_figures(report) if clauses else [],
        "missing": page.missing,
        "open": not_measured(report),
    }


def _requirements(page: Page) -> Shown:
    checks = criteria(page.report)
    return {"checks": checks} if checks or headline(page.report) else None


def _without_verdict(report: Report) -> str:
    """What can be said where the figures for a verdict are missing."""
    cells = cells_of(report)
    model = "unlearned" if "unlearned" in report else "vanilla"
    found = [
        f"{percent(report[model][name]['vqa']['accuracy'])} right about the {whom} people"
        for name, whom in (("forget", "forgotten"), ("retain", "retained"))
        if (name, "vqa") in cells
    ]
    if not models_of(report):
        return "A trained model that nobody has evaluated yet."
    if not found:
        return "A model that was asked no multiple-choice questions about photos."
    return f"The model {'after' if model == 'unlearned' else 'before'} unlearning is {' and '.join(found)}."


def _key(css: str, label: str, before: float, after: float, chance: float, note: str) -> dict[str, Any]:
    words = percent_change(before, after)
    was, arrow, now = words.partition("\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
    description = f"{label}: {words}, chance {percent(chance)}"
    strip = svg.strip(before, after, chance=chance, css=css, description=description)
    return {"css": css, "label": label, "was": was + arrow, "now": now, "strip": strip, "note": note}


def _key_figures(report: Report) -> list[dict[str, Any]]:
    cells, chance = cells_of(report), report["chance"]

    def both(name: str) -> tuple[float, float]:
        return report["vanilla"][name]["vqa"]["accuracy"], report["unlearned"][name]["vqa"]["accuracy"]

    notes = {"forget": f"The dashed line is chance, {percent(chance)}.", "retain": ""}
    if ("test", "vqa") in cells:
        notes["forget"] = f"In photos that unlearning never saw: {percent_change(*both('test'))}. {notes['forget']}"
    if ("realworld", "vqa") in cells:
        notes["retain"] = f"Real world: {percent_change(*both('realworld'))}."
    keys = [
        _key("forget", "Forgotten people, right from a photo", *both("forget"), chance, notes["forget"]),
        _key("retain", "Retained people, right from a photo", *both("retain"), chance, notes["retain"]),
    ]
    before, after = (text_accuracy(report, model) for model in ("vanilla", "unlearned"))
    if before is not None and after is not None:
        note = "All sets together, asked in words without a photo."
        if ("forget", "qa") in cells:
            forgotten = percent(report["unlearned"]["forget"]["qa"]["accuracy"])
            note += f" About the forgotten people: {forgotten} right after."
        keys.append(_key("text", "Text knowledge", before, after, chance, note))
    return keys


def _people(page: Page) -> Shown:
    """Every person of whom something was said or measured, those first whom the model knows best; then the stranger."""
    report = page.report
    found = {model: accuracies(report, model) for model in MODELS}
    after = found["unlearned"] or found["vanilla"]
    said = {row["entity"]: row for row in page.people if not row["stranger"]}
    rows = [_person(report, said.get(entity, {"entity": entity, "name": entity}), found) for entity in after | said]
    rows.sort(key=lambda row: -after.get(row["entity"], 0.0))
    rows += [_person(report, row, found) for row in page.people if row["stranger"]]
    if not rows:
        return None
    return {
        "rows": rows[:_PEOPLE] + [row for row in rows[_PEOPLE:] if row["stranger"]],
        "more": len([row for row in rows[_PEOPLE:] if not row["stranger"]]),
        "said": bool(page.people),
        "measured": bool(after),
        "stranger": any(row["stranger"] for row in rows),
        "band": report.get("unlearned", {}).get("stranger_band"),
    }


def _person(report: Report, row: Mapping[str, Any], found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    entity, said, png = row["entity"], row.get("said", {}), row.get("image_png")
    by_model = {model: found[model][entity] for model in MODELS if entity in found[model]}
    return {
        "stranger": False,
        "question": None,
        **row,
        "photo": _photo(png, f"people: {entity}") if png is not None else None,
        "answers": [(model, str(said[model]).strip()) for model in MODELS if model in said],
        "named": not row.get("stranger") and is_right(said.get("unlearned", ""), row["name"]),
        "right": by_model,
        "n": next((report[model]["by_person"][entity]["vqa"]["n"] for model in by_model), None),
        "beside": beside_strangers(report).get(entity),
    }


def _stranger(page: Page) -> Shown:
    report = page.report
    beside = tables(report)
    return {"tables": beside, "open": not_measured(report)} if beside else None


_GROUPS = {
    "forget": ("Forgotten people", "Photos that were used for unlearning. The right answer should be gone."),
    "test": ("The same people, unseen photos", "Photos that unlearning never saw. The right answer should be gone."),
    "retain": ("Retained people", "The right answer should still be there."),
    "realworld": ("Real world", "In neither the forget nor the retain set. The right answer should still be there."),
}
_ANSWERS = {"Before": "before", "After": "after"}


def _gallery(page: Page) -> Shown:
    for i, example in enumerate(page.examples):
        if example["group"] not in _GROUPS:
            raise ValueError(f"examples[{i}]: group {example['group']!r}, expected one of {', '.join(_GROUPS)}")
    cards = [(example["group"], _card(example, f"examples[{i}]")) for i, example in enumerate(page.examples)]
    groups = [
        (title, explanation, shown)
        for group, (title, explanation) in _GROUPS.items()
        if (shown := [card for of, card in cards if of == group])
    ]
    return {"groups": groups} if groups else None


def _photo(png: bytes, where: str) -> dict[str, Any]:
    """What an <img> needs of a PNG file. Raises ValueError where it is none."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{where}: image_png is not a PNG file (it begins with {png[:8]!r})")
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode(), "width": width, "height": height}


def _card(example: Mapping[str, Any], where: str) -> dict[str, Any]:
    asked = [(label, str(example[key]).strip()) for label, key in _ANSWERS.items() if key in example]
    answers = [(label, answer, is_right(answer, str(example["truth"]))) for label, answer in asked]
    return {**example, **_photo(example["image_png"], where), "answers": answers}


_SET_COLOURS = dict.fromkeys(("forget", "test", "forget_faces", "pair"), "forget")


def _tables(page: Page) -> Shown:
    report = page.report
    if not {"vanilla", "unlearned"} & set(report):
        return None

    def rows(figure: str, titles: Mapping[str, str]) -> list[tuple[str, list[tuple[str, str]]]]:
        cells = cells_of(report, figure)
        groups = [(title, [cell for cell in cells if cell[1] == kind]) for kind, title in titles.items()]
        return [group for group in groups if group[1]]

    by_kind = {"vqa": "With a photo", "qa": "In words"}
    more = [("rouge_l", "Free answers: ROUGE-L × 100"), ("cloze", "Fill the blank: % right")]
    return {
        "models": models_of(report),
        "changes": {"vanilla", "unlearned"} <= set(report),
        "accuracy": rows("accuracy", {"vqa": "Asked with a photo", "qa": "Asked in words, no photo"}),
        "others": [(key, title, found) for key, title in more if (found := rows(key, by_kind))],
        "strip": lambda name, kind: _set_strip(report, name, kind),
    }


def _set_strip(report: Report, name: str, kind: str) -> Markup:
    models = [model for model in ("vanilla", "unlearned") if model in report]
    first, last = (report[model][name][kind] for model in (models[0], models[-1]))
    label = set_name(name, kind)
    return svg.strip(
        first["accuracy"],
        last["accuracy"],
        chance=report.get("chance"),
        css=_SET_COLOURS.get(name, "retain") if kind == "vqa" else "text",
        interval=tuple(last["ci95"]),
        description=f"{label}: {points(first['accuracy'])}% before, {points(last['accuracy'])}% after"
        if len(models) == 2
        else f"{label}: {points(last['accuracy'])}%",
    )


_MARKS = {
    "vanilla": ("before", "grey", "circle"),
    "unlearned": ("unlearned", "ink", "circle"),
    "gold": ("gold", "gold", "diamond"),
}


def _trade_off(page: Page) -> Shown:
    report = page.report
    if not headline(report):
        return None
    marks = []
    for model, look in _MARKS.items():
        sets = report.get(model, {})
        if {"forget", "retain"} <= set(sets):
            forget, retain = sets["forget"]["vqa"], sets["retain"]["vqa"]
            intervals = tuple(forget["ci95"]), tuple(retain["ci95"])
            marks.append(svg.Point(look[0], forget["accuracy"], retain["accuracy"], *look[1:], *intervals))
    marks += [
        svg.Point(other["name"], other["forget"], other["retain"], "grey", "square")
        for other in report.get("comparison", [])
    ]
    bar, chance = every_threshold(report), report["chance"]
    band, share = float(bar.chance_band or 0.0), float(bar.kept_visual or 0.0)
    description = "Forgotten against retained visual accuracy: " + "; ".join(
        f"{p.label} {points(p.x)}% and {points(p.y)}%" for p in marks
    )
    charts = [
        svg.scatter_chart(
            marks,
            x_label="forgotten people, % right",
            y_label="retained people, % right",
            description=description,
            chance=chance,
            goal=(chance - band, chance + band, share * report["vanilla"]["retain"]["vqa"]["accuracy"]),
            arrow=(0, 1),
            width=width,
            height=height,
            css=f"chart {css}",
        )
        for css, width, height in (("wide", 700, 400), ("narrow", 350, 330))
    ]
    return {"charts": charts, "band": band, "share": share}


_LOSSES = {"loss": ("total", "grey"), "loss_forget": ("forget", "forget"), "loss_retain": ("retain", "retain")}


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite `key`."""
    found = []
    for row in rows:
        value = row.get(key)
        if is_finite_number(value) and "step" in row:
            found.append((float(row["step"]), float(value)))
    return found


def _training(page: Page) -> Shown:
    if page.log is None:
        return None
    losses = []
    for key in ["loss", *sorted({key for row in page.log for key in row if key.startswith("loss_")})]:
        line, band = svg.bin_points(_column(page.log, key))
        if line:
            name, css = _LOSSES.get(key, (key.removeprefix("loss_").replace("_", " "), "text"))
            # The total is the sum of the others: its band would only hide theirs.
            losses.append(svg.Series(name, line, css, band if key != "loss" else ()))
    if not losses:
        return {"figures": [], "binned": False}
    values = sorted(y for s in losses for _, y in s.points)
    smallest = values[len(values) // 20]
    log = smallest > 0 and values[-1] / smallest > 30
    steps = f"{int(max(x for s in losses for x, _ in s.points)):,}"
    ends = ", ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in losses)
    loss_chart = svg.line_chart(
        losses,
        x_label="step",
        y_label="loss (log scale)" if log else "loss",
        log=log,
        description=f"Loss terms over {steps} steps: {ends}",
    )
    figures = [("Loss terms", loss_chart)]
    for key, title, unit in (
        ("grad_norm", "Gradient norm", "L2 norm before clipping"),
        ("images_per_second", "Speed", "images per second"),
    ):
        line, band = svg.bin_points(_column(page.log, key))
        if line:
            text = f"{title} over {steps} steps, from {line[0][1]:.3g} to {line[-1][1]:.3g}"
            series = [svg.Series("", line, "ink", band)]
            figures.append((title, svg.line_chart(series, x_label="step", y_label=unit, description=text)))
    features = method_of(page.report.get("settings", {})).features
    return {"figures": figures, "binned": any(s.band for s in losses), "features": features}


def _accuracy_chart(title: str, series: Sequence[svg.Series], **options: Any) -> Markup:
    ends = ", ".join(f"{s.label} from {percent(s.points[0][1])} to {percent(s.points[-1][1])}" for s in series)
    return svg.line_chart(
        series, y_range=(0.0, 1.0), in_percent=True, dots=True, description=f"{title}: {ends}", **options
    )


def _relearning(page: Page) -> Shown:
    report = page.report
    if "relearning" not in report:
        return None
    curves = report["relearning"]
    plots = []
    for attack, title in (("visual", "Attacker trains visual weights"), ("all", "Attacker trains all weights")):
        if attack not in curves:
            continue
        series = [
            svg.Series(label, [(p["step"], p["accuracy"]) for p in curves[attack][label]], css)
            for label, css in (("vanilla", "grey"), ("unlearned", "ink"), ("gold", "gold"))
            if label in curves[attack]
        ]
        rules = [svg.Rule("chance", report["chance"])] if "chance" in report else []
        if "vanilla" in report and ("test", "vqa") in cells_of(report):
            rules.append(svg.Rule("before", report["vanilla"]["test"]["vqa"]["accuracy"], "grey"))
        chart = _accuracy_chart(title, series, x_label="relearning step", y_label="unseen photos, % right", rules=rules)
        plots.append((title, chart, report.get("relearning_auc", {}).get(attack)))
    gold = any("gold" in by_model for by_model in curves.values())
    return {"plots": plots, "gold": gold, "variants": report.get("relearning_variants", [])}


def _questions(page: Page) -> Shown:
    rows = question_rows(page.report)
    return {"rows": rows, "models": models_of(rows[0]["figures"]), "strip": _question_strip} if rows else None


def _perturbation(page: Page) -> Shown:
    rows = page.report.get("attacks", {}).get("perturbation", [])
    return {"rows": rows, "models": models_of(rows[0]["figures"])} if rows else None


def _question_strip(row: Mapping[str, Any]) -> Markup:
    name, after = variant_name(row["variant"]), row["figures"]["unlearned"]
    before = row["figures"].get("vanilla", after)
    return svg.strip(
        before["accuracy"],
        after["accuracy"],
        chance=row["chance"],
        css="forget",
        interval=(after["ci95"][0], after["ci95"][1]),
        description=f"{name}: {points(before['accuracy'])}% before, {points(after['accuracy'])}% after",
    )


def _membership(page: Page) -> Shown:
    by_model = page.report.get("attacks", {}).get("membership", {})
    return {"by_model": by_model, "models": models_of(by_model)} if "unlearned" in by_model else None


def _probe(page: Page) -> Shown:
    found = page.report.get("attacks", {}).get("probe")
    if not found:
        return None
    sites, by_model = found["sites"], found["models"]
    figures = []
    for group, title in (("forget", "Forgotten people"), ("retain", "Retained people, as many")):
        series = []
        for model, css in (("vanilla", "grey"), ("unlearned", "ink"), ("gold", "gold")):
            here = by_model.get(model, {})
            curve = [
                (float(i), here[site][group]["accuracy"]) for i, site in enumerate(sites) if group in here.get(site, {})
            ]
            if curve:
                series.append(svg.Series(MODEL_WORDS[model], curve, css))
        if series:
            chart = _accuracy_chart(
                title,
                series,
                x_label="site: V tower block, P projector, L LLM layer",
                y_label="identity found by a linear probe",
                rules=[svg.Rule("chance", next(iter(by_model.values()))[sites[0]][group]["chance"])],
                x_ticks=[(float(i), site_label(site)) for i, site in enumerate(sites)],
            )
            figures.append((title, chart))
    return {"probe": found, "figures": figures}


def _certificate(page: Page) -> Shown:
    return {"paper": page.report["certificate"]} if page.report.get("certificate") else None


_MAIN_SETTINGS = set(
    "model_name_or_path data method sites forget_target distance trainable saliency learning_rate max_steps "
    "per_device_train_batch_size optim seed".split()
)


def _settings(page: Page) -> Shown:
    report = page.report
    flat = flatten(report.get("settings", {}))
    versions = {f"version of {library}": version for library, version in report.get("versions", {}).items()}
    machine = _machine(report)
    if not flat and not machine:
        return None
    return {
        "main": {key: value for key, value in flat.items() if key.split(".")[0] in _MAIN_SETTINGS},
        "machine": machine,
        "longest": max(report.get("seconds", {}).values(), default=0.0) or 1.0,
        "everything": flat | versions,
    }


def _machine(report: Report) -> dict[str, str]:
    """The machine and the weights, as far as they were noted."""
    hardware, found = report.get("hardware", {}), {}
    if "peak_memory_bytes" in report:
        found["Peak memory of the run"] = byte_size(report["peak_memory_bytes"])
    if hardware.get("gpu"):
        found["GPU"] = str(hardware["gpu"])
    if hardware.get("cpu"):
        cores = hardware.get("cpu_cores")
        found["CPU"] = str(hardware["cpu"]) + (f", {cores} core{'s' if cores != 1 else ''}" if cores else "")
    if hardware.get("memory_bytes"):
        found["Memory"] = byte_size(hardware["memory_bytes"])
    if parameters := report.get("parameters"):
        share = parameters["trainable"] / parameters["total"] if parameters["total"] else 0.0
        found |= {
            "Weights trained": f"{parameters['trainable']:,} ({100 * share:.1f}%)",
            "Weights frozen": f"{parameters['frozen']:,}",
            "Weights in all": f"{parameters['total']:,}",
        }
    return found


SECTIONS: dict[str, Callable[[Page], Shown]] = {
    "top.html": _top,
    "people.html": _people,
    "stranger.html": _stranger,
    "requirements.html": _requirements,
    "gallery.html": _gallery,
    "tables.html": _tables,
    "trade_off.html": _trade_off,
    "training.html": _training,
    "relearning.html": _relearning,
    "questions.html": _questions,
    "perturbation.html": _perturbation,
    "membership.html": _membership,
    "probe.html": _probe,
    "certificate.html": _certificate,
    "settings.html": _settings,
    "limits.html": lambda page: {"limits": limits(page.report)},
}
