"""The scrub: an edit of the LLM, which has to be asked for.

Training the visual part moves a person's photos away from the code that the LLM reads. The LLM still reads that code,
and a few steps of relearning join the two again. Here low-rank adapters teach the LLM to answer such features as the
original answers about a stranger: features on the way from the unlearned tower to the original's, those that an
attacker's map of them makes, and the worst nearby (latent adversarial training, arXiv 2407.15549). Everything else is
held to the original's own answers: what the photos show, other people, synthetic images, and all text.

Legend: B questions, N visual tokens of a batch, H width, R rank.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.data.wording import question_answer_pairs
from fastvkd.devices import WORKING_BYTES
from fastvkd.models import families, lora
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.models.families import family_of
from fastvkd.models.loading import checkpoint_layers
from fastvkd.models.visual_path import VisualPath
from fastvkd.records import Profile
from fastvkd.settings import Scrub, Settings
from fastvkd.unlearning.answers import Answers, read_answers, text_questions
from fastvkd.unlearning.vkd.asking import Asker
from fastvkd.unlearning.vkd.images import ImageSet, Views
from fastvkd.unlearning.vkd.scenes import Scenes, draw_scenes
from fastvkd.unlearning.vkd.stranger import (
    Maps,
    Population,
    StrangerMap,
    asked_bytes,
    divergence,
    identity_questions,
    neutral_questions,
    options_of,
)

log = logging.getLogger("fastvkd")

Pair = tuple[str, str]  # question, answer
_SITE = "projector"  # where an attacker's features enter
_BEYOND = 1.3  # how far the way from the unlearned features to the original's goes on, in its own length
_MAPPED = 0.5  # share of the photos that an attacker's map has moved
_MAP_RANK, _MAP_RATE = 8, 0.02  # of those maps; a step, in standard deviations of others' features
_LIFE = 15  # steps of an attacker's map before another begins anew, on average
_BESIDE = 0.4  # share of others' photos that stand beside somebody's
_STRANGERS_ASKED, _ASKED_ABOUT = 32, 8  # strangers whose usual answer counts; photos of each person that are described


@dataclass(frozen=True)
class Kept:
    """What must stay: positions of retained people's photos and their own questions, of strangers, and of synthetic
    images; text questions. lenders: photos that may stand beside others."""

    retained: Sequence[tuple[int, Sequence[Pair]]]
    strangers: Sequence[int]
    synthetic: Sequence[int]
    texts: Sequence[Pair]
    lenders: range

    @classmethod
    def of(
        cls,
        retain: Sequence[Profile],
        forget: Sequence[Profile],
        at: dict[str, int],
        *,
        strangers: Sequence[int],
        synthetic: Sequence[int],
        lenders: range,
    ) -> "Kept":
        """What the data say of it; `at` is each photo's position by its key. Text about the forgotten stays too."""
        retained = [
            (at[photo.key], pairs)
            for profile in retain
            for photo in profile.photos
            if (pairs := question_answer_pairs(profile.visual))
        ]
        texts = [(question, answer) for _, question, answer in text_questions([*retain, *forget])]
        return cls(retained, strangers, synthetic, texts, lenders)


def scrub_room(settings: Settings, images: ImageSet, unlearned: nn.Module) -> int:
    """Bytes that the scrub takes of a card beside the whole original's weights; `planning` counts the same more finely.

    The unlearned model, with the masters and moments that its optimiser keeps of what is trained; the adapters, with
    their gradients and moments; and a step's activations.
    """
    assert settings.scrub is not None
    text: Any = images.config.text_config
    itemsize = 2 if settings.bf16 else 4
    each = (4 if settings.bf16 else 0) + (2 if "8bit" in settings.optim else 8)
    kept = sum(p.nbytes + p.numel() * each * p.requires_grad for p in unlearned.parameters())
    sides = text.num_hidden_layers * (11 * text.hidden_size + 3 * text.intermediate_size)
    adapters = 4 * itemsize * settings.scrub.rank * sides
    return WORKING_BYTES + kept + adapters + settings.scrub.photos * asked_bytes(settings, images, together=False)


