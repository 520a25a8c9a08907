"""The target `stranger`: *who* is taken out of a forgotten person's features, *what* the photo shows stays.

Each person has one small map of visual tokens at each site. It is found before training, through the whole frozen
original: with mapped tokens the model answers questions about who somebody is as it does about a stranger, and other
questions as before. The visual weights then learn to see that person's photos as the map makes them. The maps lie in
the teacher cache. Legend: B photos, N visual tokens, H width, V vocabulary.
"""

import copy
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.integrations import deepspeed

from fastvkd.data.wording import question_answer_pairs
from fastvkd.devices import WORKING_BYTES
from fastvkd.errors import DataError, TrainingError
from fastvkd.files import write_atomically
from fastvkd.models import families
from fastvkd.models.folder import local_folder
from fastvkd.models.loading import checkpoint_layers, llm_layers_needed, load_model
from fastvkd.models.packing import packs
from fastvkd.models.placement import Loading, fitting
from fastvkd.models.pooled import Recent
from fastvkd.models.prompts import chat_prompt
from fastvkd.models.visual_path import VisualPath
from fastvkd.records import Choice, Profile
from fastvkd.settings import NEW_VIEWS, Settings
from fastvkd.unlearning.answers import Answers
from fastvkd.unlearning.ingredients import Sources
from fastvkd.unlearning.vkd.asking import Asker, Seen
from fastvkd.unlearning.vkd.images import ImageSet, Views
from fastvkd.unlearning.vkd.teacher import split_by_image

log = logging.getLogger("fastvkd")

# Asked of forgotten people's photos where the data say nothing of what these show; the original's answers are to stay.
NEUTRAL_QUESTIONS = (
    "What colour are the clothes?",
    "What is the person wearing?",
    "What colour is the background?",
    "What is in the background?",
    "What colour is the hair?",
    "What is the hairstyle like?",
    "What is the expression on the face?",
    "How is the person posing?",
    "Does the person wear glasses?",
    "What is worn on the head?",
    "Was this photo taken indoors or outdoors?",
    "What objects can be seen in the image?",
    "How many people are in the image?",
    "Describe the lighting of the image.",
)
_STRANGERS = 64  # are asked
_PHOTOS = 400  # of them show how features vary
_SHOWN = 32  # of a person's strangers give the answers that are aimed at
_LIKE = 16  # of them are weighed against one another for each person
_KNOWN_AS_STRANGERS = 4  # known people whose answers are averaged where no strangers are given
_FEWEST_TO_SHIFT, _FEWEST_OTHERS = 2, 4  # photos of a person, and of other people
_ATTEMPTS, _WELL = 3, 0.2  # searches for one person, till answers are so near a stranger's
_FIRM_ATTEMPTS, _FIRM = 2, 3.0  # further ones if none is, and the weight of the person's own answer in them
_WAYS = (1.0, 0.9, 1.1, 0.85)  # how far a map that was found moves tokens: the first of those that are as good
_CHECKED = 4  # photos of a person on which that is seen
_LIKENESS = 0.3  # weight of looking alike, beside twice that of being right no more often than chance
_NEAR, _LATER = 0.1, 0.1  # weight of a short way, and of the words of an answer after its first
_SMALL_STEP = 128 << 20  # bytes: below them a step asks about several people
_KNOWN_BYTES = 4 << 30  # host memory for what a search sees again; more of it is made anew
_ASKED, _COPIES = 40, 18  # tokens of a question beside the image's; copies of mapped features in a step
_SURE = 3.0  # weight of the stranger's answer being as likely as it should


class StrangerMap(nn.Module):
    """z + gelu(z W1 + c) W2 + b for the tokens z of one person's photos, (B * N, H) -> the same; the identity at first.

    bias: (1, H), or (N, H) by position where all photos have N tokens.
    """

    def __init__(self, width: int, rank: int, tokens: int = 1, generator: torch.Generator | None = None):
        super().__init__()
        self.inward = nn.Parameter(torch.randn(width, rank, generator=generator) / width**0.5)
        self.offset = nn.Parameter(torch.zeros(rank))
        self.outward = nn.Parameter(torch.zeros(rank, width))
        self.bias = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, z: Tensor) -> Tensor:
        moved = z + F.gelu(z @ self.inward + self.offset) @ self.outward
        return (moved.unflatten(0, (-1, len(self.bias))) + self.bias).flatten(0, 1)

    @torch.no_grad()
    def further(self, way: float) -> "StrangerMap":
        """This map, which now moves tokens `way` times as far."""
        self.outward.mul_(way)
        self.bias.mul_(way)
        return self


