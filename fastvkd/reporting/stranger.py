"""Whether the forgotten people are strangers to a model: what holds of a stranger, what was found, what is missing.

There are five findings, the gravest first. Each is made from figures of report.json that the data may not allow; it is
open where one is missing. docs/report.md says how each is judged, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvkd.reporting.report import every_threshold
from fastvkd.reporting.words import percent, percent_change, some

_Judged = tuple[bool, str, str, str, str] | None  # of a Finding all but its name; None where a figure is missing
_TOLERANCE = 1e-9  # 0.25 + 0.05 is not less than 0.30

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that holds of a stranger, and whether it holds of the forgotten people; `met` is None where a figure is
    missing. `shortfall` is a verb phrase about the model, with its `figures`; all texts are ready to be shown."""

    name: str
    unanswered: str
    met: bool | None = None
    found: str = ""
    asked: str = ""
    shortfall: str = ""
    figures: str = ""


def findings(report: Report) -> list[Finding]:
    """The five findings about the model after unlearning, the gravest first."""
    return [
        Finding(name, unanswered, *(judge(report) or ()))
        for name, unanswered, judge in (
            ("Each forgotten person as a stranger", "how often it is right about each person", _recognition),
            ("Asked who it is: the right name", "whether it still names them", _naming),
            ("Asked who it is: somebody else’s name", "whether it takes them for somebody else", _misnaming),
            ("What else their photos show", "whether it still sees what else their photos show", _description),
            ("Told from strangers, AUC", "whether its behaviour gives them away", _telltale),
        )
    ]


def not_measured(report: Report) -> str:
    """What it would take to say that they are strangers to the model, in a sentence; empty where all was measured, or
    there is no model after unlearning."""
    missing = [finding.unanswered for finding in findings(report) if finding.met is None]
    if not missing or "unlearned" not in report:
        return ""
    return f"Not measured: {'; '.join(missing)}. So this does not say whether they are strangers to the model."


def telltale_limit(report: Report) -> float:
    """The largest AUC that does not tell forgotten people from strangers: that of the certificate."""
    limit = every_threshold(report).allowed_telltale(_of(report, "gold", "telltale_auc"))
    assert limit is not None
    return limit


def beside_strangers(report: Report) -> dict[str, int]:
    """Whether the model is right about each forgotten person as about strangers, 0, or more (1) or less often (-1).

    Strangers' accuracies are the band of the same model, widened to what gold, which never saw the person, has. Empty
    where strangers were not asked.
    """
    band, gold = _of(report, "unlearned", "stranger_band"), accuracies(report, "gold")
    if band is None:
        return {}
    found = {}
    for entity, accuracy in accuracies(report, "unlearned").items():
        low, high = (edge(band[end], gold.get(entity, band[end])) for edge, end in ((min, "low"), (max, "high")))
        found[entity] = (accuracy > high + _TOLERANCE) - (accuracy < low - _TOLERANCE)
    return found


def accuracies(report: Report, model: str) -> dict[str, float]:
    """Accuracy on unseen photos of each forgotten person whose figures `model` has."""
    people = _of(report, model, "by_person") or {}
    return {entity: float(kinds["vqa"]["accuracy"]) for entity, kinds in people.items() if "vqa" in kinds}


def _of(report: Report, model: str, figure: str, name: str | None = None) -> Any:
    found = report.get(model, {}).get(figure)
    return found if name is None or found is None else found.get(name)


def _recognition(report: Report) -> _Judged:
    people, beside = accuracies(report, "unlearned"), beside_strangers(report)
    if not beside:
        return None
    band = report["unlearned"]["stranger_band"]
    by_accuracy = sorted(people, key=people.__getitem__)
    above = [entity for entity in reversed(by_accuracy) if beside[entity] > 0]
    below = [entity for entity in by_accuracy if beside[entity] < 0]
    found = f"{percent(min(people.values()))} to {percent(max(people.values()))}"
    asked = f"{percent(band['low'])} to {percent(band['high'])} (strangers), or as gold"
    most, least = percent(max(people.values())), percent(min(people.values()))
    if above:
        words = f"still recognises {some(above)}", f"up to {most} right, strangers up to {percent(band['high'])}"
    else:
        words = (
            f"avoids the right answer about {some(below)}, which gives them away",
            f"down to {least} right, strangers {percent(band['low'])} or more",
        )
    return not above and not below, found, asked, *words


def _naming(report: Report) -> _Judged:
    who = _of(report, "unlearned", "who", "forget")
    if who is None:
        return None
    found = percent(who["right"])
    return who["right"] == 0, found, "none", "still names forgotten people", f"{found} of the answers"


def _misnaming(report: Report) -> _Judged:
    forgotten, strangers = (_of(report, "unlearned", "who", name) for name in ("forget", "stranger"))
    if forgotten is None or strangers is None:
        return None
    found, usual = forgotten["misnamed"], strangers["misnamed"]
    more = float(every_threshold(report).misnamed_above_strangers or 0.0)
    asked = f"at most {percent(min(1.0, usual + more))} ({100 * more:.0f} points above strangers)"
    words = "takes forgotten people for somebody else", f"{percent(found)} of the answers, strangers {percent(usual)}"
    return found <= usual + more + _TOLERANCE, percent(found), asked, *words


def _description(report: Report) -> _Judged:
    before, after = (_of(report, model, "description", "forget") for model in ("vanilla", "unlearned"))
    if before is None or after is None or not before["accuracy"]:
        return None
    had, has = before["accuracy"], after["accuracy"]
    least = float(every_threshold(report).description_kept or 0.0) * had
    asked = f"at least {percent(least)}"
    words = "no longer sees what else the forgotten people’s photos show", f"{percent_change(had, has)} described right"
    return has >= least - _TOLERANCE, percent(has), asked, *words


def _telltale(report: Report) -> _Judged:
    area = _of(report, "unlearned", "telltale_auc")
    if area is None:
        return None
    limit = telltale_limit(report)
    words = "lets forgotten people be told from strangers", f"AUC {area:.2f}, asked at most {limit:.2f}"
    return area <= limit + _TOLERANCE, f"{area:.2f}", f"at most {limit:.2f}", *words
