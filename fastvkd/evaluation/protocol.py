"""The evaluation protocol: cells (forget, test, retain, realworld, ...) x kinds (vqa: about the photo, qa: about the
text) x tasks (choice, generation, cloze, truth, description), with intervals, a log of every sample, and finished cells
kept across runs.

docs/evaluation.md says where the modes `corrected` and `paper` differ and why.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import nn

from fastvkd.bounds import is_finite_number
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.asker import Asker
from fastvkd.evaluation.benchmarks import BENCHMARKS, MODES, Letters, Rules, chat_turn, speaks_user_assistant
from fastvkd.evaluation.divergence import answer_log_probability
from fastvkd.evaluation.generation import bleu, rouge
from fastvkd.evaluation.inputs import PreparedPhotos, Tick
from fastvkd.evaluation.multiple_choice import OptionScores
from fastvkd.evaluation.statistics import with_interval
from fastvkd.evaluation.truth_ratio import log_truth_ratios, probability, truth_score
from fastvkd.files import json_lines
from fastvkd.records import Choice, Photo, Profile

TASKS = ("choice", "generation", "cloze", "truth", "description")
KINDS = ("vqa", "qa")
# MLLMU-Bench gives no demonstration for the celebrities, the real-world cell.
_WITHOUT_DEMONSTRATION = "realworld"

# What a sample says, counted up with every change: cells whose samples say less are asked anew.
_SAMPLES = 2

OnProgress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True)
class _Item:
    """A question about one entity, with its photo for VQA."""

    entity: str
    source: str
    question: Any
    photos: tuple[Photo, ...]


@dataclass(frozen=True)
class _Part:
    """What is asked of one cell in one kind: items by task, and the demonstration before every choice, if any."""

    cell: str
    kind: str
    by_task: dict[str, list[_Item]]
    demonstration: _Item | None

    def __len__(self) -> int:
        return sum(map(len, self.by_task.values()))

    def key(self, settings: Any) -> str:
        """What its figures depend on: another model, setting, question or photo gives another key."""
        digest = hashlib.sha256(json.dumps([settings, self.cell, self.kind], sort_keys=True).encode())
        shown = [] if self.demonstration is None else [self.demonstration]
        for task, items in [*self.by_task.items(), ("demonstration", shown)]:
            for item in items:
                content = [task, item.entity, asdict(item.question), [photo.key for photo in item.photos]]
                digest.update(json.dumps(content).encode())
            digest.update(b";")
        return digest.hexdigest()


def evaluate_cells(
    model: nn.Module,
    processor: Any,
    cells: dict[str, list[Profile]],
    *,
    batch_size: int,
    benchmark: str = "mllmu",
    mode: str = "corrected",
    seed: int = 0,
    log_path: str | os.PathLike[str] | None = None,
    progress: OnProgress | None = None,
    max_samples: int | None = None,
    tasks: Sequence[str] = TASKS,
    kinds: Sequence[str] = KINDS,
    fingerprint: str | None = None,
    photos: PreparedPhotos | None = None,
    fast: bool | None = None,
    collect: list[dict[str, Any]] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate every cell; returns `{cell: {"vqa": figures, "qa": figures}}`, see `cell_figures`.

    `benchmark` (`mllmu`, `clear`, `umu`, `jsonl`) chooses the prompts and readings of paper mode and the length of free
    answers. `max_samples` draws at most that many questions per cell, kind and task, seeded and the same for every
    model; of questions that exist in both kinds (`pair`) the same ones are drawn. Questions of the task `truth` without
    a wrong answer to compare with are left out. Text questions that several rows of an entity repeat are asked once.

    `log_path` gets one JSON line per question, with the raw output or the score of every option, and `collect` the same
    samples. With a `fingerprint` of the model (and of whatever else shapes its answers: dtype, processor), cells that
    the log already holds for the same fingerprint, settings and questions are taken from there; without one the log is
    written anew. `progress` is called after every batch. `photos` keeps decoded photos across calls. `fast` forces or
    forbids the embedding path; None chooses it where the family allows.

    Raises `SettingsError` for an unknown benchmark, mode, task or kind or a number below 1, and `DataError` for a photo
    that cannot be decoded or a log that cannot be written.
    """
    _check(benchmark, mode, tasks, kinds, batch_size, max_samples)
    photos = photos if photos is not None else PreparedPhotos(processor)
    rules = BENCHMARKS[benchmark][mode]
    runner = _Runner(Asker(model, processor, batch_size, photos, fast), rules, mode)
    shows = rules.letters is not None and rules.letters.demonstration
    parts = _parts(cells, kinds, tasks, max_samples, seed, shows)
    asked = dict(benchmark=benchmark, mode=mode, seed=seed, max_samples=max_samples)
    settings = dict(fingerprint=fingerprint, samples=_SAMPLES, **asked)
    keys = [part.key(settings) for part in parts]
    log = _Log(None if log_path is None else Path(log_path), set() if fingerprint is None else set(keys))
    count = _Count(sum(map(len, parts)), progress)
    results: dict[str, dict[str, dict[str, Any]]] = {cell: {} for cell in cells}
    for part, key in zip(parts, keys, strict=True):
        if key in log.finished:
            samples = log.finished[key]
            figures = cell_figures(samples, seed)  # which may be more than when they were logged
            count.advance(len(part), f"{part.cell} {part.kind} (kept)")
        else:
            samples = runner.ask(part, count)
            figures = cell_figures(samples, seed)
            log.add(samples, {"finished": key, "cell": part.cell, "kind": part.kind, "figures": figures})
        results[part.cell][part.kind] = figures
        if collect is not None:
            collect += samples
    return results


