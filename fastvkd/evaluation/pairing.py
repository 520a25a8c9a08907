"""Two evaluations question by question: by how much one is better, and whether that could be chance.

The questions of one person have much in common, so people are the units: of the bootstrap, and of the test.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvkd.errors import DataError
from fastvkd.evaluation.divergence import answer_log_probability
from fastvkd.evaluation.protocol import logged_samples
from fastvkd.evaluation.statistics import clustered_interval
from fastvkd.settings import CHANCE_BAND

Samples = Sequence[Mapping[str, Any]]
_RESAMPLES = 10_000
_NOT_FIGURES = ("stranger_as_forgotten", "telltale")  # cells whose answers are neither right nor wrong
# What of a sample is compared, by task: the name of the figure, and its value.
_VALUES: dict[str, dict[str, Callable[[Mapping[str, Any]], float]]] = {
    "choice": {
        "acc": lambda sample: float(sample["correct"]),
        "p(answer)": lambda sample: math.exp(answer_log_probability(sample)),
    },
    "generation": {"R-L": lambda sample: float(sample["rouge_l"])},
    "cloze": {"cloze": lambda sample: float(sample["correct"])},
    "description": {"seen": lambda sample: float(sample["correct"])},
}


@dataclass(frozen=True)
class Paired:
    """How far `run` lies above `base` in one figure of a cell: the mean over `n` questions that both were asked.

    ci95: [low, high] when other people are drawn. p: two-sided, of as large a difference if both were alike; it can be
    no smaller than 2 / 2^people.
    """

    figure: str
    base: str
    run: str
    difference: float
    ci95: tuple[float, float]
    p: float
    n: int
    people: int


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The logged samples of an evaluation. Raises DataError for a folder without."""
    log = folder / "samples.jsonl"
    mend = "paired tests need the --out folders of fastvkd eval, with their samples.jsonl"
    lines = logged_samples(log, mend, _needed)
    return [line for line in lines if "finished" not in line and line.get("cell") not in _NOT_FIGURES]


def _needed(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of a sample that are compared."""
    if sample.get("cell") in _NOT_FIGURES:
        return ()
    figure = {"choice": ("options", "answer", "correct"), "generation": ("rouge_l",), "cloze": ("correct",)}
    of_task = {**figure, "description": ("correct",)}.get(sample.get("task", ""), ())
    return ("kind", "entity", "question", *of_task)


def paired_tests(base: tuple[str, Samples], other: tuple[str, Samples], seed: int = 0) -> list[Paired]:
    """Every figure that both evaluations (name, samples) have, in the order of `other`.

    Raises DataError where they share no question.
    """
    theirs = _by_question(base[1])
    groups: dict[str, list[tuple[str, float]]] = {}
    for question, sample in _by_question(other[1]).items():
        match = theirs.get(question)
        for name, value in _VALUES.get(sample["task"], {}).items():
            if match is None or (name == "p(answer)" and not {"log_likelihood"} <= set(sample) & set(match)):
                continue
            title = f"{sample['cell']} {'VQA' if sample['kind'] == 'vqa' else 'QA'} {name}"
            groups.setdefault(title, []).append((sample["entity"], value(sample) - value(match)))
    if not groups:
        raise DataError(
            f"{other[0]}: has no question in common with {base[0]}; evaluate both on the same data and seed"
        )
    found = []
    for title, differences in groups.items():
        people, values = [entity for entity, _ in differences], [value for _, value in differences]
        found.append(
            Paired(
                title,
                base[0],
                other[0],
                float(np.mean(values)),
                clustered_interval(values, people, seed=seed),
                sign_flip_p(values, people, seed=seed),
                len(values),
                len(set(people)),
            )
        )
    return found


def _by_question(samples: Samples) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Samples by what was asked of whom; a question that was asked twice has a number."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for sample in samples:
        asked = tuple(sample[key] for key in ("cell", "kind", "task", "entity", "question"))
        asked += (sample.get("photo", ""), tuple(sorted(sample.get("options", {}).items())))
        found[*asked, times[asked]] = sample
        times[asked] += 1
    return found


def sign_flip_p(values: Sequence[float], clusters: Sequence[str], *, seed: int, resamples: int = _RESAMPLES) -> float:
    """Two-sided p-value of the mean of paired differences when the sign of each cluster's sum is drawn (a permutation
    test, Fisher 1935): over all signs where these are at most `resamples`, else over as many random ones."""
    of_value = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.bincount(of_value, weights=np.asarray(values, dtype=np.float64))
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if 2 ** len(sums) <= resamples:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(sums))))
        return float(np.mean(np.abs(signs @ sums) >= observed))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, len(sums)))
    return float((1 + np.sum(np.abs(signs @ sums) >= observed)) / (1 + resamples))


def never_learnt(name: str, samples: Samples) -> str | None:
    """One line where a model hardly knew the forget set, so that it is no basis for claims of forgetting; else None."""
    asked = [s for s in samples if (s["cell"], s["kind"], s["task"]) == ("forget", "vqa", "choice")]
    if not asked:
        return None
    accuracy, chance = (
        float(np.mean(v)) for v in ([s["correct"] for s in asked], [1 / len(s["options"]) for s in asked])
    )
    if accuracy > chance + CHANCE_BAND:
        return None
    return (
        f"incomplete: {name} never learnt the forget set ({accuracy:.3f} right, chance {chance:.3f}), so a difference "
        "from it says nothing about forgetting"
    )


def paired_table(tests: Sequence[Paired], format: str, notes: Sequence[str] = ()) -> str:
    """The tests as `text`, `latex` (a `tabular` of booktabs) or `json`, with `notes` behind (of `json` within)."""
    if format == "json":
        return json.dumps({"paired": [vars(test) for test in tests], "notes": list(notes)}, indent=1)
    lines = [["", "difference", "p", "questions", "people"]]
    before = None
    for test in tests:
        if (pair := f"{test.run} - {test.base}") != before:
            lines.append([pair, "", "", "", ""])
            before = pair
        low, high = test.ci95
        difference = f"{test.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([f"  {test.figure}", difference, f"{test.p:.4f}", str(test.n), str(test.people)])
    if format == "latex":
        head, *body = [" & ".join(cell.strip().replace("_", r"\_") for cell in line) + r" \\" for line in lines]
        return "\n".join(
            [r"\begin{tabular}{lrrrr}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
            + [f"% {note}" for note in notes]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([*rows, *notes])