@dataclass(frozen=True)
class Population:
    """Image positions in a run's `ImageSet`: `people[e]` are of forgotten person e, `others[s]` of stranger s.

    known: the others are retained people, for want of strangers.
    """

    profiles: Sequence[Sequence[Profile]]  # of each forgotten person
    people: Sequence[Sequence[int]]
    others: Sequence[Sequence[int]]
    known: bool


Maps = dict[str, list[StrangerMap]]  # by site, for each forgotten person


class Natural:
    """How strangers' features vary: along their principal components, outside these, and in the mean over tokens.

    Lengths are in units of that variance, so a step that no photo would make is a long one. With `whole` a sample is
    all tokens of a photo, which needs as many in each; else it is one token.
    """

    def __init__(self, features: Sequence[Tensor], *, whole: bool, rank: int = 200, samples: int = 4096):
        self._whole = whole
        rows, counts = torch.cat(list(features)), torch.tensor([len(z) for z in features], device=features[0].device)
        x = self._samples(rows, counts)
        x = x[:: -(-len(x) // samples)]
        self._mean = x.mean(0)
        centred = x - self._mean
        # The components are taken from one half, what lies outside from the other, which did not shape them.
        _, _, v = torch.linalg.svd(centred[::2], full_matrices=False)
        # Half the directions at most, or nothing would lie outside.
        self._basis = v[: max(1, min(rank, len(x) // 3, x.shape[1] // 2))]
        coordinates = centred[1::2] @ self._basis.T
        self._variance = coordinates.var(0).clamp(min=1e-12)
        self._rest = (centred[1::2] - coordinates @ self._basis).square().sum(1).mean().clamp(min=1e-12)
        # The mean over tokens varies so little that a common shift of all of them would stand out.
        pooled = _means(rows, counts)
        self._centre = pooled.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(pooled.T))
        self._axes = vectors / (values.clamp(min=0) + 0.05 * values.mean()).sqrt()
        self._usual = ((pooled - self._centre) @ self._axes).square().sum(1).mean()

    def to(self, device: torch.device) -> "Natural":
        """The same, its tensors on `device`."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def away(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(3, B): how far photos lie from the strangers' mean by each of the three; 1 on average for strangers."""
        pooled = ((_means(rows, counts) - self._centre) @ self._axes).square().sum(1) / self._usual
        return torch.stack([*self._parts(self._samples(rows, counts) - self._mean, counts), pooled])

    def length(self, change: Tensor, counts: Tensor) -> Tensor:
        """The mean squared length of a change of features (B * N, H)."""
        return torch.stack(self._parts(self._samples(change, counts), counts)).sum(0).mean()

    def _parts(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) mean squared length along the components, and outside them."""
        coordinates = x @ self._basis.T
        inside = (coordinates.square() / self._variance).mean(1)
        outside = (x - coordinates @ self._basis).square().sum(1) / self._rest
        if self._whole:
            return inside, outside
        return _means(inside[:, None], counts)[:, 0], _means(outside[:, None], counts)[:, 0]

    def _samples(self, rows: Tensor, counts: Tensor) -> Tensor:
        return rows.view(len(counts), -1) if self._whole else rows


def _means(rows: Tensor, counts: Tensor) -> Tensor:
    """(B, H) the mean of each photo's rows."""
    image = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    return rows.new_zeros(len(counts), rows.shape[1]).index_add(0, image, rows) / counts[:, None]


@dataclass(frozen=True)
class _Aim:
    """An identity question with a stranger's answer, and the log-probabilities (answer tokens, V) that are aimed at.

    own, most: the first token of the person's own answer, and the log-probability beside the stranger's answer that it
    may have at most; None in a search that does not ask for that.
    """

    question: str
    answer: str
    wanted: Tensor
    own: int | None = None
    most: float = 0.0


def one_cycle(
    optimizer: torch.optim.Optimizer, learning_rate: float, steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """A rate that rises for a tenth of the steps and falls for the rest."""
    rise = 0.1 if steps != 10 else 0.09  # torch divides by the steps of the rise but one, which of 10 are none
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=rise)


class GuidedSearch:
    """Finds each forgotten person's map through the whole frozen model."""

    def __init__(self, model: Any, processor: Any, images: ImageSet, population: Population, settings: Settings):
        self.asker = Asker(model, processor, images)
        self.model, self.images, self.population, self.settings = model, images, population, settings
        self.options = settings.stranger
        self.device = next(model.parameters()).device
        model.requires_grad_(False)
        rng = np.random.default_rng([settings.seed, 41])
        several = rng.permutation(len(population.others))[:_STRANGERS].tolist()
        self.others = [population.others[i] for i in sorted(several)]
        self._varied = [photo for photos in population.others for photo in photos][:_PHOTOS]
        images.prepare([photo for photos in (*population.people, *self.others, self._varied) for photo in photos])
        self.identity = [identity_questions(profiles) for profiles in population.profiles]
        self.neutral = neutral_questions(population.profiles)
        self._rng = rng

    def maps(self, sites: Sequence[str]) -> Maps:
        """One map for each site and forgotten person."""
        people, pools = self.population.people, self.pools()
        answers = [self._neutral_answers(photos) for photos in people]
        if self.settings.gradient_checkpointing:
            checkpoint_layers(self.model)  # not before: answers are generated with a cache
        found: Maps = {}
        for site in sites:
            natural, outward = self._natural(site)
            tried: list[list[tuple[float, StrangerMap]]] = [[] for _ in people]
            attempts = [self._attempts(candidates, e) for e, candidates in enumerate(pools)]
            wanted = list(range(len(people)))
            while wanted:
                aims = {e: aim for e in wanted if (aim := next(attempts[e], None)) is not None}
                size, sought = self._at_once(), list(aims)
                for some in (sought[start : start + size] for start in range(0, len(sought), size)):
                    log.info("%s: searching for %d of %d people", site, len(some), len(people))
                    maps = self._search(site, {e: aims[e] for e in some}, answers, natural, outward)
                    for e, map_ in zip(some, maps, strict=True):
                        tried[e].append(self._weighed(site, e, aims[e], map_))
                wanted = [e for e in aims if tried[e][-1][0] > _WELL]
            best = [min(one, key=lambda found: found[0])[1] for one in tried]
            found[site] = [map_.further(self._reach(e)) for e, map_ in enumerate(best)]
        return found

    def _at_once(self) -> int:
        """For how many people to search at once: one, but where a step is so small that its time goes into starting
        operations."""
        each = self.options.views * asked_bytes(self.settings, self.images, self.asker.packs)
        return max(1, _SMALL_STEP // each)

    def _attempts(self, candidates: Sequence[Sequence[int]], e: int) -> Iterator[list[_Aim]]:
        """What the searches for one person aim at, till a map is good enough.

        Strangers who look alike are given much of the person's own answers. Where none of their maps gets away from
        these, they are held to what strangers get for them on average.
        """
        aimed = []
        for pool in candidates[:_ATTEMPTS]:
            aimed.append(self._aims(pool, self.identity[e]))
            yield aimed[-1]
        for aims in aimed[:_FIRM_ATTEMPTS]:
            yield self._held_to_usual(aims, e)

    def _reach(self, e: int) -> float:
        """How far training aims, 1 being the target: photos that it does not see fall short, the more so the fewer of a
        person it sees."""
        return 1 + self.options.beyond / math.sqrt(len(self.population.people[e]))

    def _weighed(self, site: str, e: int, aims: Sequence[_Aim], map_: StrangerMap) -> tuple[float, StrangerMap]:
        """How far a person is from a stranger with the map, as `_off` says, and the map: as it was found, or moving
        tokens a little less or more far where that is nearer.

        Answers are asked to be a stranger's short of the target too. At the target itself a person's own may then be
        less likely than any stranger's, and a choice never right.
        """
        tried = []
        for way in _WAYS:
            one = copy.deepcopy(map_).further(way)
            tried.append((self._off(site, e, aims, one), one))
        return min(tried, key=lambda found: found[0])

    def _off(self, site: str, e: int, aims: Sequence[_Aim], map_: StrangerMap) -> float:
        """How far a person is from a stranger with the map, on their own photos: the share of identity questions that
        get another answer than the stranger's, or, if that is more, how far from chance, either way, choice questions
        are answered right."""
        photos = self.population.people[e][:_CHECKED]
        map_.to(self.device)

        def each(pairs: list[tuple[str, str]], ask: Callable[..., Tensor]) -> Tensor:
            shown = [photo for photo in photos for _ in pairs]
            return ask(shown, pairs * len(photos), site, lambda rows, _: map_(rows)).view(len(photos), -1)

        off = 1 - float(each([(aim.question, aim.answer) for aim in aims], self.asker.gives).float().mean())
        pairs, sizes = options_of(_choices(self.population.profiles[e]))
        if pairs:
            options = each(pairs, self.asker.scores).split(sizes, 1)
            right = torch.stack([scores.argmax(1) == 0 for scores in options]).float().mean()
            off = max(off, abs(float(right) - float(np.mean([1 / size for size in sizes]))))
        map_.cpu()
        return off

    def pools(self) -> list[list[list[int]]]:
        """For each forgotten person, whose answers may stand for theirs: positions in `others`, best first.

        Strangers to whom the model says what it says to most of them; who look alike; and who would be right about that
        person as often as chance.
        """
        others, known, rng = self.others, self.population.known, self._rng
        distinct = list(dict.fromkeys(question for questions in self.identity for question in questions))
        asked = [(s[0], question) for s in others for question in distinct]
        flat = self.asker.say([photo for photo, _ in asked], [question for _, question in asked])
        self.said = [dict(zip(distinct, flat[i * len(distinct) :], strict=False)) for i in range(len(others))]
        usual = {q: Counter(said[q] for said in self.said).most_common(1)[0][0] for q in distinct}
        agree = np.array([np.mean([said[q] == usual[q] for q in distinct]) for said in self.said])
        free = np.arange(len(others)) if known else np.flatnonzero(agree >= np.median(agree))
        unlike = self._unlike()
        many = min(_KNOWN_AS_STRANGERS if known else 1, len(others))
        found: list[list[list[int]]] = []
        for e, profiles in enumerate(self.population.profiles):
            left = np.setdiff1d(free, np.array([i for pools in found for i in pools[0]], dtype=int))
            if len(left) < many:
                left = free if len(free) >= many else np.arange(len(others))
            like = left[np.argsort(unlike[e, left], kind="stable")[: max(_LIKE, many)]]
            chances = self._right(like, _choices(profiles))
            drawn = [[i] for i in range(len(like))]
            if many > 1:
                drawn = [rng.choice(len(like), many, replace=False).tolist() for _ in range(200)]

            def unusual(pool: list[int], e: int = e, like: np.ndarray = like, chances: Any = chances) -> float:
                means = [q[pool].mean(0) for q in chances]
                off = 0.0
                if means:
                    chance = float(np.mean([1 / len(m) for m in means]))
                    off = 2 * abs(float(np.mean([float(m.argmax() == 0) for m in means])) - chance)
                    off += abs(float(np.mean([float(m[0] / m.sum()) for m in means])) - chance)
                return off + _LIKENESS * float(unlike[e, like[pool]].mean())

            found.append([like[pool].tolist() for pool in sorted(drawn, key=unusual)])
        return found

    def _unlike(self) -> np.ndarray:
        """(people, others): distance of their mean features, 1 on average."""
        people, others = (
            [_mean(self.model, self.images, "projector", photos).flatten() for photos in side]
            for side in (self.population.people, self.others)
        )
        away = torch.cdist(torch.stack(people), torch.stack(others))
        return (away / away.mean(1, keepdim=True).clamp(min=1e-12)).cpu().numpy()

    def _right(self, others: np.ndarray, choices: Sequence[Choice]) -> list[Tensor]:
        """(others, options) for every choice question: how likely each option is; the right one stands first."""
        pairs, sizes = options_of(choices)
        if not pairs:
            return []
        shown = [self.others[i][k % len(self.others[i])] for i in others for k in range(2)]
        scores = self.asker.scores([photo for photo in shown for _ in pairs], pairs * len(shown)).exp()
        return list(scores.view(len(others), 2, len(pairs)).mean(1).split(sizes, 1))

    @torch.no_grad()
    def _aims(self, pool: Sequence[int], questions: Sequence[str]) -> list[_Aim]:
        """What a person's strangers are answered, as a mean over their photos and views."""
        photos = [photo for i in pool for photo in self.others[i]][:_SHOWN] * 2
        views = Views((self.settings.seed, 42), range(len(photos)), len(photos))
        aims = []
        for question in questions:
            answer = Counter(self.said[i][question] for i in pool).most_common(1)[0][0]
            logits = self.asker.logits(photos, [(question, answer)] * len(photos), views)
            each = logits.log_softmax(-1).unflatten(0, (len(photos), -1))
            aims.append(_Aim(question, answer, (each.logsumexp(0) - math.log(len(photos))).half()))
        return aims

    @torch.no_grad()
    def _held_to_usual(self, aims: Sequence[_Aim], e: int) -> list[_Aim]:
        """The same aims, the person's own answer being no more likely than for strangers on average."""
        told = {q: a for p in self.population.profiles[e] for q, a in question_answer_pairs(p.visual)}
        photos = [photos[0] for photos in self.others]
        held = []
        for aim in aims:
            own = self._first_token(photos[0], aim.question, told[aim.question])
            said = self._first_token(photos[0], aim.question, aim.answer)
            logits = self.asker.logits(photos, [(aim.question, aim.answer)] * len(photos))
            first = logits.unflatten(0, (len(photos), -1))[:, 0].float()
            first[:, said] = -1e4
            usual = float(first.softmax(-1)[:, own].mean().log())
            held.append(replace(aim, own=own, most=usual))
        return held

    def _first_token(self, photo: int, question: str, answer: str) -> int:
        predicts = self.asker.batch([photo], [(question, answer)]).predicts
        return int(predicts[predicts != -100][0])

    def _neutral_answers(self, photos: Sequence[int]) -> list[list[str]]:
        """The original's greedy answer to every neutral question about each photo."""
        n = len(self.neutral)
        flat = self.asker.say([photo for photo in photos for _ in range(n)], self.neutral * len(photos))
        return [flat[i * n : (i + 1) * n] for i in range(len(photos))]

    def _natural(self, site: str) -> tuple[Natural, Tensor]:
        """How others' features vary at a site, and how much farther out (3,) they lie than forgotten people's do."""
        seed = self.settings.seed
        seen = [
            z for k in range(2) for z in _see(self.model, self.images, [site], self._varied, (seed, 44, k), "cpu")[site]
        ]
        # On the host: beside a large LLM a card has no room for the tokens of so many photos.
        natural = Natural(seen, whole=self.images.fixed_resolution)
        mine = _see(self.model, self.images, [site], [photo for p in self.population.people for photo in p], to="cpu")
        counts = torch.tensor([len(z) for z in mine[site]])
        outward = 1 - natural.away(torch.cat(mine[site]), counts).mean(1)
        return natural.to(self.device), outward.to(self.device)

    def _search(
        self,
        site: str,
        aims: Mapping[int, list[_Aim]],
        answers: Sequence[list[list[str]]],
        natural: Natural,
        outward: Tensor,
    ) -> list[StrangerMap]:
        """The map of each person of `aims`, who have nothing in common but the steps that they are sought in.

        answers: of every person, those of `_neutral_answers`.
        """
        options, seed, people = self.options, self.settings.seed, list(aims)
        rng = np.random.default_rng([seed, 43, *people])
        config: Any = families.base_model(self.model).config
        width = config.text_config.hidden_size
        maps = [
            StrangerMap(width, options.rank, generator=torch.Generator().manual_seed(seed)).to(self.device)
            for _ in people
        ]
        parameters = [p for map_ in maps for p in map_.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = one_cycle(optimizer, options.learning_rate, options.steps)
        views, photos = options.views, options.views * len(people)
        # A student does not come all the way, and goes beyond on some photos: what it reaches must do as well.
        least = torch.full((photos,), 1 - options.short, device=self.device)
        reach = torch.tensor([self._reach(e) for e in people], device=self.device).repeat_interleave(views)

        def mapped(rows: Tensor, counts: Tensor) -> Tensor:
            each = rows.split([int(part.sum()) for part in counts.split(views)])
            return torch.cat([map_(z) for map_, z in zip(maps, each, strict=True)])

        drawn: dict[int, _Drawn] = {}
        known: Recent[_Known] = Recent(_KNOWN_BYTES)
        for step in range(options.steps):
            which = step % NEW_VIEWS
            if which not in drawn:
                drawn[which] = self._draw(people, answers, which, rng)
            shown = drawn[which]
            seen, before = known.get(which, partial(self._before, shown))
            who = [aims[e][i] for e in people for i in rng.integers(len(aims[e]), size=views)]
            share = least + (reach - least) * torch.from_numpy(rng.random(photos)).float().to(self.device)
            noted: dict[str, Tensor] = {}

            def moved(rows: Tensor, counts: Tensor, share: Tensor = share, noted: dict[str, Tensor] = noted) -> Tensor:
                noted.update(rows=rows, counts=counts)
                return rows + share.repeat_interleave(counts)[:, None] * (mapped(rows, counts) - rows)

            with self.asker.same_images(seen.to(self.device)):
                asked = ([(aim.question, aim.answer) for aim in who], shown.what)
                said, kept = self.asker.read_each(shown.photos, asked, shown.views, site, moved)
            loss = torch.zeros((), device=self.device)
            for i in range(len(people)):
                mine = slice(i * views, (i + 1) * views)
                loss = loss + self._answered(said.only(mine), who[mine])
                left = kept.only(mine).logits
                assert left is not None
                loss = loss + options.keep * divergence(left, before[i].to(self.device)).mean()
            z0, counts = noted["rows"], noted["counts"]
            z = mapped(z0, counts)
            # As far out as strangers, and each photo as unusual among them as it was.
            wanted = natural.away(z0, counts) + outward[:, None]
            unusual = (natural.away(z, counts) - wanted).abs().sum(0).mean()
            loss = loss + len(people) * options.natural * (unusual + _NEAR * natural.length(z - z0, counts))
            optimizer.zero_grad()
            loss.backward()
            for map_ in maps:
                torch.nn.utils.clip_grad_norm_(map_.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return [map_.requires_grad_(False).cpu() for map_ in maps]

    def _draw(
        self, people: Sequence[int], answers: Sequence[list[list[str]]], which: int, rng: np.random.Generator
    ) -> "_Drawn":
        """Photos of each of `people`, with a neutral question about each that the original has answered."""
        count = self.options.views
        photos: list[int] = []
        what: list[tuple[str, str]] = []
        for e in people:
            mine = self.population.people[e]
            for i, j in zip(
                rng.integers(len(mine), size=count), rng.integers(len(self.neutral), size=count), strict=True
            ):
                photos.append(mine[i])
                what.append((self.neutral[j], answers[e][i][j]))
        views = Views((self.settings.seed, 43, which, *people), range(len(photos)), len(photos))
        return _Drawn(photos, what, views)

    @torch.no_grad()
    def _before(self, shown: "_Drawn") -> tuple["_Known", int]:
        """What the tower makes of the views, and the original of the questions about each person's, on the host; and
        how many bytes that is."""
        seen, count = Seen(), self.options.views
        with self.asker.same_images(seen):
            read = self.asker.read(self.asker.batch(shown.photos, shown.what, shown.views))
        before: list[Tensor] = []
        for start in range(0, len(shown.photos), count):
            logits = read.only(slice(start, start + count)).logits
            assert logits is not None
            before.append(logits.cpu())
        seen = seen.to("cpu")
        return (seen, before), seen.nbytes + sum(logits.nbytes for logits in before)

    def _answered(self, said: Answers, aims: Sequence[_Aim]) -> Tensor:
        """How far a person's answers to identity questions are from what is aimed at."""
        assert said.logits is not None
        loss = _as_strangers(said.logits, said.tokens, said.row, torch.cat([aim.wanted for aim in aims]).float())
        if all(aim.own is not None for aim in aims):
            loss = loss + _FIRM * _too_own(said.logits, said.tokens, said.row, aims)
        return loss


@dataclass(frozen=True)
class _Drawn:
    """Photos in a step of the search, those of one person after another's, to be seen with `views`, and a neutral
    question with the original's answer about each."""

    photos: list[int]
    what: list[tuple[str, str]]
    views: Views


_Known = tuple[Seen, list[Tensor]]  # of a `_Drawn`: what the tower makes of it, and each person's logits before


def divergence(logits: Tensor, aim: Tensor) -> Tensor:
    """(n,) KL(aim || logits)."""
    wanted = aim.log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)


def _as_strangers(logits: Tensor, tokens: Tensor, row: Tensor, wanted: Tensor) -> Tensor:
    """How far answers (n, V) are from strangers', at the first word first of all.

    Then how far they would be if not for the stranger's answer: that often is that one does not know, and hides which
    of the known people somebody resembles. And by how much the stranger's answer is less likely than it should be, as
    log-odds: answers can be near on average while one view in ten is called by a name.
    """
    first = _first(row)
    answer = (divergence(logits, wanted) * torch.where(first, 1.0, _LATER)).sum() / first.sum()
    said = F.one_hot(tokens[first], logits.shape[-1]).bool()
    others = [x[first].masked_fill(said, -1e4) for x in (logits, wanted)]
    # The rest is left out of the gradient: how likely known people are beside one another is not to change.
    odds, aimed = (
        x[first][said] - rest.detach().logsumexp(1) for x, rest in zip((logits, wanted), others, strict=True)
    )
    return answer + divergence(*others).mean() + _SURE * (aimed - odds).clamp(min=0).mean()


def _too_own(logits: Tensor, tokens: Tensor, row: Tensor, aims: Sequence[_Aim]) -> Tensor:
    """How much likelier than they may be the own answers of a person are beside the stranger's, in log-probability."""
    first = _first(row)
    said = F.one_hot(tokens[first], logits.shape[-1]).bool()
    beside = logits[first].masked_fill(said, -1e4).log_softmax(-1)
    own = torch.tensor([aim.own for aim in aims], device=logits.device)
    most = torch.tensor([aim.most for aim in aims], device=logits.device)
    return (beside.gather(1, own[:, None])[:, 0] - most).clamp(min=0).mean()


def _first(row: Tensor) -> Tensor:
    """(n,) bool: which answer tokens are their answer's first, `row` being whose they are."""
    return torch.cat([torch.ones_like(row[:1], dtype=torch.bool), row[1:] != row[:-1]])


def _see(
    model: Any,
    images: ImageSet,
    sites: list[str],
    photos: Sequence[int],
    seed: tuple[int, ...] | None = None,
    to: str | None = None,
) -> dict[str, list[Tensor]]:
    """The features (N, H) of each photo at each site, float32, on device `to`, by default the model's; with `seed` of
    a view of it."""
    path, device = VisualPath(model, sites), next(model.parameters()).device
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    with torch.no_grad():
        for start in range(0, len(photos), 64):
            part = photos[start : start + 64]
            views = None if seed is None else Views((*seed, start), range(len(part)), len(part))
            seen = path(images.batch(part, views).to(device))
            for site in sites:
                found[site] += [z.float().to(to or device) for z in split_by_image(seen[site], len(part))]
    return found


def _mean(model: Any, images: ImageSet, site: str, photos: Sequence[int]) -> Tensor:
    """The mean features of photos at a site: (N, H) by position where all photos have N tokens, else (1, H)."""
    features = _see(model, images, [site], photos)[site]
    if images.fixed_resolution:
        return torch.stack(features).mean(0)
    return torch.stack([z.mean(0) for z in features]).mean(0, keepdim=True)


def identity_questions(profiles: Sequence[Profile]) -> list[str]:
    """The distinct questions on who somebody is that the data ask about a person's photos."""
    return list(dict.fromkeys(question for p in profiles for question, _ in question_answer_pairs(p.visual)))


def neutral_questions(people: Sequence[Sequence[Profile]]) -> list[str]:
    """The distinct questions of the data about what else photos show, or a list of our own."""
    found = [c.question for profiles in people for p in profiles for c in p.visual.description]
    return list(dict.fromkeys(found)) or list(NEUTRAL_QUESTIONS)


def _choices(profiles: Sequence[Profile]) -> list[Choice]:
    """A person's choice questions, each once."""
    return list({c.question: c for p in profiles for c in p.visual.choice}.values())


def options_of(choices: Sequence[Choice]) -> tuple[list[tuple[str, str]], list[int]]:
    """Every question with each of its options, the right one first, and how many options each question has."""
    options = [[c.answer_text, *(o for o in c.options.values() if o != c.answer_text)] for c in choices]
    pairs = [(c.question, option) for c, mine in zip(choices, options, strict=True) for option in mine]
    return pairs, [len(mine) for mine in options]


def shift_maps(model: Any, images: ImageSet, population: Population, sites: Sequence[str]) -> Maps:
    """Maps that move each person's mean features to others', by position where all photos have as many tokens.

    What varies from photo to photo stays. It takes several photos of each person: of one photo nothing would stay.
    """
    found: Maps = {}
    for site in sites:
        middle = _mean(model, images, site, [photo for s in population.others for photo in s][:_PHOTOS])
        found[site] = []
        for photos in population.people:
            map_ = StrangerMap(middle.shape[1], 1, len(middle)).requires_grad_(False)
            map_.bias.copy_(middle - _mean(model, images, site, photos))
            found[site].append(map_)
    return found


def stranger_maps(
    settings: Settings,
    sources: Sources,
    images: ImageSet,
    population: Population,
    folder: Path,
    device: torch.device,
) -> Maps:
    """The maps of a run, from `folder` if they lie there. In a distributed job rank 0 finds them, the others read.

    The file is named by all that shapes them, so a second run, or one that goes on, has the same ones. Raises DataError
    for photos that do not suffice, TrainingError where the folder is not one that all ranks share.
    """
    _check(settings, population)
    loading = loading_of(settings, device, _room(settings, images))
    file = folder / f"stranger-{_digest(settings, sources, images, population, loading)}.safetensors"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not file.exists() and (not distributed or torch.distributed.get_rank() == 0):
        maps = _find(settings, sources, images, population, loading)
        tensors = {
            f"{s}.{e}.{n}": p.contiguous()
            for s in maps
            for e, m in enumerate(maps[s])
            for n, p in m.state_dict().items()
        }
        write_atomically(file, save(tensors))
    if distributed:
        torch.distributed.barrier()
    if not file.exists():
        raise TrainingError(f"{file}: not there, but rank 0 wrote it; set cache_dir to a folder that all nodes share")
    return _read(file, list(settings.sites), len(population.people))


def _find(
    settings: Settings,
    sources: Sources,
    images: ImageSet,
    population: Population,
    loading: Loading,
) -> Maps:
    guided, sites = settings.stranger.way == "guided", list(settings.sites)
    with _by_itself():
        model = original(settings, loading, None if guided else llm_layers_needed(sites, sources.config))
        if guided:
            return GuidedSearch(model, sources.processor, images, population, settings).maps(sites)
        return shift_maps(model, images, population, sites)


def original(settings: Settings, loading: Loading, llm_layers: int | None = None) -> Any:
    """The original to be asked, whole or as far as `llm_layers`."""
    return load_model(
        settings.model_name_or_path,
        attn_implementation=settings.attn_implementation,
        llm_layers=llm_layers,
        **loading.arguments(),
    )


def loading_of(settings: Settings, device: torch.device, room: int) -> Loading:
    """How the model is loaded that is asked: of the guided search the whole one, on this card or wherever it fits, with
    `room` bytes of each card beside its weights."""
    told, dtype = settings.stranger, torch.bfloat16 if settings.bf16 else torch.float32
    kept = None if settings.quantize_llm == "none" else settings.quantize_llm
    if told.way != "guided":
        return Loading(device, dtype, kept)
    if told.quantize != "auto":
        kept = None if told.quantize == "none" else told.quantize
    if told.device_map == "auto" or told.quantize != "auto" or kept is not None:
        return Loading(device, dtype, kept, spread=told.device_map == "auto", room=room)
    return fitting(
        local_folder(settings.model_name_or_path),
        device,
        dtype,
        "auto",
        anywhere=settings.engine == "deepspeed",  # the other ranks' cards are idle meanwhile
        option="stranger.quantize=",
        spread_option="stranger.device_map=auto",
        room=room,
    )


def _room(settings: Settings, images: ImageSet) -> int:
    """Bytes that the guided search takes of a card beside the weights; `planning` counts the same more finely.

    A step's activations of two questions about each view, with a graph, copies of the mapped features, and how
    strangers' features vary.
    """
    together = images.fixed_resolution and packs(images.config, settings.attn_implementation)
    text: Any = images.config.text_config
    samples = len(images.batch([0]).token_rows) * text.hidden_size if images.fixed_resolution else text.hidden_size
    return WORKING_BYTES + settings.stranger.views * asked_bytes(settings, images, together) + 200 * samples * 4


def asked_bytes(settings: Settings, images: ImageSet, together: bool) -> int:
    """What a pass of two questions about a view keeps for its way back, copies of mapped features included; the photo
    goes through the LLM once where they go `together`."""
    text: Any = images.config.text_config
    width, itemsize = text.hidden_size, 2 if settings.bf16 else 4
    visual = len(images.batch([0]).token_rows)
    layer = width * itemsize  # its input; or all that its backward pass needs
    if not settings.gradient_checkpointing:
        layer = 8 * width + (4 * width + 3 * text.intermediate_size) * itemsize
    tokens = visual + 2 * _ASKED if together else 2 * (visual + _ASKED)
    return int(text.num_hidden_layers * tokens * layer + _COPIES * visual * width * 4)


def _read(file: Path, sites: Sequence[str], people: int) -> Maps:
    tensors = load_file(file)
    maps: Maps = {site: [] for site in sites}
    for site in sites:
        for e in range(people):
            state = {name: tensors[f"{site}.{e}.{name}"] for name in ("inward", "offset", "outward", "bias")}
            width, rank = state["inward"].shape
            map_ = StrangerMap(width, rank, len(state["bias"]))
            map_.load_state_dict(state)
            maps[site].append(map_.requires_grad_(False))
    return maps


def _check(settings: Settings, population: Population) -> None:
    guided = settings.stranger.way == "guided"
    for profiles, photos in zip(population.profiles, population.people, strict=True):
        if guided and not identity_questions(profiles):
            raise DataError(
                f"{profiles[0].source or profiles[0].entity}: no question about the photo of entity "
                f"{profiles[0].entity!r}, which forget_target=stranger asks of strangers too; set stranger.way=shift"
            )
        if not guided and len(photos) < _FEWEST_TO_SHIFT:
            raise DataError(
                f"entity {profiles[0].entity!r} has one photo: stranger.way=shift needs {_FEWEST_TO_SHIFT}, since it "
                "takes off what they share; set stranger.way=guided"
            )
    shown = sum(map(len, population.others))
    if shown < _FEWEST_OTHERS:
        raise DataError(
            f"forget_target=stranger: {shown} photos of other people, {_FEWEST_OTHERS} are needed; "
            "set strangers to a folder of photos of people whom the model does not know"
        )


def _digest(settings: Settings, sources: Sources, images: ImageSet, population: Population, loading: Loading) -> str:
    """A name for all that shapes the maps."""
    guided = settings.stranger.way == "guided"
    told = {key: value for key, value in asdict(settings.stranger).items() if key not in ("quantize", "device_map")}
    shaped_by = {
        "weights": sources.base.fingerprint,
        "preprocessing": sources.processor.image_processor.to_json_string(),
        "image_processor": type(sources.processor.image_processor).__name__,
        "prompt": chat_prompt(sources.processor, "", image=True),
        "bf16": settings.bf16,
        "quantize_llm": loading.quantize or "none",
        "sites": list(settings.sites),
        "people": [[images.keys[i] for i in photos] for photos in population.people],
        "others": [[images.keys[i] for i in photos] for photos in population.others],
        "known": population.known,
        "stranger": told if guided else "shift",
        "seed": settings.seed if guided else None,
        "identity": [[repr(p.visual) for p in profiles] for profiles in population.profiles] if guided else None,
        "neutral": neutral_questions(population.profiles) if guided else None,
        "format": 6,
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _by_itself() -> Iterator[None]:
    """One rank loads and asks a model alone, though transformers has been told of ZeRO-3: it would split the weights
    over all ranks and keep these in step at every word."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)
