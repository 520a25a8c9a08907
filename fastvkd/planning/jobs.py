"""What export, evaluation and attacks take of cards and host, beside training, and how each fits.

Figures follow what the code allocates: a whole model, what goes through it at once, and what relearning adds.
Legend as in `cost.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fastvkd.devices import (
    GIB,
    WORKING_BYTES,
    at_once,
    decoder_pass_bytes,
    keys_and_values_bytes,
    packed_pass_bytes,
    tower_pass_bytes,
    usable_bytes,
)
from fastvkd.options import AttackKind, AttackOptions, EvalOptions
from fastvkd.planning.architecture import Architecture
from fastvkd.planning.cost import ASKED_ANSWER_TOKENS, ASKED_TOKENS, Cost, Recipe

_PACK_TOKENS = 128  # of further questions behind a photo's first one, at least
_RELEARNED = 16  # question-answer pairs in a step of relearning
_KINDS = [kind for kind in get_args(AttackKind) if kind != "all"]
_HOST = "spread over cards and host memory"


@dataclass(frozen=True)
class Job:
    """One command beside training: its `gpu_bytes` on each card and `host_bytes`, and in which way it `fits`; `how` is
    None where it fits in none."""

    name: str
    how: str | None
    command: str
    gpu_bytes: int
    host_bytes: int

    @property
    def fits(self) -> bool:
        return self.how is not None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"fits": self.fits}


class WholeModel:
    """Bytes of what is done with whole models of one architecture, with values of `itemsize` bytes."""

    def __init__(self, architecture: Architecture, itemsize: int = 2, *, asked_tokens: int = ASKED_TOKENS):
        self.architecture, self.itemsize = architecture, itemsize
        recipe = Recipe(sites=(f"llm:{architecture.llm.layers}",), bf16=itemsize == 2)
        self.cost = Cost(architecture, recipe, prefix_tokens=asked_tokens)
        checkpointed = dataclasses.replace(recipe, gradient_checkpointing=True)
        self._checkpointed = Cost(architecture, checkpointed, prefix_tokens=asked_tokens)
        self.prompt = architecture.visual_tokens + asked_tokens

    def weights(self, quantize: str = "none") -> int:
        return int(self.cost.whole_bytes(quantize))

    def asking(self, batch_size: int) -> int:
        """The largest of what scoring options, answering, and the tower's pass take beside the weights, as many
        questions or photos going at once as `devices.at_once` allows."""
        a, s = self.architecture, self.itemsize
        wide = {"hidden": a.llm.hidden, "intermediate": a.llm.intermediate, "itemsize": s}
        kept = keys_and_values_bytes(self.prompt, a.llm.layers, a.llm.kv_heads * a.llm.head_dim, s)
        tower_kept = a.tower.blocks if a.tower.mlp_matrices == 2 else 0  # LLaVA's keep all blocks' outputs
        each = (
            packed_pass_bytes(self.prompt + max(_PACK_TOKENS, self.prompt), **wide),
            decoder_pass_bytes(self.prompt, **wide) + kept,
            tower_pass_bytes(a.tower.crops * a.tower.tokens, a.tower.hidden, a.tower.intermediate, s, tower_kept),
        )
        return max(at_once(one, batch_size) * one for one in each)

    def relearning(self, *, everything: bool, quantize: str = "none", gently: bool = False) -> int:
        """A model that is trained on answers, all of it or its visual part: weights, float32 masters, moments,
        gradients and activations. What is quantised stays as it is. `gently`: one pair at a time, checkpointed."""
        s, llm = self.itemsize, self.architecture.llm
        trained = self.cost.trainable
        if everything:
            rounded = llm.layers * llm.matrices if quantize != "none" else 0
            trained = int(self.cost.whole_bytes()) // s - rounded
        activations = self._passed_back(everything=everything, quantize=quantize, gently=gently)
        held = self.weights(quantize) + (4 * trained if s < 4 else 0) + 8 * trained
        # Of one batch gradients come as activations go; of several they stay.
        return int(held + (4 * trained + activations if gently else max(4 * trained, activations)))

    def perturbing(self, quantize: str = "none", *, gently: bool = False) -> int:
        """A frozen model through which gradients go to the pixels."""
        return int(self.weights(quantize) + self._passed_back(everything=False, quantize=quantize, gently=gently))

    def _passed_back(self, *, everything: bool, quantize: str, gently: bool) -> float:
        """What a step of question-answer pairs keeps for its way back."""
        s, llm = self.itemsize, self.architecture.llm
        cost = self._checkpointed if gently else self.cost
        pair = cost.activation_bytes_per_image() + cost.unused_block_bytes()
        if everything:
            # trained layers keep more: what both norms scale and give, and what goes into the two ways out
            inputs = 4 * llm.hidden + (llm.attention_width + llm.intermediate if quantize == "none" else 0)
            pair += (1 if gently else llm.layers) * self.cost.tokens * inputs * s
        return (1 if gently else _RELEARNED) * (pair + 3 * ASKED_ANSWER_TOKENS * llm.vocabulary * 4)

    def exporting(self) -> int:
        """Bytes of host memory: the largest visual tensor, as stored and as trained, in float32."""
        tower, projector = self.architecture.tower, self.architecture.projector
        largest = max(tower.hidden * tower.intermediate, *(i * o for i, o in projector.layers))
        return 2 * 4 * largest


def other_jobs(architecture: Architecture, memory_bytes: int | None, cards: int = 1) -> list[Job]:
    """Export, evaluation and attack of a model on so many cards of one kind, each in the first way that fits, from the
    fastest exact one on; without a card, as it is."""
    model = WholeModel(architecture)
    room = max(WORKING_BYTES, model.asking(EvalOptions.batch_size))
    evaluate = "fastvkd eval --model merged --data DATA"
    attack = "fastvkd attack --model merged --before MODEL --data DATA"
    found = [Job("export", "without a GPU", "fastvkd export --run RUN --to merged", 0, model.exporting())]
    found.append(_first("eval", _ways(model, evaluate, room, cards), memory_bytes, cards))
    room = max(WORKING_BYTES, model.asking(AttackOptions.batch_size))
    found.append(_first("attack", _attack_ways(model, attack, room, cards), memory_bytes, cards))
    return found


@dataclass(frozen=True)
class _Way:
    """A way to do a job: bytes of weights that must be held, of `least` of them on a card, and what each card keeps
    free. With weights in host memory a card also keeps room for the `coming` ones."""

    how: str
    command: str
    held: int
    room: int
    least: int | None = None  # None: all of it on one card
    coming: int = 0

    def needs(self, memory_bytes: int | None, cards: int) -> tuple[int, int, bool]:
        """Bytes on each card, bytes of host memory, and whether that fits."""
        if self.least is None or memory_bytes is None:
            total = self.held + self.room
            return total, 0, memory_bytes is None or total <= usable_bytes(memory_bytes)
        free = usable_bytes(memory_bytes) - self.room
        away = self.held + self.coming - max(0, cards * free)
        if "host" not in self.how:
            return self.held // cards + self.room, 0, away <= 0
        return min(self.held // cards, max(free, self.least)) + self.room, max(0, away), self.least <= free


def _ways(model: WholeModel, command: str, room: int, cards: int) -> Iterator[_Way]:
    least = int(model.cost.least_bytes())
    yield _Way("as it is", command, model.weights(), room)
    if cards > 1:
        yield _Way(_over(cards), f"{command} --device-map auto", model.weights(), room, least)
    yield _Way("in nf4", f"{command} --quantize nf4", model.weights("nf4"), room)
    yield _Way(_HOST, f"{command} --device-map auto", model.weights(), room, least, int(model.cost.coming_bytes()))


def _attack_ways(model: WholeModel, command: str, room: int, cards: int) -> Iterator[_Way]:
    """All kinds first, then relearning of the visual weights alone, then without what needs gradients or changes
    weights. One model is held at a time."""
    least, exact = int(model.cost.least_bytes()), model.weights()
    gently = " --micro-batch 1 --gradient-checkpointing"
    for quantize, flag, how in (("none", "", "as it is"), ("nf4", " --quantize nf4", "in nf4")):
        one, asked = model.weights(quantize), command + flag
        most = max(model.relearning(everything=every, quantize=quantize) for every in (False, True))
        yield _Way(how, asked, one, max(room, most - one))
        visual = model.relearning(everything=False, quantize=quantize, gently=True)
        yield _Way(f"{how}, visual weights relearnt", f"{asked} --weights visual{gently}", one, max(room, visual - one))
        passed = model.perturbing(quantize, gently=True)
        yield _Way(f"{how}, but for relearn", asked + gently + _but("relearn"), one, max(room, passed - one))
        asked_alone = ", but for relearn and perturb"
        if cards > 1 and quantize == "none":
            spread = f"{command} --device-map auto{_but('relearn', 'perturb')}"
            yield _Way(_over(cards) + asked_alone, spread, exact, room, least)
        yield _Way(how + asked_alone, asked + _but("relearn", "perturb"), one, room)
    spread = f"{command} --device-map auto{_but('relearn', 'quantize', 'perturb')}"
    how = f"{_HOST}, but for relearn, quantize and perturb"
    yield _Way(how, spread, exact, room, least, int(model.cost.coming_bytes()))


def _but(*left_out: str) -> str:
    return f" --kind {' '.join(kind for kind in _KINDS if kind not in left_out)}"


def _over(cards: int) -> str:
    return f"spread over {cards} cards"


def _first(name: str, ways: Iterator[_Way], memory_bytes: int | None, cards: int) -> Job:
    for way in ways:
        gpu, host, fits = way.needs(memory_bytes, cards)
        if fits:
            return Job(name, way.how, way.command, gpu, host)
    return Job(name, None, way.command, gpu, host)


def lines_of(jobs: Sequence[Job]) -> list[str]:
    """A line for each job, for people."""
    lines = []
    for job in jobs:
        where = [f"{job.gpu_bytes / GIB:.1f} GiB on each GPU"] if job.gpu_bytes else []
        where += [f"{job.host_bytes / GIB:.1f} GiB in host memory"] if job.host_bytes else []
        lines.append(f"{job.name:<23} {job.how or 'does not fit'}, {' and '.join(where)}: {job.command}")
    return lines
