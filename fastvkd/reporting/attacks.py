"""The report's sections about attacks: wording, photos and weights; membership; where identity still shows; verdict."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastvkd.reporting import svg
from fastvkd.reporting.report import percent, points

KIND_NAMES = {
    "plain": "No attack",
    "paraphrase": "Question in other words",
    "fewshot": "Solved examples first",
    "reverse": "Which of these photos is it?",
    "images": "Photo edited",
    "quantize": "Weights rounded",
}
VARIANT_NAMES = {
    "plain": "as trained",
    "reworded": "other words",
    "polite": "in a polite request",
    "typed": "lower case, no punctuation",
    "preamble": "after an unrelated sentence",
    "which photo": "by likelihood of the answer",
    "grayscale": "grey",
    "noise": "noisy",
    "flip": "mirrored",
    "crop": "cropped",
    "blur": "blurred",
    "jpeg": "JPEG, quality 20",
    "int8": "8 bits, int8",
    "nf4": "4 bits, nf4",
}
SET_NAMES = {
    "photos": "Forget photos against unseen photos",
    "pairs": "Own answers against another person’s",
}
SCORE_NAMES = {"loss": "loss", "zlib": "zlib", "min_k": "Min-K 20 %", "min_k++": "Min-K++ 20 %"}
MODEL_HEADS = {"vanilla": "Before", "unlearned": "After", "gold": "Gold"}


def _present(by_model: Mapping[str, Any]) -> list[str]:
    return [name for name in MODEL_HEADS if name in by_model]


def _head(title: str, models: Sequence[str], strip: bool) -> str:
    heads = "".join(f'<th scope="col">{MODEL_HEADS[name]}</th>' for name in models)
    scale = '<span class="scale" aria-hidden="true"><span>0</span><span>50</span><span>100</span></span>'
    last = f'<th class="strip-cell" scope="col">{scale}</th>' if strip else ""
    return f'<thead><tr><th scope="col">{escape(title)}</th>{heads}{last}</tr></thead>'


def questions_section(report: Mapping[str, Any]) -> str:
    """The table of all question attacks; empty if none was run."""
    rows = report.get("attacks", {}).get("questions", [])
    if not rows:
        return ""
    models = _present(rows[0]["figures"])
    body = []
    kind = ""
    for row in rows:
        if row["kind"] != kind:
            kind = row["kind"]
            body.append(
                f'<tr class="head"><th scope="colgroup" colspan="{1 + len(models)}">{escape(KIND_NAMES[kind])}</th>'
                '<th class="strip-cell"></th></tr>'
            )
        body.append(_question_row(row, models))
    n = rows[0]["figures"]["unlearned"]["n"]
    gold = " Gold never knew these people." if "gold" in models else ""
    return (
        "<section><h2>Asked in other ways</h2><p>"
        f"{escape(attacks_sentence(report))} Each row asks {n:,} questions about photos of forgotten people, known and "
        f"unseen ones mixed, in another way; knowledge that is only hidden would come back in one of them.{gold}</p>"
        f"<table>{_head('Accuracy, %', models, True)}<tbody>{''.join(body)}</tbody></table></section>\n"
    )


def _question_row(row: Mapping[str, Any], models: Sequence[str]) -> str:
    name = VARIANT_NAMES.get(row["variant"], row["variant"])
    cells = []
    for model in models:
        figure = row["figures"].get(model)
        css = ' class="after"' if model == "unlearned" else ""
        if figure is None:
            cells.append(f"<td{css}>–</td>")
        else:
            low, high = (f"{100 * bound:.0f}" for bound in figure["ci95"])
            cells.append(f"<td{css}>{points(figure['accuracy'])}<small>{low}–{high}</small></td>")
    after = row["figures"]["unlearned"]
    before = row["figures"].get("vanilla", after)
    strip = svg.strip(
        before["accuracy"],
        after["accuracy"],
        chance=row["chance"],
        css="forget",
        interval=(after["ci95"][0], after["ci95"][1]),
        description=f"{name}: {points(before['accuracy'])}% before, {points(after['accuracy'])}% after",
    )
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}<td class="strip-cell">{strip}</td></tr>'


def attacks_sentence(report: Mapping[str, Any]) -> str:
    """The most successful question attack in words; empty if none was run."""
    rows = [row for row in report.get("attacks", {}).get("questions", []) if row["kind"] != "plain"]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row["figures"]["unlearned"]["accuracy"] - row["chance"])
    name = f"{KIND_NAMES[worst['kind']]} ({VARIANT_NAMES.get(worst['variant'], worst['variant'])})"
    found = percent(worst["figures"]["unlearned"]["accuracy"])
    return f"Of {len(rows)} attacks the strongest is “{name}”: {found} right, chance {percent(worst['chance'])}."


def membership_section(report: Mapping[str, Any]) -> str:
    """The table of membership inference; empty if it was not run."""
    by_model = report.get("attacks", {}).get("membership", {})
    if "unlearned" not in by_model:
        return ""
    models = _present(by_model)
    body = []
    for name, by_score in by_model["unlearned"].items():
        body.append(
            f'<tr class="head"><th scope="colgroup" colspan="{1 + len(models)}">{escape(SET_NAMES[name])}</th></tr>'
        )
        for score in by_score:
            cells = []
            for model in models:
                found = by_model[model][name][score]
                css = ' class="after"' if model == "unlearned" else ""
                low, high = (f"{bound:.2f}" for bound in found["ci95"])
                cells.append(f"<td{css}>{found['auc']:.2f}<small>{low}–{high}</small></td>")
            body.append(f'<tr><th scope="row">{escape(SCORE_NAMES[score])}</th>{"".join(cells)}</tr>')
    return (
        "<section><h2>Can one tell what it was trained on?</h2><p>Membership inference sorts statements by the model’s "
        "own likelihood. The figure is the area under the ROC curve: 0.5 means that members cannot be told from the "
        "rest; far below 0.5 betrays them as well.</p>"
        f'<div class="narrow-table"><table>{_head("AUC", models, False)}<tbody>{"".join(body)}</tbody></table></div>'
        "</section>\n"
    )


def site_label(site: str) -> str:
    """'vision:3' -> 'V3', 'projector' -> 'P', 'llm:2' -> 'L2'."""
    kind, _, number = site.partition(":")
    return {"vision": "V", "projector": "P", "llm": "L"}[kind] + number


def probe_section(report: Mapping[str, Any]) -> str:
    """Probe accuracy per site before and after, for forgotten and retained people; empty if it was not run."""
    found = report.get("attacks", {}).get("probe")
    if not found:
        return ""
    sites, by_model = found["sites"], found["models"]
    figures = []
    for group, title in (("forget", "Forgotten people"), ("retain", "Retained people, as many")):
        series = []
        for model, label, css in (
            ("vanilla", "before", "grey"),
            ("unlearned", "after", "ink"),
            ("gold", "gold", "gold"),
        ):
            curve = [
                (float(i), by_model[model][site][group]["accuracy"])
                for i, site in enumerate(sites)
                if model in by_model and group in by_model[model].get(site, {})
            ]
            if curve:
                series.append(svg.Series(label, curve, css))
        if not series:
            continue
        chance = next(iter(by_model.values()))[sites[0]][group]["chance"]
        chart = svg.line_chart(
            series,
            x_label="site: V tower block, P projector, L LLM layer",
            y_label="identity found by a linear probe",
            y_range=(0.0, 1.0),
            in_percent=True,
            rules=[svg.Rule("chance", chance)],
            dots=True,
            x_ticks=[(float(i), site_label(site)) for i, site in enumerate(sites)],
            description=f"{title}: "
            + ", ".join(f"{s.label} from {percent(s.points[0][1])} to {percent(s.points[-1][1])}" for s in series),
        )
        figures.append(f"<figure><h3>{title}</h3>{chart}</figure>")
    return (
        f"<section><h2>Where did it go?</h2><p>{escape(probe_sentence(report))} A linear probe is fitted to the "
        "features of two photos a person at each site and judged on others: what it still finds is there, whether the "
        "model says it or not. Part of it is what any tower sees of a face, which the gold model shows.</p>"
        f'<div class="plots two">{"".join(figures)}</div>'
        f'<p class="note after-plots">{escape(_rank_sentence(found))}</p></section>\n'
    )


def probe_sentence(report: Mapping[str, Any]) -> str:
    """What the probe finds at the tower's end and where the LLM begins to read; empty if it was not run."""
    found = report.get("attacks", {}).get("probe")
    if not found:
        return ""
    tower = [site for site in found["sites"] if site.startswith("vision:")][-1]

    def at(site: str) -> str:
        return ", ".join(
            f"{name} {percent(found['models'][model][site]['forget']['accuracy'])}"
            for model, name in (("vanilla", "before"), ("unlearned", "after"), ("gold", "gold"))
            if model in found["models"]
        )

    return (
        f"Identity of forgotten people at the last tower block: {at(tower)}; behind the projector: {at('projector')}."
    )