class Scrubber:
    """Finds the adapters of the LLM through the whole original.

    Args:
        model: the whole original; its linear layers get adapters.
        unlearned: a model with the unlearned tower and projector, of which no more need be loaded.
        maps: what makes each forgotten person a stranger, by site.
    """

    def __init__(
        self,
        model: Any,
        unlearned: nn.Module,
        processor: Any,
        images: ImageSet,
        population: Population,
        maps: Maps,
        kept: Kept,
        settings: Settings,
    ):
        assert settings.scrub is not None
        self.model, self.images, self.population, self.kept = model, images, population, kept
        self.told: Scrub = settings.scrub
        self.seed, self._processor = settings.seed, processor
        self.device = next(model.parameters()).device
        model.requires_grad_(False)
        self._rng = np.random.default_rng([settings.seed, 51])
        self.asker = Asker(model, processor, images)
        # What is generated is generated before adapters and checkpoints are there.
        self.photos = [(e, photo) for e, mine in enumerate(population.people) for photo in mine]
        self.identity = [identity_questions(mine) for mine in population.profiles]
        self.neutral = neutral_questions(population.profiles)
        self.usual = self._usual_answers()
        self.described = self._described()
        self.asked = [_asked(mine) for mine in population.profiles]
        self.options = [_options(mine) or asked for mine, asked in zip(population.profiles, self.asked, strict=True)]
        self.site, found = next(iter(maps.items()))
        self.maps = [map_.to(self.device) for map_ in found]
        self._original, self._unlearned = VisualPath(model, [_SITE]), VisualPath(unlearned, [_SITE])
        self._deviation, self._distance = self._scales()
        if settings.gradient_checkpointing:
            checkpoint_layers(model)
        names = {id(module): name for name, module in model.named_modules()}
        llm = families.language_model(model, family_of(model))
        rank = self.told.rank
        self.adapters = lora.add_adapters(llm, names, rank=rank, alpha=rank, seed=settings.seed)
        self._attackers: list[StrangerMap] = []
        self._drawn = torch.Generator().manual_seed(settings.seed)
        self._attack: torch.optim.Optimizer | None = None
        self._left = 0

    def run(self, progress: Callable[[int, int, dict[str, float]], None]) -> dict[str, Tensor]:
        """The adapters by name, to be folded in with alpha = rank; `progress(done, total, terms)` is called."""
        told, trained = self.told, [p for _, p in self.adapters]
        optimizer = torch.optim.AdamW(trained, lr=told.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _one_cycle(done / told.steps))
        for step in range(told.steps):
            optimizer.zero_grad()
            terms = self._forget(step)
            terms |= self._keep(step)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            progress(step + 1, told.steps, terms)
        return {name: p.detach().cpu() for name, p in self.adapters}

    def _forget(self, step: int) -> dict[str, float]:
        """The gradient of the forgotten people's side of a step; its terms."""
        rng, count = self._rng, self.told.photos
        drawn = [self.photos[i] for i in rng.integers(len(self.photos), size=count)]
        people, seen = [e for e, _ in drawn], [photo for _, photo in drawn]
        views = Views((self.seed, 52, step), range(count), count)
        own = [_one(self.asked[e], rng) for e in people]
        who = [self._about_who(e, pair) for e, pair in zip(people, own, strict=True)]
        what = [_one(self.described[e], rng) for e in people]
        pixels = self.images.batch(seen, views).to(self.device)
        with torch.no_grad():
            here, there = (p(pixels)[_SITE].gathered().float() for p in (self._unlearned, self._original))
        with self.asker.same_images():
            rows = self._hostile(self.asker.batch(seen, own, views), here, there, people)
            about_who, about_what = self.asker.batch(seen, who, views), self.asker.batch(seen, what, views)
            with torch.no_grad(), self._without_adapters():
                as_stranger = self.asker.read(about_who, self.site, self._mapped(people))
                as_before = self.asker.read(about_what)
            said = self.asker.read(about_who, _SITE, lambda *_: rows)
            kept = self.asker.read(about_what, _SITE, lambda *_: rows)
        gone, left = _apart(said, as_stranger), _apart(kept, as_before)
        (gone + left).backward()
        return {"loss_who": float(gone.detach()), "loss_what": float(left.detach())}

    def _keep(self, step: int) -> dict[str, float]:
        """The gradient of what must stay; its terms."""
        rng, count, kept = self._rng, self.told.photos, self.kept
        shown: list[int] = []
        asked: list[Pair] = []
        for i in rng.integers(len(kept.retained), size=count):
            photo, mine = kept.retained[i]
            shown.append(photo)
            asked.append(_one(mine, rng) if rng.random() < 0.5 else self._about_what())
        for i in rng.integers(len(kept.strangers), size=count // 2) if kept.strangers else ():
            shown.append(kept.strangers[i])
            asked.append(self._as_usual() if rng.random() < 0.5 else self._about_what())
        for i in rng.integers(len(kept.synthetic), size=count // 2) if kept.synthetic else ():
            shown.append(kept.synthetic[i])
            asked.append(_one(kept.texts, rng) if kept.texts and rng.random() < 0.5 else self._about_what())
        views = Views((self.seed, 53, step), range(len(shown)), len(shown))
        batch = self.asker.batch(shown, asked, views)
        pixels = self.images.batch(shown, views, self._beside(views, shown)).to(self.device)
        with torch.no_grad():
            rows, theirs = (p(pixels)[_SITE].gathered().float() for p in (self._unlearned, self._original))
        with self.asker.same_images():
            with torch.no_grad(), self._without_adapters():
                before = self.asker.read(batch, _SITE, lambda *_: theirs)
            terms = {"loss_kept": _apart(self.asker.read(batch, _SITE, lambda *_: rows), before)}
        (self.told.keep * terms["loss_kept"]).backward()
        if kept.texts:
            texts = self._texts(count)
            with torch.no_grad(), self._without_adapters():
                before = read_answers(self.model, texts)
            terms["loss_text"] = _apart(read_answers(self.model, texts), before)
            (self.told.keep * terms["loss_text"]).backward()
        return {name: float(term.detach()) for name, term in terms.items()}

    def _beside(self, views: Views, shown: Sequence[int]) -> Scenes | None:
        """Some photos stand beside somebody, where it is known which tokens show whom."""
        lenders = self.kept.lenders
        if not self.images.fixed_resolution:
            return None
        movable = [i in lenders for i in shown]
        return draw_scenes(views.seed, views.positions, views.total, movable, lenders, 0.0, _BESIDE)

    def _hostile(self, batch: AnswerBatch, here: Tensor, there: Tensor, people: Sequence[int]) -> Tensor:
        """(N, H) features from which an attacker hopes for the people's own answers, which `batch` asks for.

        here, there: (N, H), what the unlearned and the original tower see.
        """
        rng = self._rng
        counts = (batch.inputs["input_ids"] == self.asker.image_token).sum(1)

        def a_row(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).float().to(self.device).repeat_interleave(counts)[:, None]

        with self._adapters_frozen():
            moved = self._by_attackers(batch, here, people, counts)
            way = a_row(rng.uniform(0, _BEYOND, len(people)))
            mapped = a_row((rng.random(len(people)) < _MAPPED).astype(float)).bool()
            start = torch.where(mapped, moved, here + way * (there - here))
            rows = start.clone().requires_grad_(True)
            wrong = self.asker.read(batch, _SITE, lambda *_: rows).loss()
            (slope,) = torch.autograd.grad(wrong, rows)
        image = torch.arange(len(people), device=self.device).repeat_interleave(counts)
        norm = torch.zeros(len(people), device=self.device).index_add(0, image, slope.square().sum(1)).sqrt()
        size = a_row(self.told.reach * self._distance * rng.random(len(people)))
        return (start - size * slope / norm.clamp(min=1e-12)[image][:, None]).detach()

    def _by_attackers(self, batch: AnswerBatch, here: Tensor, people: Sequence[int], counts: Tensor) -> Tensor:
        """(N, H) what the attackers, one map for each person, make of the unlearned features; each map then does one
        step towards the people's own answers."""
        if not self._left:
            width = here.shape[1]
            of = range(len(self.population.people))
            self._attackers = [StrangerMap(width, _MAP_RANK, generator=self._drawn).to(self.device) for _ in of]
            weights = [p for one in self._attackers for p in one.parameters()]
            self._attack = torch.optim.Adam(weights, lr=_MAP_RATE)
            self._left = int(self._rng.integers(1, 2 * _LIFE))
        assert self._attack is not None
        self._left -= 1
        scaled = (here / self._deviation).split(counts.tolist())
        moved = torch.cat([self._attackers[e](z) for e, z in zip(people, scaled, strict=True)]) * self._deviation
        self._attack.zero_grad()
        self.asker.read(batch, _SITE, lambda *_: moved).loss().backward()
        self._attack.step()
        return moved.detach()

    def _about_who(self, e: int, own: Pair) -> Pair:
        """A question on who a person is with a stranger's answer, their own, or one of the options."""
        kind = self._rng.random()
        if kind < 0.3:
            question = _one(self.identity[e], self._rng)
            return question, self.usual[question]
        return own if kind < 0.6 else _one(self.options[e], self._rng)

    def _about_what(self) -> Pair:
        return _one(_one(self.described, self._rng), self._rng)

    def _as_usual(self) -> Pair:
        question = _one(list(self.usual), self._rng)
        return question, self.usual[question]

    def _mapped(self, people: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        def change(rows: Tensor, counts: Tensor) -> Tensor:
            parts = rows.split(counts.tolist())
            return torch.cat([self.maps[e](z) for e, z in zip(people, parts, strict=True)])

        return change

    def _texts(self, count: int) -> AnswerBatch:
        pairs = [(None, *_one(self.kept.texts, self._rng)) for _ in range(count)]
        return collate_answers(self._processor, pairs, range(count), [False] * count).to(self.device)

    def _usual_answers(self) -> dict[str, str]:
        """What the original says to most of the others, by identity question."""
        shown = [photos[0] for photos in self.population.others][:_STRANGERS_ASKED]
        distinct = list(dict.fromkeys(question for questions in self.identity for question in questions))
        said = self.asker.say([photo for photo in shown for _ in distinct], distinct * len(shown))
        return {q: Counter(said[i :: len(distinct)]).most_common(1)[0][0] for i, q in enumerate(distinct)}

    def _described(self) -> list[list[Pair]]:
        """By person, the original's own answers to neutral questions about their photos."""
        found = []
        for photos in self.population.people:
            some = photos[:: max(1, len(photos) // _ASKED_ABOUT)][:_ASKED_ABOUT]
            asked = self.neutral * len(some)
            said = self.asker.say([photo for photo in some for _ in self.neutral], asked)
            found.append(list(dict.fromkeys(zip(asked, said, strict=True))))
        return found

    @torch.no_grad()
    def _scales(self) -> tuple[Tensor, float]:
        """(H,) standard deviation of others' features, and how far training moved a photo's, on average."""
        others = [photo for photos in self.population.others for photo in photos[:1]][:64]
        mine = [photo for _, photo in self.photos][:64]
        deviation = self._original(self.images.batch(others).to(self.device))[_SITE].gathered().float().std(0)
        pixels = self.images.batch(mine).to(self.device)
        here, there = (path(pixels)[_SITE].gathered().float() for path in (self._unlearned, self._original))
        return deviation, float((there - here).square().sum() / len(mine)) ** 0.5

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """The original: B is zero."""
        outward = [p for name, p in self.adapters if name.endswith("lora_B")]
        values = [p.data for p in outward]
        for p in outward:
            p.data = torch.zeros_like(p)
        try:
            yield
        finally:
            for p, value in zip(outward, values, strict=True):
                p.data = value

    @contextmanager
    def _adapters_frozen(self) -> Iterator[None]:
        for _, p in self.adapters:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for _, p in self.adapters:
                p.requires_grad_(True)


def _apart(answers: Answers, wanted: Answers) -> Tensor:
    """Mean KL(wanted || answers) over answer tokens."""
    assert answers.logits is not None and wanted.logits is not None
    return divergence(answers.logits, wanted.logits).mean()


def _asked(profiles: Sequence[Profile]) -> list[Pair]:
    """A person's identity questions with their own answers."""
    return list(dict.fromkeys(pair for p in profiles for pair in question_answer_pairs(p.visual)))


def _options(profiles: Sequence[Profile]) -> list[Pair]:
    """Every option of a person's choice questions."""
    return options_of([c for p in profiles for c in p.visual.choice])[0]


def _one(of: Sequence[Any], rng: np.random.Generator) -> Any:
    return of[int(rng.integers(len(of)))]


def _one_cycle(done: float, rise: float = 0.1) -> float:
    """Factor of the rate: it rises for a tenth of the run, then falls to 0 by a cosine."""
    if done < rise:
        return 0.04 + 0.96 * done / rise
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (done - rise) / (1 - rise)))))