def _check(
    benchmark: str, mode: str, tasks: Sequence[str], kinds: Sequence[str], batch_size: int, max_samples: int | None
) -> None:
    names = (("benchmark", [benchmark], tuple(BENCHMARKS)), ("mode", [mode], MODES))
    for name, values, allowed in (*names, ("tasks", tasks, TASKS), ("kinds", kinds, KINDS)):
        for value in values:
            if value not in allowed:
                raise SettingsError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    for name, number in (("batch_size", batch_size), ("max_samples", max_samples)):
        if number is not None and number < 1:
            raise SettingsError(f"{name}={number}: at least 1 is needed")


def _parts(
    cells: dict[str, list[Profile]],
    kinds: Sequence[str],
    tasks: Sequence[str],
    max_samples: int | None,
    seed: int,
    shows: bool,
) -> list[_Part]:
    """What is asked, in order; `shows`: with demonstrations."""
    parts = []
    for cell, profiles in cells.items():
        for kind in (kind for kind in KINDS if kind in kinds):
            by_task = {
                task: _subsample(items, max_samples, seed, f"{cell}/{kind}/{task}", f"{cell}/{task}")
                for task in TASKS
                if task in tasks and (items := _items(profiles, kind, task))
            }
            parts.append(_Part(cell, kind, by_task, _demonstration(profiles, cell, kind, seed) if shows else None))
    return parts