def _rank_sentence(found: Mapping[str, Any]) -> str:
    tower = [site for site in found["sites"] if site.startswith("vision:")][-1]
    parts = []
    for model, name in (("vanilla", "before"), ("unlearned", "after"), ("gold", "gold")):
        if model in found["models"]:
            here = found["models"][model][tower]["forget"]
            parts.append(f"{name} {here['effective_rank']:.1f} and {here['prior_rank']:.2f}")
    return (
        "The last tower block’s features of forgotten people, effective rank and mean reciprocal rank of the right "
        f"person by distance to the mean photo: {'; '.join(parts)}."
    )


def certificate_section(report: Mapping[str, Any]) -> str:
    """The verdict and every check; empty without a certificate."""
    paper = report.get("certificate")
    if not paper:
        return ""
    items = []
    for check in paper["checks"]:
        sign, word = {
            True: ('<span class="yes">✓</span>', "met"),
            False: ('<span class="no">✗</span>', "not met"),
            None: ("<span>–</span>", "not measured"),
        }[check["met"]]
        items.append(
            f'<li>{sign}<span>{escape(check["name"])}<span class="sr">: {word}</span></span>'
            f"<b>{escape(figure_text(check))}</b>"
            f'<span class="asked">asked: {escape(check["asked"])}</span></li>'
        )
    forgotten = paper["forgotten"]
    return (
        f"<section><h2>Certificate: {escape(paper['verdict'])}</h2><p>{escape(certificate_sentence(paper))} "
        "certificate.json lists the SHA-256 of every image that was to be forgotten "
        f"({forgotten['images']:,} of {forgotten['entities']:,} people), the settings, the version of the code and "
        f'every figure.</p><ul class="criteria certificate">{"".join(items)}</ul></section>\n'
    )


def certificate_sentence(paper: Mapping[str, Any]) -> str:
    """How many checks were met, missed and left out."""
    checks = paper["checks"]
    met, missed = (sum(check["met"] is value for check in checks) for value in (True, False))
    left = len(checks) - met - missed
    text = f"{met} of {len(checks)} checks are met, {missed} missed"
    return text + (f", {left} not measured." if left else ".")


def figure_text(check: Mapping[str, Any]) -> str:
    """A check's figure as text: two decimals, yes or no, or that it was not measured."""
    if check["figure"] is None:
        return "not measured"
    if check["key"] == "language_model_unchanged":
        return "yes" if check["figure"] else "no"
    return f"{check['figure']:.2f}".replace("-", "−")
