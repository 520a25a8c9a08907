"""The evaluation protocol: cells (forget, test, retain, realworld) x kinds (vqa: about the photo, qa: about the text) x
tasks (choice, generation, cloze, truth), with intervals, a log of every sample, and finished cells kept across runs.

docs/data.md says where the modes `corrected` and `paper` differ and why.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import nn

from fastvkd.data.records import Choice, Photo, Profile
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.benchmarks import BENCHMARKS
from fastvkd.evaluation.cloze import cloze_correct
from fastvkd.evaluation.generation import (
    bleu,
    generate_embedded,
    generate_with_processor,
    generation_query,
    rouge,
)
from fastvkd.evaluation.inputs import Embedder, PreparedPhotos, Query, Tick, embeddable
from fastvkd.evaluation.multiple_choice import (
    OptionScores,
    score_options,
    score_options_packed,
    speaks_user_assistant,
)
from fastvkd.evaluation.statistics import bootstrap_interval
from fastvkd.evaluation.truth_ratio import log_truth_ratios, probability, truth_score
from fastvkd.models.prompts import chat_prompt

MODES = ("corrected", "paper")
TASKS = ("choice", "generation", "cloze", "truth")
KINDS = ("vqa", "qa")
# The paper gives no demonstration for the celebrities, the real-world cell.
_WITHOUT_DEMONSTRATION = "realworld"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Item:
    """A question about one entity, with its photo for VQA."""

    entity: str
    source: str
    question: Any
    photos: tuple[Photo, ...]


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
    progress: Progress | None = None,
    max_samples: int | None = None,
    tasks: Sequence[str] = TASKS,
    kinds: Sequence[str] = KINDS,
    fingerprint: str | None = None,
    photos: PreparedPhotos | None = None,
    fast: bool | None = None,
    collect: list[dict[str, Any]] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate every cell; returns `{cell: {"vqa": figures, "qa": figures}}`.

    `figures` are fractions in [0, 1], or None where a cell has no such question: `accuracy`, `ci95` ([low, high], 95 %
    bootstrap over questions), `n`; `rouge_l` (F1), `rouge_l_ci95`, `rouge_1`, `rouge_2`, `rouge_l_recall`, `bleu`,
    `n_generation`; `cloze`, `cloze_ci95`, `n_cloze`; and only where there are such questions `prob`, `prob_ci95`,
    `truth_ratio`, `truth_ratio_ci95`, `n_truth`.

    `benchmark` (`mllmu`, `clear`, `umu`, `jsonl`) chooses the prompts and readings of paper mode and the length of free
    answers.

    `max_samples` draws at most that many questions per cell, kind and task, seeded and the same for every model; of
    questions that exist in both kinds (`pair`) the same ones are drawn. Questions of the task `truth` without a wrong
    answer to compare with are left out. Text questions that several rows of an entity repeat are asked once. `log_path`
    gets one JSON line per question, with the raw output or the score of every option. With a `fingerprint` of the model
    (and of whatever else shapes its answers: dtype, processor), cells that the log already holds for the same
    fingerprint, settings and questions are taken from there; without one the log is written anew. `collect` gets every
    sample as it stands in the log, those of kept cells too. `progress(done, total, what)` is called after every batch.
    `photos` keeps decoded photos across calls. `fast` forces or forbids the embedding path; None chooses it where the
    family allows.

    Raises `SettingsError` for an unknown benchmark, mode, task or kind or a number below 1, and `DataError` for a photo
    that cannot be decoded or a log that cannot be written.
    """
    names = (("benchmark", [benchmark], tuple(BENCHMARKS)), ("mode", [mode], MODES))
    for name, values, allowed in (*names, ("tasks", tasks, TASKS), ("kinds", kinds, KINDS)):
        for value in values:
            if value not in allowed:
                raise SettingsError(f"{name}: unknown value {value!r}; allowed: {', '.join(allowed)}")
    check_counts(batch_size=batch_size, max_samples=max_samples)
    plan = {
        (cell, kind): {
            task: _subsample(items, max_samples, seed, f"{cell}/{kind}/{task}", f"{cell}/{task}")
            for task in TASKS
            if task in tasks and (items := _items(profiles, kind, task))
        }
        for cell, profiles in cells.items()
        for kind in KINDS
        if kind in kinds
    }
    photos = photos if photos is not None else PreparedPhotos(processor)
    fast = embeddable(model) if fast is None else fast
    embedder = Embedder(model, processor, batch_size, photos) if fast else None
    runner = _Runner(model, processor, embedder, batch_size, mode, benchmark)
    shows = mode == "paper" and BENCHMARKS[benchmark].demonstration
    demonstrations = {
        (cell, kind): _demonstration(cells[cell], cell, kind, seed) if shows else None for cell, kind in plan
    }
    settings = {
        "fingerprint": fingerprint,
        "benchmark": benchmark,
        "mode": mode,
        "seed": seed,
        "max_samples": max_samples,
    }
    keys = {
        (cell, kind): _key([settings, cell, kind], by_task, demonstrations[cell, kind], photos)
        for (cell, kind), by_task in plan.items()
    }
    log = _Log(
        Path(log_path) if log_path is not None else None, set(keys.values()) if fingerprint is not None else set()
    )
    total = sum(len(items) for by_task in plan.values() for items in by_task.values())
    done = 0

    def advance(questions: int, what: str) -> None:
        nonlocal done
        done += questions
        if progress is not None:
            progress(done, total, what)

    results: dict[str, dict[str, dict[str, Any]]] = {cell: {} for cell in cells}
    for (cell, kind), by_task in plan.items():
        key = keys[cell, kind]
        if key in log.finished:
            figures, samples = log.finished[key]
            advance(sum(len(items) for items in by_task.values()), f"{cell} {kind} (kept)")
        else:
            samples = []
            for task, items in by_task.items():
                before, what = done, f"{cell} {kind} {task}"
                found = runner.run(task, items, demonstrations[cell, kind], cell, partial(advance, what=what))
                samples += [{"cell": cell, "kind": kind, "task": task, **sample} for sample in found]
                advance(before + len(items) - done, what)  # a question shown as the demonstration is not asked
            figures = _figures(samples, seed)
            log.add(samples, {"finished": key, "cell": cell, "kind": kind, "figures": figures})
        results[cell][kind] = figures
        if collect is not None:
            collect += samples
    return results