class _Count:
    """How many questions are done, told to `progress`."""

    def __init__(self, total: int, progress: OnProgress | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def advance(self, questions: int, what: str) -> None:
        self.done += questions
        if self._progress is not None:
            self._progress(self.done, self.total, what)


class _Runner:
    """Asks one list of questions; every sample is a dict that goes to the log as it is."""

    def __init__(self, asker: Asker, rules: Rules, mode: str) -> None:
        self.asker, self.processor, self.rules, self.mode = asker, asker.processor, rules, mode

    def ask(self, part: _Part, count: _Count) -> list[dict[str, Any]]:
        samples = []
        for task, items in part.by_task.items():
            after, what = count.done + len(items), f"{part.cell} {part.kind} {task}"
            found = self.run(task, items, part.demonstration, part.cell, partial(count.advance, what=what))
            samples += [{"cell": part.cell, "kind": part.kind, "task": task, **sample} for sample in found]
            count.advance(after - count.done, what)  # a question shown as the demonstration is not asked
        return samples

    def run(
        self, task: str, items: list[_Item], demonstration: _Item | None, cell: str, tick: Tick
    ) -> list[dict[str, Any]]:
        if task == "generation":
            return self._generation(items, tick)
        if task == "cloze":
            return self._cloze(items, tick)
        if task == "description":
            return self._description(items, tick)
        if task == "truth":
            return self._truth(items, cell, tick)
        if self.rules.letters is not None:
            return self._letters(self.rules.letters, items, demonstration, cell, tick)
        return self._likelihoods(items, tick)

    def _score(self, items: list[_Item], answers: list[list[str]], tick: Tick) -> list[OptionScores]:
        queries = [chat_turn(self.processor, item.question.question, item.photos) for item in items]
        return self.asker.scores(queries, answers, tick)

    def _likelihoods(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        scores = self._score(items, [list(item.question.options.values()) for item in items], tick)
        samples = []
        for item, score in zip(items, scores, strict=True):
            letters = list(item.question.options)
            prediction = letters[score.best]
            samples.append(
                {
                    **_about(item),
                    "prediction": prediction,
                    "log_likelihood": dict(zip(letters, score.log_likelihood, strict=True)),
                    "tokens": dict(zip(letters, score.tokens, strict=True)),
                    "correct": prediction == item.question.answer,
                }
            )
        return samples

    def _letters(
        self, letters: Letters, items: list[_Item], demonstration: _Item | None, cell: str, tick: Tick
    ) -> list[dict[str, Any]]:
        shown = None
        if demonstration is not None and speaks_user_assistant(self.processor):
            shown = (demonstration.question, demonstration.photos)
        # The solved question would be a leaked answer: it is not asked.
        items = [item for item in items if shown is None or not _same(item, demonstration)]
        queries = [letters.query(self.processor, item.question, item.photos, shown) for item in items]
        samples = []
        for item, output in zip(items, self.asker.answers(queries, letters.max_new_tokens, tick), strict=True):
            prediction = letters.read(output, item.question, cell)
            correct = prediction == item.question.answer
            samples.append({**_about(item), "output": output, "prediction": prediction, "correct": correct})
        return samples

    def _truth(self, items: list[_Item], cell: str, tick: Tick) -> list[dict[str, Any]]:
        asked = [item.question for item in items]
        scores = self._score(items, [[q.answer, q.paraphrase, *q.perturbed] for q in asked], tick)
        losses = [[-value for value in score.normalised] for score in scores]
        log_ratios = log_truth_ratios([one[1] for one in losses], [one[2:] for one in losses], self.mode)
        return [
            {
                **_about(item),
                "loss": loss,
                "paraphrase_loss": paraphrase_loss,
                "perturbed_losses": perturbed_losses,
                "prob": probability(loss, perturbed_losses, cell),
                "log_truth_ratio": float(log_ratio),
                "truth_score": truth_score(float(log_ratio), cell),
            }
            for item, (loss, paraphrase_loss, *perturbed_losses), log_ratio in zip(
                items, losses, log_ratios, strict=True
            )
        ]

    def _answers(self, items: list[_Item], text: Callable[[str], str], tick: Tick) -> Iterator[tuple[_Item, str]]:
        queries = [self.rules.turn(self.processor, text(item.question.question), item.photos) for item in items]
        return zip(items, self.asker.answers(queries, self.rules.max_new_tokens, tick), strict=True)

    def _generation(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        return [
            {
                **_about(item),
                "output": output,
                **rouge(item.question.answer, output),
                "bleu": bleu(item.question.answer, output),
            }
            for item, output in self._answers(items, self.rules.generation_text, tick)
        ]

    def _cloze(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        right = self.rules.cloze_correct
        return [
            {**_about(item), "output": output, "correct": right(item.question.answer, output)}
            for item, output in self._answers(items, self.rules.cloze_text, tick)
        ]

    def _description(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        """The plain question in both modes: no benchmark asks what a photo shows beside who it is."""
        queries = [chat_turn(self.processor, item.question.question, item.photos) for item in items]
        outputs = self.asker.answers(queries, self.rules.max_new_tokens, tick)
        return [
            {**_about(item), "output": output, "correct": _plain(output) == _plain(item.question.answer_text)}
            for item, output in zip(items, outputs, strict=True)
        ]


def _plain(text: str) -> str:
    """A description without case, white space around it and a final point."""
    return text.strip().lower().removesuffix(".")


def _about(item: _Item) -> dict[str, Any]:
    """What a sample says of its question. `photo` finds it again where the data have moved since; `source`, which is
    for the reader, does not."""
    question = item.question
    place = item.photos[0].source if item.photos else item.source
    about = {"entity": item.entity, "source": place, "question": question.question}
    if item.photos:
        about["photo"] = item.photos[0].key
    for key in ("pair", "options"):
        if value := getattr(question, key, None):
            about[key] = value
    return about | {"answer": question.answer}


def _same(item: _Item, other: _Item | None) -> bool:
    return other is not None and item.entity == other.entity and item.question == other.question


def _items(profiles: list[Profile], kind: str, task: str) -> list[_Item]:
    items = []
    asked: set[tuple[Any, ...]] = set()
    for profile in profiles:
        questions = getattr(profile.visual if kind == "vqa" else profile.textual, task)
        if task == "truth":  # the mean over no wrong answers is not a number
            questions = tuple(question for question in questions if question.perturbed)
        if kind == "vqa":
            items += [
                _Item(profile.entity, profile.source, question, (photo,))
                for photo in profile.photos
                for question in questions
            ]
            continue
        for question in questions:
            options = tuple(question.options.items()) if isinstance(question, Choice) else ()
            identity = (profile.entity, question.question, question.answer, options)
            if identity not in asked:
                asked.add(identity)
                items.append(_Item(profile.entity, profile.source, question, ()))
    return items


def _subsample(items: list[_Item], limit: int | None, seed: int, name: str, pair_name: str) -> list[_Item]:
    """At most `limit` items, drawn by the seed and `name`. Items with pairs are drawn by their own names under
    `pair_name`, which both kinds share: so both forms of a question are in, or neither."""
    if limit is None or len(items) <= limit:
        return items
    if all(getattr(item.question, "pair", "") for item in items):
        lots = [zlib.crc32(f"{seed}/{pair_name}/{item.entity}/{item.question.pair}".encode()) for item in items]
        chosen = np.argsort(lots, kind="stable")[:limit]
    else:
        drawn = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen = drawn.choice(len(items), size=limit, replace=False)
    return [items[index] for index in sorted(chosen)]


def _demonstration(profiles: list[Profile], cell: str, kind: str, seed: int) -> _Item | None:
    """The paper's solved example: the first question of a drawn profile. Same for every model, by the seed."""
    if cell == _WITHOUT_DEMONSTRATION:
        return None
    able = [profile for profile in profiles if _items([profile], kind, "choice")]
    if not able:
        return None
    drawn = np.random.default_rng([seed, zlib.crc32(f"{cell}/{kind}/demonstration".encode())]).integers(len(able))
    return _items([able[drawn]], kind, "choice")[0]


def cell_figures(samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The figures of one cell and kind: fractions in [0, 1], or None where there is no such question.

    `accuracy`, `ci95` ([low, high], 95 % bootstrap over questions), `n`; `rouge_l` (F1), `rouge_l_ci95`, `rouge_1`,
    `rouge_2`, `rouge_l_recall`, `bleu`, `n_generation`; `cloze`, `cloze_ci95`, `n_cloze`; and only where there are such
    questions `answer_prob`, `answer_prob_ci95` (choices scored by likelihood); `prob`, `prob_ci95`, `truth_ratio`,
    `truth_ratio_ci95`, `n_truth`; `description`, `description_ci95`, `n_description`.
    """

    def values(task: str, key: str) -> list[float]:
        return [float(sample[key]) for sample in samples if sample["task"] == task]

    correct, rouge_l, cloze = values("choice", "correct"), values("generation", "rouge_l"), values("cloze", "correct")
    figures = {
        **with_interval("accuracy", correct, seed, "ci95"),
        "n": len(correct),
        **with_interval("rouge_l", rouge_l, seed),
    }
    for name in ("rouge_1", "rouge_2", "rouge_l_recall", "bleu"):
        figures[name] = float(np.mean(values("generation", name))) if rouge_l else None
    figures |= {"n_generation": len(rouge_l), **with_interval("cloze", cloze, seed), "n_cloze": len(cloze)}
    scored = [sample for sample in samples if sample["task"] == "choice" and "log_likelihood" in sample]
    if scored:
        figures |= with_interval("answer_prob", [math.exp(answer_log_probability(sample)) for sample in scored], seed)
    if prob := values("truth", "prob"):
        score = values("truth", "truth_score")
        figures |= {
            **with_interval("prob", prob, seed),
            **with_interval("truth_ratio", score, seed),
            "n_truth": len(prob),
        }
    if description := values("description", "correct"):
        figures |= {**with_interval("description", description, seed), "n_description": len(description)}
    return figures


def logged_samples(
    log: Path, mend: str, needed: Callable[[Mapping[str, Any]], Sequence[str]] = lambda sample: ()
) -> list[dict[str, Any]]:
    """Every line of the samples.jsonl of an evaluation, those that close a cell included.

    Raises DataError, naming file and line, for what cannot be read, a sample without one of the keys that it `needed`,
    and a value that no evaluation writes.
    """
    found = []
    for place, sample in json_lines(log, DataError, mend):
        if "finished" not in sample:
            for key, (holds, what) in _VALUES.items():
                if key in sample and not holds(sample[key]):
                    raise DataError(f"{place}: {key} is not {what}; {mend}")
            for key in ("cell", "task", *needed(sample)):
                if key not in sample:
                    raise DataError(f"{place}: a sample without {key}; {mend}")
            if "log_likelihood" in sample and "answer" in sample:
                for key in ("log_likelihood", "tokens"):
                    if not {sample["answer"], *sample.get("options", {})} <= set(sample.get(key, {})):
                        raise DataError(f"{place}: {key} lacks an option or the answer; {mend}")
        found.append(sample)
    return found


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What the values of a sample are, where it has them.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("cell", "kind", "task", "entity", "question", "photo", "answer"), (_is_text, "a text")),
    "options": (_each(_is_text), "an object of texts"),
    "correct": (lambda value: isinstance(value, bool), "true or false"),
    "log_likelihood": (_each(is_finite_number), "an object of finite numbers"),
    "tokens": (_each(lambda value: type(value) is int and value > 0), "an object of whole numbers above 0"),
    "rouge_l": (is_finite_number, "a finite number"),
}


class _Log:
    """Per-sample JSON lines, and after each cell's a line with its key, figures and the SHA-256 of its samples' lines.

    On opening, the cells whose key is in `keep` stay and everything else goes: other settings' cells, damaged ones,
    what a killed run left of an unfinished one."""

    def __init__(self, path: Path | None, keep: set[str]) -> None:
        self.path = path
        self.finished: dict[str, list[dict[str, Any]]] = {}  # key -> samples
        if path is None:
            return
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as kept:
                if keep and path.exists():
                    self._copy_finished(path, kept, keep)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _unwritable(path, error) from error

    def _copy_finished(self, path: Path, kept: TextIO, keep: set[str]) -> None:
        lines: list[str] = []
        samples: list[dict[str, Any]] = []
        damaged = False
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError):
                    content = None
                if not isinstance(content, dict):  # so is what a killed run left, but that has no closing line
                    damaged = True
                elif "finished" not in content:
                    lines.append(line)
                    samples.append(content)
                else:
                    key = content["finished"]
                    digest = _digest(lines)
                    whole = not damaged and content.get("sha256", digest) == digest
                    if whole and isinstance(key, str) and key in keep:
                        self.finished[key] = samples
                        kept.writelines([*lines, line])
                    lines, samples, damaged = [], [], False

    def add(self, samples: list[dict[str, Any]], closing: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            last = json.dumps({**closing, "sha256": _digest(lines)}, ensure_ascii=False) + "\n"
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines([*lines, last])
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: the evaluation log cannot be written ({error.strerror}); free space or choose another")
