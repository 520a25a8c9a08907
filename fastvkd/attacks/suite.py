"""All attacks on a few models, one model at a time, in pieces that a journal keeps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, get_args

from torch import nn

from fastvkd.attacks import fewshot, images, membership, paraphrase, perturb, probe, quantize, reverse
from fastvkd.attacks.asking import Asked, Examiner, Figures, chance_of, choices_of, figures, plain_query
from fastvkd.attacks.first_moves import condition_number
from fastvkd.attacks.journal import Journal
from fastvkd.attacks.relearning import Attacker, Relearning, held_and_judged, hold_out
from fastvkd.devices import free_memory
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.evaluation.people import examine
from fastvkd.evaluation.protocol import OnProgress
from fastvkd.models.answers import Query
from fastvkd.models.placement import Scattered
from fastvkd.options import AttackKind, Budget
from fastvkd.records import Photo, Profile

log = logging.getLogger("fastvkd")

KINDS = tuple(kind for kind in get_args(AttackKind) if kind != "all")  # in the order in which they run
QUESTION_KINDS = ("paraphrase", "fewshot", "reverse", "images", "quantize")
_EXAMPLES = 2000  # solved questions that few-shot prompts draw from
Loader = Callable[[], nn.Module]


def parse_kinds(kinds: Sequence[str]) -> list[str]:
    """The attacks in the order in which they run; `all` stands for every one. Raises SettingsError."""
    for kind in kinds:
        if kind not in get_args(AttackKind):
            raise SettingsError(f"kind={kind!r}: allowed are {', '.join(get_args(AttackKind))}")
    return [kind for kind in KINDS if "all" in kinds or kind in kinds]


def _leave_out(kind: str, wanted: list[str], named: Sequence[str], why: str) -> None:
    """Take a kind that data or models cannot serve from `wanted`. Raises DataError where the user named it."""
    if kind not in wanted:
        return
    if kind in named:
        raise DataError(f"{kind}: {why}; mend that or leave this kind out")
    log.warning("%s is left out: %s", kind, why)
    wanted.remove(kind)


@dataclass(frozen=True)
class Piece:
    """What is found of one model in one go. `facts` (JSON) tell it from other pieces, and hold all that it depends on
    beside the model, the data and the code."""

    facts: dict[str, Any]
    measure: Callable[[nn.Module], Any]
    label: str  # for whoever waits


@dataclass(frozen=True)
class Part:
    """One kind of attack: its pieces, the same for each model, and what comes of {model: what its pieces found}."""

    pieces: Sequence[Piece]
    result: Callable[[Mapping[str, list[Any]]], dict[str, Any]]
    models: Sequence[str] = ("vanilla", "unlearned", "gold")


@dataclass(frozen=True)
class Attack:
    """The models under attack (`unlearned`, and where they are at hand `vanilla`, the one before, and `gold`), and what
    an attacker has: data, as `evaluation_cells` gives them, and a budget.

    Models are loaded one at a time: each when the `journal` lacks something of it, and dropped before the next.
    `identities` says by name what a model's answers depend on, for the journal; `public` too.
    """

    models: Mapping[str, Loader]
    processor: Any
    cells: Mapping[str, list[Profile]]
    prepared: PreparedPhotos
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    progress: OnProgress = lambda *_: None
    reference: Sequence[Photo] = ()  # of strangers who are in none of the cells
    likeness: Mapping[str, float] | None = None  # of retained people, see `examine`
    public: Loader | None = None  # what everybody can download: the model before it learnt anything that is asked
    journal: Journal = field(default_factory=Journal)
    identities: Mapping[str, str] = field(default_factory=dict)
    scattered: Scattered = ""  # where the models' weights lie, if not on one device
    rounded: str = ""  # how the LLM is quantised as it is loaded, if it is

    @property
    def unseen(self) -> list[Profile]:
        return self.cells.get("test") or []

    def run(self, kinds: Sequence[str] = ("all",), *, evaluate: bool = False) -> dict[str, Any]:
        """Attack in the named kinds.

        Questions are about photos of forgotten people, known and unseen together; relearning and the perturbation are
        judged on unseen ones alone, or where there are none on those that `hold_out` keeps from the attacker.

        Returns, for the kinds that ran:
        - "questions": a list of {"kind", "variant", "chance", "figures": {model: {"accuracy", "ci95", "n"}}}, and for
          `quantize` "left_alone", the names of the linear layers that were not rounded;
        - "relearning": the rows of `Relearning.rows`, each with "judged_on", `unseen` or `held out`;
        - "membership": {model: {set: {score: AUC}}};
        - "probe": {"sites": [...], "models": {model: {site: {group: figures}}}};
        - "perturbation": a list of {"size" (in 255ths; 0 without one), "on" (`unseen` or `strangers`), "chance",
          "figures": {model: figures}};
        - with `evaluate` "evaluation", the figures of the cells (see `evaluate_cells`), and "people", those person by
          person (see `examine`), each by model.

        Raises DataError, before anything runs, where the data cannot serve a kind that is named: no second photo of
        anybody for `relearn` and `perturb`, fewer than two forgotten entities for `probe`; `all` leaves those out. Also
        without any multiple-choice question for the kinds that ask one.
        """
        wanted = parse_kinds(kinds)
        forget, retain = self.cells["forget"], self.cells["retain"]
        if not choices_of(self.unseen or hold_out(forget)[1], 1, self.seed):
            needs = "unseen photos of the forgotten entities (Test_Set, or test.jsonl), or several photos of one"
            for kind in ("relearn", "perturb"):
                _leave_out(kind, wanted, kinds, f"the data hold no {needs}, to judge by")
        if self.rounded:
            _leave_out("quantize", wanted, kinds, f"the LLM is loaded in {self.rounded} already")
        for kind in {"": (), "cards": ("relearn",), "host": ("relearn", "quantize", "perturb")}[self.scattered]:
            where = "on several cards" if self.scattered == "cards" else "partly in host memory"
            _leave_out(kind, wanted, kinds, f"the weights lie {where} (--device-map auto)")
        data = probe.ProbeData(forget, self.unseen, retain, seed=self.seed) if "probe" in wanted else None
        if data is None or "forget" not in data.groups:
            _leave_out("probe", wanted, kinds, "the data hold no two forgotten entities with two photos each")
        parts = [self._evaluation()] if evaluate else []
        if set(wanted) & set(QUESTION_KINDS):
            parts.append(self._questions(wanted))
        if "relearn" in wanted:
            parts.append(self._relearning())
        if "membership" in wanted:
            parts.append(self._membership())
        if "probe" in wanted and data is not None:
            parts.append(self._probe(data))
        if "perturb" in wanted:
            parts.append(self._perturbation())
        return self._results(parts)

    def _results(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Every piece of every model, from the journal or measured now, one model after the other."""
        found: list[dict[str, list[Any]]] = [{} for _ in parts]
        work = [
            (name, [(at, piece) for at, part in enumerate(parts) if name in part.models for piece in part.pieces])
            for name in self.models
        ]
        done, total = 0, sum(len(pieces) for _, pieces in work)
        for name, pieces in work:
            model = cache(self.models[name])
            for at, piece in pieces:
                self.progress(done, total, f"{name} {piece.label}")
                facts = {"model": name, "identity": self.identities.get(name, name), **piece.facts}
                value = self.journal.kept(facts, lambda piece=piece, model=model: piece.measure(model()))  # type: ignore[misc]
                found[at].setdefault(name, []).append(value)
                done += 1
            del model
            free_memory()
        return {key: value for part, of in zip(parts, found, strict=True) for key, value in part.result(of).items()}

    def examiner(self, model: nn.Module) -> Examiner:
        return Examiner(model, self.processor, self.budget.batch_size, self.prepared)

    def asked(self, model: nn.Module, asked: Sequence[Asked], queries: Sequence[Query] | None = None) -> Figures:
        """The figures of these questions, put plainly or as `queries` put them."""
        queries = self.plain(asked) if queries is None else queries
        return figures(self.examiner(model).right(asked, queries), self.seed)

    def plain(self, asked: Sequence[Asked]) -> list[Query]:
        return [plain_query(self.processor, one.choice.question, one.photo) for one in asked]

    def _piece(self, kind: str, measure: Callable[[nn.Module], Any], **facts: Any) -> Piece:
        asked = {"max_samples": self.budget.max_samples, "seed": self.seed}
        return Piece({"kind": kind, **facts, **asked}, measure, f"{kind} {facts.get('variant', '')}".strip())

    def _evaluation(self) -> Part:
        """Free answers are asked for only where they say something of people: where the data know strangers."""

        def measure(model: nn.Module) -> Any:
            return examine(
                model,
                self.processor,
                dict(self.cells),
                likeness=self.likeness,
                reference=self.reference,
                batch_size=self.budget.batch_size,
                seed=self.seed,
                tasks=("choice", "generation", "description") if "stranger" in self.cells else ("choice",),
                max_samples=self.budget.max_samples,
                photos=self.prepared,
                progress=self.progress,
            )

        def result(found: Mapping[str, list[Any]]) -> dict[str, Any]:
            return {
                key: {name: both[at] for name, (both,) in found.items()}
                for at, key in enumerate(("evaluation", "people"))
            }

        original = self.identities.get("vanilla") if self.likeness else None
        return Part([self._piece("evaluation", measure, original=original)], result)

    def _questions(self, kinds: Sequence[str]) -> Part:
        rows = _question_rows(self, kinds)

        def result(found: Mapping[str, list[Any]]) -> dict[str, Any]:
            collected = []
            for at, (row, _) in enumerate(rows):
                measured = {name: dict(of[at]) for name, of in found.items()}
                left_alone = [one.pop("left_alone") for one in measured.values() if "left_alone" in one]
                extra = {"left_alone": left_alone[0]} if left_alone else {}
                collected.append({**row, **extra, "figures": measured})
            return {"questions": collected}

        return Part([self._piece(row["kind"], of, variant=row["variant"]) for row, of in rows], result)

    def _relearning(self) -> Part:
        budget = self.budget
        relearning = Relearning(self.processor, self.cells, budget, public=self.public, prepared=self.prepared)

        spent = {
            "steps": budget.relearning_steps,
            "samples": budget.relearning_samples,
            "retained": budget.relearning_retained,
            "optim": budget.optim,
        }
        seeds = {"kind": "retained", "seeds": budget.relearning_seeds, **spent}
        pieces = [
            Piece({"kind": "condition"}, condition_number, "condition of the projector"),
            Piece(seeds, relearning.retained, "retained people"),
        ]
        for job in relearning.jobs:
            public = self.identities.get("public") if job.plan.variant.startswith("public") else None
            label = " ".join(["relearn", *map(str, job.names.values())])
            facts = {"kind": "relearn", **job.names, **spent, "public": public}
            pieces.append(Piece(facts, partial(relearning.curve, job=job), label))

        def result(found: Mapping[str, list[Any]]) -> dict[str, Any]:
            rows = relearning.rows(
                {name: curves for name, (_, _, *curves) in found.items()},
                {name: of[1] for name, of in found.items()},
                {name: of[0] for name, of in found.items()},
            )
            return {"relearning": [{**row, "judged_on": "unseen" if self.unseen else "held out"} for row in rows]}

        return Part(pieces, result, budget.relearning_models)

    def _membership(self) -> Part:
        limit = self.budget.max_samples
        members = choices_of(self.cells["forget"], limit, self.seed)
        sets = {"pairs": membership.pair_sets(members, self.seed)}
        if self.unseen:
            sets["photos"] = membership.photo_sets(members, choices_of(self.unseen, limit, self.seed))
        sets = {name: both for name, both in sets.items() if all(both)}

        def measure(model: nn.Module) -> Any:
            return membership.membership(model, self.processor, sets, seed=self.seed, batch_size=self.budget.batch_size)

        return Part(
            [self._piece("membership", measure)],
            lambda found: {"membership": {name: of for name, (of,) in found.items()}},
        )

    def _probe(self, data: probe.ProbeData) -> Part:
        def result(found: Mapping[str, list[Any]]) -> dict[str, Any]:
            by_model = {name: of for name, (of,) in found.items()}
            return {"probe": {"sites": list(next(iter(by_model.values()))), "models": by_model}}

        def measure(model: nn.Module) -> Any:
            return probe.probe(model, self.processor, data, probe.every_site(model))

        return Part([self._piece("probe", measure)], result)

    def _perturbation(self) -> Part:
        budget, seed = self.budget, self.seed
        known, judged = held_and_judged(self.cells)
        sets = perturb.judged_by(self.cells, judged, budget.max_samples, seed)
        photo = next(photo for profile in known for photo in profile.photos)
        sizes = (0, *budget.perturbations)
        attacker = cache(partial(Attacker, self.processor, known, seed=seed))

        def measure(model: nn.Module, size: int) -> dict[str, Figures]:
            if not size:
                return {name: self.asked(model, asked) for name, asked in sets.items()}
            found = perturb.find(
                model,
                self.processor,
                attacker(),
                photo,
                size=size / 255,
                steps=budget.perturbation_steps,
                micro_batch=budget.micro_batch,
                gradient_checkpointing=budget.gradient_checkpointing,
            )
            with found.added():
                return {name: self.asked(model, asked) for name, asked in sets.items()}

        def result(found: Mapping[str, list[Any]]) -> dict[str, Any]:
            return {
                "perturbation": [
                    {
                        "size": size,
                        "on": name,
                        "chance": chance_of(asked),
                        "figures": {model: of[at][name] for model, of in found.items()},
                    }
                    for name, asked in sets.items()
                    for at, size in enumerate(sizes)
                ]
            }

        steps = budget.perturbation_steps
        return Part(
            [self._piece("perturb", partial(measure, size=size), size=size, steps=steps) for size in sizes], result
        )