def check_counts(*, batch_size: int, max_samples: int | None) -> None:
    """Raise `SettingsError` for a number that leaves nothing to ask."""
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise SettingsError(f"{name}: {value}; at least 1 is needed")


class _Runner:
    """Asks one list of questions; every sample is a dict that goes to the log as it is."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        embedder: Embedder | None,
        batch_size: int,
        mode: str,
        benchmark: str,
    ) -> None:
        self.model, self.processor, self.embedder = model, processor, embedder
        self.batch_size, self.mode, self.benchmark = batch_size, mode, BENCHMARKS[benchmark]

    def run(
        self, task: str, items: list[_Item], demonstration: _Item | None, cell: str, tick: Tick
    ) -> list[dict[str, Any]]:
        if task == "generation":
            return self._generation(items, tick)
        if task == "cloze":
            return self._cloze(items, tick)
        if task == "truth":
            return self._truth(items, cell, tick)
        if self.mode == "paper":
            return self._letters(items, demonstration, cell, tick)
        return self._likelihoods(items, tick)

    def generate(self, queries: list[Query], max_new_tokens: int, tick: Tick) -> list[str]:
        if self.embedder is not None:
            return generate_embedded(self.embedder, queries, max_new_tokens, tick)
        return generate_with_processor(self.model, self.processor, queries, self.batch_size, max_new_tokens, tick)

    def _score(self, items: list[_Item], answers: list[list[str]], tick: Tick) -> list[OptionScores]:
        queries = [
            Query(chat_prompt(self.processor, item.question.question, image=bool(item.photos)), item.photos)
            for item in items
        ]
        if self.embedder is not None:
            return score_options_packed(self.embedder, queries, answers, tick)
        return score_options(self.model, self.processor, queries, answers, self.batch_size, tick)

    def _likelihoods(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        scores = self._score(items, [list(item.question.options.values()) for item in items], tick)
        samples = []
        for item, score in zip(items, scores, strict=True):
            letters = list(item.question.options)
            prediction = letters[score.best]
            samples.append(
                {
                    **_about(item),
                    "options": item.question.options,
                    "answer": item.question.answer,
                    "prediction": prediction,
                    "log_likelihood": dict(zip(letters, score.log_likelihood, strict=True)),
                    "tokens": dict(zip(letters, score.tokens, strict=True)),
                    "correct": prediction == item.question.answer,
                }
            )
        return samples

    def _truth(self, items: list[_Item], cell: str, tick: Tick) -> list[dict[str, Any]]:
        asked = [item.question for item in items]
        scores = self._score(items, [[q.answer, q.paraphrase, *q.perturbed] for q in asked], tick)
        losses = [[-value for value in score.normalised] for score in scores]
        log_ratios = log_truth_ratios([one[1] for one in losses], [one[2:] for one in losses], self.mode)
        return [
            {
                **_about(item),
                "answer": item.question.answer,
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

    def _letters(self, items: list[_Item], demonstration: _Item | None, cell: str, tick: Tick) -> list[dict[str, Any]]:
        shown = None
        if demonstration is not None and speaks_user_assistant(self.processor):
            shown = (demonstration.question, demonstration.photos)
        # The solved question would be a leaked answer: it is not asked.
        items = [item for item in items if shown is None or not _same(item, demonstration)]
        queries = [self.benchmark.choice_query(self.processor, item.question, item.photos, shown) for item in items]
        samples = []
        for item, output in zip(items, self.generate(queries, self.benchmark.choice_tokens, tick), strict=True):
            prediction = self.benchmark.read_choice(output, item.question, cell)
            samples.append(
                {
                    **_about(item),
                    "options": item.question.options,
                    "answer": item.question.answer,
                    "output": output,
                    "prediction": prediction,
                    "correct": prediction == item.question.answer,
                }
            )
        return samples

    def _generation(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        mode = self.mode if self.benchmark.instructed else "corrected"
        queries = [generation_query(self.processor, item.question, item.photos, mode) for item in items]
        return [
            {
                **_about(item),
                "answer": item.question.answer,
                "output": output,
                **rouge(item.question.answer, output),
                "bleu": bleu(item.question.answer, output),
            }
            for item, output in zip(items, self.generate(queries, self.benchmark.max_new_tokens, tick), strict=True)
        ]

    def _cloze(self, items: list[_Item], tick: Tick) -> list[dict[str, Any]]:
        queries = [self.benchmark.cloze_query(self.processor, item.question, item.photos, self.mode) for item in items]
        truth = self.benchmark.cloze_truth if self.mode == "paper" else str
        return [
            {
                **_about(item),
                "answer": item.question.answer,
                "output": output,
                "correct": cloze_correct(truth(item.question.answer), output, self.mode),
            }
            for item, output in zip(items, self.generate(queries, self.benchmark.max_new_tokens, tick), strict=True)
        ]


def _about(item: _Item) -> dict[str, Any]:
    place = item.photos[0].source if item.photos else item.source
    pair = getattr(item.question, "pair", "")
    about = {"entity": item.entity, "source": place, "question": item.question.question}
    return {**about, "pair": pair} if pair else about


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


def _figures(samples: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    def values(task: str, key: str) -> list[float]:
        return [float(sample[key]) for sample in samples if sample["task"] == task]

    def mean(numbers: list[float]) -> float | None:
        return float(np.mean(numbers)) if numbers else None

    def interval(numbers: list[float]) -> list[float] | None:
        return list(bootstrap_interval(numbers, seed=seed)) if numbers else None

    correct, rouge_l, cloze = values("choice", "correct"), values("generation", "rouge_l"), values("cloze", "correct")
    truth: dict[str, Any] = {}
    if prob := values("truth", "prob"):
        score = values("truth", "truth_score")
        truth = {
            "prob": mean(prob),
            "prob_ci95": interval(prob),
            "truth_ratio": mean(score),
            "truth_ratio_ci95": interval(score),
            "n_truth": len(prob),
        }
    return {
        "accuracy": mean(correct),
        "ci95": interval(correct),
        "n": len(correct),
        "rouge_l": mean(rouge_l),
        "rouge_l_ci95": interval(rouge_l),
        **{name: mean(values("generation", name)) for name in ("rouge_1", "rouge_2", "rouge_l_recall", "bleu")},
        "n_generation": len(rouge_l),
        "cloze": mean(cloze),
        "cloze_ci95": interval(cloze),
        "n_cloze": len(cloze),
        **truth,
    }


def _key(
    settings: list[Any], by_task: dict[str, list[_Item]], demonstration: _Item | None, photos: PreparedPhotos
) -> str:
    """What a finished cell depends on: another model, setting, question or photo gives another key."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for task, items in [*by_task.items(), ("demonstration", [demonstration] if demonstration is not None else [])]:
        for item in items:
            content = [task, item.entity, asdict(item.question), [photos.key(photo) for photo in item.photos]]
            digest.update(json.dumps(content).encode())
        digest.update(b";")
    return digest.hexdigest()


class _Log:
    """Per-sample JSON lines, and after each cell's a line with its key and figures. On opening, the cells whose key is
    in `keep` stay and everything else goes: other settings' cells, what a killed run left of an unfinished one."""

    def __init__(self, path: Path | None, keep: set[str]) -> None:
        self.path = path
        self.finished: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}  # key -> figures, samples
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
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    content = json.loads(line)
                except json.JSONDecodeError:
                    continue  # torn when a run was killed: its cell has no closing line
                lines.append(line)
                if "finished" in content:
                    if content["finished"] in keep:
                        self.finished[content["finished"]] = content["figures"], samples
                        kept.writelines(lines)
                    lines, samples = [], []
                else:
                    samples.append(content)

    def add(self, samples: list[dict[str, Any]], closing: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [*samples, closing])
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: the evaluation log cannot be written ({error.strerror}); free space or choose another")
