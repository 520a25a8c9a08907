"""What a run found, in sentences that the page and the card share."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastvkd.reporting.report import models_of
from fastvkd.reporting.words import percent

MODEL_WORDS = {"vanilla": "before", "unlearned": "after", "gold": "gold"}
ATTACK_KINDS = {
    "plain": "No attack",
    "paraphrase": "Question in other words",
    "fewshot": "Solved examples first",
    "reverse": "Which of these photos is it?",
    "images": "Photo edited",
    "quantize": "Weights rounded",
}
WEIGHTS = {"visual": "visual weights alone", "all": "all weights"}
_VARIANTS = {
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


def variant_name(variant: str) -> str:
    """The variant of an attack as a row of the table is called."""
    return _VARIANTS.get(variant, variant.replace("_", " "))


def question_rows(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One row for each way in which questions were asked; empty if none was."""
    rows: Sequence[Mapping[str, Any]] = report.get("attacks", {}).get("questions", [])
    return rows


def attacks_sentence(report: Mapping[str, Any]) -> str:
    """The most successful question attack in words; empty if none was run."""
    rows = [row for row in question_rows(report) if row["kind"] != "plain"]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row["figures"]["unlearned"]["accuracy"] - row["chance"])
    name = f"{ATTACK_KINDS.get(worst['kind'], worst['kind'])} ({variant_name(worst['variant'])})"
    found = percent(worst["figures"]["unlearned"]["accuracy"])
    return f"Of {len(rows)} attacks the strongest is “{name}”: {found} right, chance {percent(worst['chance'])}."


def relearning_sentence(report: Mapping[str, Any]) -> str:
    """What the attacks brought back, in words; empty if none was run."""
    parts = []
    for attack, weights in WEIGHTS.items():
        curves = report.get("relearning", {}).get(attack)
        if curves:
            end = curves["unlearned"][-1]
            part = f"{end['step']:,} steps on {weights} bring the unlearned model to {percent(end['accuracy'])}"
            if "gold" in curves:
                part += f" (gold model: {percent(curves['gold'][-1]['accuracy'])})"
            parts.append(part)
    sentence = "; ".join(parts) + "." if parts else ""
    rows = report.get("relearning_variants", [])
    if rows:
        worst = max(rows, key=lambda row: row["auc"]["unlearned"])
        name = f"“{variant_name(worst['variant'])}” on {WEIGHTS[worst['weights']]}"
        sentence += f" Of {len(rows)} attacks the strongest is {name}: area {percent(worst['auc']['unlearned'])}"
        sentence += f" (gold model: {percent(worst['auc']['gold'])})." if "gold" in worst["auc"] else "."
    return sentence[:1].upper() + sentence[1:]


def probe_sentence(probe: Mapping[str, Any]) -> str:
    """What the probe finds of forgotten people at the tower's end and where the LLM begins to read."""

    def at(site: str) -> str:
        found = probe["models"]
        return ", ".join(
            f"{MODEL_WORDS[model]} {percent(found[model][site]['forget']['accuracy'])}" for model in models_of(found)
        )

    return (
        f"Identity of forgotten people at the last tower block: {at(_last_block(probe))}; "
        f"behind the projector: {at('projector')}."
    )


def rank_sentence(probe: Mapping[str, Any]) -> str:
    """How spread the tower's features of forgotten people are, and how near the mean photo the right person lies."""
    parts = []
    for model in models_of(probe["models"]):
        here = probe["models"][model][_last_block(probe)]["forget"]
        parts.append(f"{MODEL_WORDS[model]} {here['effective_rank']:.1f} and {here['prior_rank']:.2f}")
    return (
        "The last tower block’s features of forgotten people, effective rank and mean reciprocal rank of the right "
        f"person by distance to the mean photo: {'; '.join(parts)}."
    )


def _last_block(probe: Mapping[str, Any]) -> str:
    return str([site for site in probe["sites"] if site.startswith("vision:")][-1])


def certificate_sentence(paper: Mapping[str, Any]) -> str:
    """How many checks were met, missed and left out, and that a quantised model was judged, if one was."""
    checks = paper["checks"]
    met, missed = (sum(check["met"] is value for check in checks) for value in (True, False))
    left = len(checks) - met - missed
    said = f"{met} of {len(checks)} checks are met, {missed} missed" + (f", {left} not measured." if left else ".")
    rounded = paper.get("loading", {}).get("quantize", "none")
    return said if rounded == "none" else f"{said} The models were judged with their LLM rounded to {rounded}."


def requests_sentence(paper: Mapping[str, Any]) -> str:
    """Of which of the model's requests a certificate, or an evaluation, speaks; empty where none are noted."""
    parts = []
    for one in paper.get("requests", ()):
        count = one["entities"]
        about = "" if count is None else f", {count:,} {'entity' if count == 1 else 'entities'}"
        said = "judged" if one["judged"] else "not judged here"
        parts.append(f"request {one['request']} ({one['date'] or 'date unknown'}{about}) {said}")
    return f"Of the requests that the model has met: {'; '.join(parts)}." if parts else ""


def figure_text(check: Mapping[str, Any]) -> str:
    """A check's figure as text: two decimals, yes or no, or that it was not measured."""
    if check["figure"] is None:
        return "not measured"
    if check["key"] == "language_model_unchanged":
        return "yes" if check["figure"] else "no"
    return f"{check['figure']:.2f}".replace("-", "−")


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
    if "qa" in report.get("unlearned", {}).get("forget", {}):
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