def _question_rows(
    target: Attack, kinds: Sequence[str]
) -> list[tuple[dict[str, Any], Callable[[nn.Module], dict[str, Any]]]]:
    """Kind, variant and chance of each way to ask, and what finds a model's figures; `quantize` adds "left_alone"."""
    cells, budget, seed, processor = target.cells, target.budget, target.seed, target.processor
    asked = choices_of([*cells["forget"], *target.unseen], budget.max_samples, seed)
    if not asked:
        raise DataError("attack: the forget set has no multiple-choice question about a photo; nothing can be asked")
    chance, plain = chance_of(asked), target.plain(asked)
    rows: list[tuple[dict[str, Any], Callable[[nn.Module], dict[str, Any]]]] = []

    def add(kind: str, variant: str, measure: Callable[[nn.Module], dict[str, Any]], chance: float = chance) -> None:
        rows.append(({"kind": kind, "variant": variant, "chance": chance}, measure))

    reworded = paraphrase.paraphrased(processor, asked) if "paraphrase" in kinds else {"plain": plain}
    for name, queries in reworded.items():
        kind = "plain" if name == "plain" else "paraphrase"
        add(kind, name, partial(target.asked, asked=asked, queries=queries))
    if "fewshot" in kinds:
        retained = choices_of(cells["retain"], _EXAMPLES, seed)
        for shots in budget.shots:
            queries = fewshot.few_shot(processor, asked, retained, shots, seed)
            add("fewshot", f"{shots}-shot", partial(target.asked, asked=asked, queries=queries))
    groups = reverse.groups_of(asked, budget.max_samples, seed) if "reverse" in kinds else []
    if groups:
        ask = partial(reverse.reverse, groups=groups, seed=seed)
        add("reverse", "which photo", lambda model: ask(target.examiner(model)), 1 / len(groups[0]))
    for edit in images.EDITS if "images" in kinds else ():
        add("images", edit, partial(target.asked, asked=images.with_edited_photos(asked, edit, seed)))
    for bits in quantize.BITS if "quantize" in kinds else ():

        def rounded(model: nn.Module, bits: str = bits) -> dict[str, Any]:
            with quantize.quantized(model, bits) as smaller:
                return {**target.asked(smaller, asked, plain), "left_alone": quantize.left_alone(smaller)}

        add("quantize", bits, rounded)
    return rows
