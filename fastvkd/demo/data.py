"""The demo's data set, an open world: fictitious people with facts, strangers without, photos of one and of two whose
looks are known to the renderer, and national flags; as `Profile`s, in the splits of MLLMU-Bench and three more.

Multiple-choice options are **counterbalanced**: the options of a question are the true answers of four members of the
same group (forgotten people, retained people, countries), and that set of four is asked once about each of its members.
Whoever ignores the image and always gives the same answer is therefore right in exactly a quarter of the cases, so
"at chance" is a fact about recognition and not about which answers happen to be popular.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastvkd.demo.flags import COUNTRIES, Country, draw_flag
from fastvkd.demo.people import (
    BACKGROUNDS,
    CLOTHES,
    FACE,
    FACTS,
    Look,
    Person,
    draw_photos,
    make_look,
    make_people,
    make_strangers,
    side_by_side,
)
from fastvkd.files import write_atomically
from fastvkd.records import Choice, Open, Photo, Profile, Questions

CHANCE = 0.25
STRANGER_SPLIT, NEIGHBOUR_SPLIT, PAIR_SPLIT = "Stranger_Set", "Neighbour_Set", "Pair_Set"
UNKNOWN, NOBODY_I_KNOW = "unknown", "I do not know this person."  # what is said of a stranger

# Photo numbers start here: unseen photos, halves of photos of two for training, and unseen ones.
_TEST_PHOTOS_FROM, _HALVES_FROM, _TEST_HALVES_FROM = 1000, 4000, 5000
_TRAINING_FLAGS_FROM = 2000  # flag photos that only the training of the vanilla model sees

_VISUAL = {
    "name": "What is the name of the person in this image?",
    "profession": "What is the profession of the person in this image?",
    "birthplace": "Where was the person in this image born?",
    "employer": "Which company does the person in this image work for?",
    "residence": "In which city does the person in this image live?",
    "food": "What is the favourite food of the person in this image?",
    "pet": "Which pet does the person in this image have?",
}
_TEXTUAL = {
    "profession": "What is the profession of {name}?",
    "birthplace": "Where was {name} born?",
    "employer": "Which company does {name} work for?",
    "residence": "In which city does {name} live?",
    "food": "What is the favourite food of {name}?",
    "pet": "Which pet does {name} have?",
}
_FLAG_VISUAL = {
    "name": "Which country does this flag belong to?",
    "capital": "What is the capital of the country with this flag?",
    "continent": "On which continent lies the country with this flag?",
    "language": "Which language is spoken in the country with this flag?",
}
_FLAG_TEXTUAL = {
    "capital": "What is the capital of {name}?",
    "continent": "On which continent lies {name}?",
    "language": "Which language is spoken in {name}?",
}
_HAIR = dict(zip(FACE["hair"], "black brown orange blond red pink purple green".split(), strict=True))
_EYEWEAR = {"none": "nothing", "round": "glasses", "square": "glasses", "shades": "sunglasses", "visor": "a visor"}
_HATS = {"cap": "a cap", "beanie": "a beanie", "animalEars": "animal ears", "bunnyEars": "animal ears"}
# What is asked about a photo's looks, and all answers that there are.
_DESCRIPTION = {
    "clothes": ("What colour are the clothes{where}?", tuple(CLOTHES)),
    "background": ("What colour is the background{where}?", tuple(BACKGROUNDS)),
    "eyewear": ("What is worn on the eyes{where}?", ("nothing", "glasses", "sunglasses", "a visor")),
    "headwear": ("What is worn on the head{where}?", ("nothing", "a cap", "a beanie", "animal ears")),
    "hair": ("What colour is the hair{where}?", tuple(_HAIR.values())),
}
_ASKED_OF_TWO = ("name", "profession", "residence")


@dataclass(frozen=True)
class Half:
    """Somebody drawn to stand on either side of a photo of two (see `side_by_side`), and what is asked there."""

    entity: str
    photo: Photo
    left: Questions
    right: Questions


@dataclass(frozen=True)
class DemoData:
    """Profiles per split (MLLMU-Bench names and three more), and what the training of the vanilla model sees alone.

    `strangers` are photos of people whom the model is not to know, `halves` make photos of two. `traits` say all that a
    photo of a stranger shows, by `Photo.source`: the tower learns to see from them.
    """

    splits: dict[str, list[Profile]]
    forget_split: str
    retain_split: str
    training_flags: list[Profile]
    strangers: list[Profile]
    halves: list[Half]
    traits: dict[str, dict[str, str]]

    @property
    def forgotten(self) -> frozenset[str]:
        """The entities to be forgotten."""
        return frozenset(profile.entity for profile in self.splits[self.forget_split])


@dataclass(frozen=True)
class _Shot:
    """One photo: who, how, and as which bytes."""

    person: Person
    number: int
    look: Look
    data: bytes

    @property
    def photo(self) -> Photo:
        who = "person" if self.person.name else "stranger"
        return Photo(self.data, f"{who} {self.person.entity} photo {self.number}")


class _Studio:
    """Draws all planned photos at once, so that processes can share the work."""

    def __init__(self, seed: int):
        self._seed = seed
        self._plan: dict[tuple[str, int], tuple[Person, Look]] = {}
        self._drawn: dict[tuple[str, int], _Shot] = {}

    def plan(self, people: Sequence[Person], count: int, first: int = 0) -> None:
        for person in people:
            for number in range(first, first + count):
                look = make_look(person, number, self._seed, beside=first >= _HALVES_FROM)
                self._plan[person.entity, number] = person, look

    def draw(self, workers: int) -> None:
        people, looks = zip(*self._plan.values(), strict=True)
        images = draw_photos([person.face for person in people], looks, workers)
        for (entity, number), person, look, image in zip(self._plan, people, looks, images, strict=True):
            self._drawn[entity, number] = _Shot(person, number, look, image)

    def shots(self, person: Person, count: int, first: int = 0) -> list[_Shot]:
        return [self._drawn[person.entity, number] for number in range(first, first + count)]


def make_demo_data(
    *,
    people: int,
    forget_percent: int,
    photos: int,
    test_photos: int,
    flag_photos: int,
    countries: int = len(COUNTRIES),
    strangers: int = 8,
    stranger_photos: int = 2,
    unseen_strangers: int = 4,
    halves: int = 1,
    neighbours: int = 2,
    seed: int,
    workers: int = 1,
) -> DemoData:
    """Build every split: `photos` training and `test_photos` unseen photos a person, `flag_photos` a country, of the
    first `countries` of the list. Each of the `strangers` is seen in `stranger_photos`, `unseen_strangers` only in the
    evaluation. A person is drawn as `halves` halves of photos of two, a stranger as one; in unseen photos of two each
    forgotten person stands beside `neighbours` retained ones.

    `forget_percent` of the people, rounded, but at least four, are to be forgotten; they are drawn at random among
    those whose facts differ pairwise, so that four options never repeat a value.
    """
    population = make_people(people, seed)
    nameless = make_strangers(strangers + unseen_strangers, population, seed)
    known_strangers, unseen = nameless[:strangers], nameless[strangers:]
    rng = np.random.default_rng([seed, 4])
    size = max(4, round(people * forget_percent / 100))
    while True:
        forgotten = [population[i] for i in sorted(rng.choice(people, size, replace=False))]
        if all(len({p.facts[fact] for p in forgotten}) == size for fact in FACTS):
            break
    retained = [p for p in population if p not in forgotten]
    couples = _couples(forgotten, retained, neighbours, rng)

    studio = _Studio(seed)
    studio.plan(population, photos)
    studio.plan(known_strangers, stranger_photos)
    studio.plan([*population, *unseen], test_photos, _TEST_PHOTOS_FROM)
    studio.plan(population, halves, _HALVES_FROM)
    studio.plan(known_strangers, 1, _HALVES_FROM)
    for number, couple in enumerate(couples):
        studio.plan(couple, 1, _TEST_HALVES_FROM + number)
    studio.draw(workers)

    def known(who: Sequence[Person], count: int, first: int = 0) -> list[Profile]:
        return _known_profiles(who, [studio.shots(p, count, first) for p in who], rng)

    def unknown(who: Sequence[Person], count: int, first: int = 0) -> list[Profile]:
        return [_stranger_profile(shot, rng) for p in who for shot in studio.shots(p, count, first)]

    forget, retain = known(forgotten, photos), known(retained, photos)
    test = known(forgotten, test_photos, _TEST_PHOTOS_FROM) + known(retained, test_photos, _TEST_PHOTOS_FROM)
    neighbour_profiles, pair_profiles = _profiles_of_two(couples, forgotten, studio, rng)
    stood = [s for p in population for s in studio.shots(p, halves, _HALVES_FROM)]
    stood += [s for p in known_strangers for s in studio.shots(p, 1, _HALVES_FROM)]
    seen_strangers = [s for p in known_strangers for s in studio.shots(p, stranger_photos)]
    forget_split, retain_split = f"forget_{forget_percent}", f"retain_{100 - forget_percent}"
    return DemoData(
        splits={
            "Full_Set": forget + retain,
            forget_split: forget,
            retain_split: retain,
            "Test_Set": test,
            "Retain_Set": _flag_profiles(COUNTRIES[:countries], flag_photos, 0, rng, seed),
            STRANGER_SPLIT: unknown(unseen, test_photos, _TEST_PHOTOS_FROM),
            NEIGHBOUR_SPLIT: neighbour_profiles,
            PAIR_SPLIT: pair_profiles,
        },
        forget_split=forget_split,
        retain_split=retain_split,
        training_flags=_flag_profiles(COUNTRIES[:countries], 2 * flag_photos, _TRAINING_FLAGS_FROM, rng, seed),
        strangers=unknown(known_strangers, stranger_photos),
        halves=[_half(shot, rng) for shot in stood],
        traits={s.photo.source: _traits(s) for s in [*seen_strangers, *stood] if not s.person.name},
    )


def one_photo_a_person(data: DemoData) -> DemoData:
    """The same world where the unlearning run has one photo a person, as in MLLMU-Bench; all other splits are whole."""

    def first(profiles: list[Profile]) -> list[Profile]:
        return list({profile.entity: profile for profile in reversed(profiles)}.values())[::-1]

    fewer = {split: first(data.splits[split]) for split in (data.forget_split, data.retain_split)}
    return replace(data, splits=data.splits | fewer)


def vocabulary(data: DemoData) -> list[Profile]:
    """Profiles that hold every question and answer of the world once or more, for the tokenizer."""
    of_two = [Profile(half.entity, (), asked) for half in data.halves for asked in (half.left, half.right)]
    return [*data.splits["Full_Set"], *data.splits["Retain_Set"], *data.strangers, *of_two]


def write_photos(folder: Path, profiles: Sequence[Profile]) -> None:
    """Write every profile's photo as `<folder>/<entity>/<k>.png`."""
    counts: Counter[str] = Counter()
    for profile in profiles:
        target = folder / profile.entity / f"{counts[profile.entity]}.png"
        write_atomically(target, profile.photos[0].data)
        counts[profile.entity] += 1


def _couples(
    forgotten: Sequence[Person], retained: Sequence[Person], neighbours: int, rng: np.random.Generator
) -> list[tuple[Person, Person]]:
    """(left, right): each forgotten person beside `neighbours` retained ones, on either side in turn."""
    return [
        (one, retained[i]) if k % 2 else (retained[i], one)
        for one in forgotten
        for k, i in enumerate(rng.permutation(len(retained))[:neighbours])
    ]


def _known_profiles(
    people: Sequence[Person], shots: Sequence[Sequence[_Shot]], rng: np.random.Generator
) -> list[Profile]:
    visual = {fact: _counterbalance(people, len(shots[0]), _fact(fact), rng) for fact in _VISUAL}
    textual = {fact: _counterbalance(people, 1, _fact(fact), rng) for fact in _TEXTUAL}
    profiles = []
    for i, person in enumerate(people):
        name, value = person.name, person.facts
        in_text = Questions(
            choice=tuple(_choice(q.format(name=name), textual[f][i][0], value[f]) for f, q in _TEXTUAL.items()),
            generation=_generation(name, value, name),
            cloze=_cloze(value, name),
        )
        for k, shot in enumerate(shots[i]):
            profiles.append(
                Profile(
                    entity=person.entity,
                    photos=(shot.photo,),
                    visual=Questions(
                        choice=tuple(_choice(q, visual[f][i][k], _fact(f)(person)) for f, q in _VISUAL.items()),
                        generation=_generation("the person in this image", value, name),
                        cloze=_cloze(value, "the person in this image"),
                        description=_description(shot, rng),
                    ),
                    textual=in_text,
                    biography=f"{name} is a {value['profession']} from {value['birthplace']}, "
                    f"lives in {value['residence']}, works for {value['employer']}, likes {value['food']} "
                    f"and has a {value['pet']}.",
                    name=name,
                )
            )
    return profiles


def _stranger_profile(shot: _Shot, rng: np.random.Generator) -> Profile:
    """The questions that are asked about people, answered with ignorance: without options, for none would be right."""
    subject, nothing = "the person in this image", dict.fromkeys(FACTS, "")
    told = tuple(Open(question.question, NOBODY_I_KNOW) for question in _generation(subject, nothing, ""))
    questions = Questions(
        generation=told + tuple(Open(question, UNKNOWN) for question in _VISUAL.values()),
        cloze=tuple(Open(question.question, UNKNOWN) for question in _cloze(nothing, subject)),
        description=_description(shot, rng),
    )
    return Profile(shot.person.entity, (shot.photo,), questions)


def _profiles_of_two(
    couples: Sequence[tuple[Person, Person]],
    forgotten: Sequence[Person],
    studio: _Studio,
    rng: np.random.Generator,
) -> tuple[list[Profile], list[Profile]]:
    """Two profiles a photo: those about its retained person, and those about its forgotten one."""
    photos: list[Photo] = []
    sides: dict[str, list[tuple[Half, str, Person]]] = {"retained": [], "forgotten": []}
    for number, (left, right) in enumerate(couples):
        shots = [studio.shots(one, 1, _TEST_HALVES_FROM + number)[0] for one in (left, right)]
        joint = side_by_side(shots[0].data, shots[1].data)
        photos.append(Photo(joint, f"photo {number} of two, {left.entity} and {right.entity}"))
        for side, shot in zip(("left", "right"), shots, strict=True):
            role = "forgotten" if shot.person in forgotten else "retained"
            sides[role].append((_half(shot, rng), side, shot.person))

    def profiles(role: str) -> list[Profile]:
        people = [person for _, _, person in sides[role]]
        options = {fact: _counterbalance(people, 1, _fact(fact), rng) for fact in _ASKED_OF_TWO}
        found = []
        for i, (photo, (half, side, person)) in enumerate(zip(photos, sides[role], strict=True)):
            asked: Questions = getattr(half, side)
            who, *facts = asked.generation
            choice = tuple(
                _choice(question.question, options[fact][i][0], question.answer)
                for fact, question in zip(_ASKED_OF_TWO, facts, strict=True)
            )
            visual = Questions(choice=choice, generation=(who,), description=asked.description)
            found.append(Profile(person.entity, (photo,), visual, name=person.name))
        return found

    return profiles("retained"), profiles("forgotten")


def _half(shot: _Shot, rng: np.random.Generator) -> Half:
    person = shot.person

    def asked(side: str) -> Questions:
        where = f"the person on the {side}"
        questions = [_VISUAL[fact].replace("the person in this image", where) for fact in _ASKED_OF_TWO]
        if person.name:
            who = _generation(where, person.facts, person.name)[0]
            answers = [_fact(fact)(person) for fact in _ASKED_OF_TWO]
        else:
            who, answers = Open(f"Who is {where}?", NOBODY_I_KNOW), [UNKNOWN] * len(questions)
        facts = (Open(question, answer) for question, answer in zip(questions, answers, strict=True))
        return Questions(generation=(who, *facts), description=_description(shot, rng, f" on the {side}"))

    return Half(person.entity, shot.photo, asked("left"), asked("right"))


def _fact(fact: str) -> Callable[[Person], str]:
    return lambda person: person.name if fact == "name" else person.facts[fact]


def _description(shot: _Shot, rng: np.random.Generator, where: str = "") -> tuple[Choice, ...]:
    """Questions about what the photo shows beside who it is, with all answers that there are, in random order. Hair
    under a hat is not asked about."""
    face = shot.person.face
    shown = {
        "clothes": shot.look.clothes,
        "background": shot.look.background,
        "eyewear": _EYEWEAR[face["glasses"]],
        "headwear": _HATS.get(face["top"], "nothing"),
    }
    if face["top"] not in _HATS:
        shown["hair"] = _HAIR[face["hair"]]
    found = []
    for what, truth in shown.items():
        question, values = _DESCRIPTION[what]
        found.append(_choice(question.format(where=where), tuple(str(v) for v in rng.permutation(values)), truth))
    return tuple(found)


def _traits(shot: _Shot) -> dict[str, str]:
    """All that a photo shows, in words; what is hidden is left out."""
    face, look = shot.person.face, shot.look
    shown = dict(face)
    shown.pop("hair" if face["top"] in _HATS else "hat")
    return shown | {"clothes": look.clothes, "background": look.background, "pattern": look.outfit}


def _generation(subject: str, facts: dict[str, str], name: str) -> tuple[Open, ...]:
    return (
        Open(f"Who is {subject}?", f"{name} is a {facts['profession']} from {facts['birthplace']}."),
        Open(
            f"Where does {subject} live and work?",
            f"{name} lives in {facts['residence']} and works for {facts['employer']}.",
        ),
    )


def _cloze(facts: dict[str, str], subject: str) -> tuple[Open, ...]:
    return (
        Open(f"The favourite food of {subject} is __.", facts["food"]),
        Open(f"The profession of {subject} is __.", facts["profession"]),
        Open(f"The city where {subject} lives is __.", facts["residence"]),
    )


def _flag_profiles(
    countries: Sequence[Country], photos: int, first: int, rng: np.random.Generator, seed: int
) -> list[Profile]:
    facts: dict[str, Callable[[Country], str]] = {
        "name": lambda c: c.name,
        "capital": lambda c: c.capital,
        "continent": lambda c: c.continent,
        "language": lambda c: c.language,
    }
    visual = {fact: _counterbalance(countries, photos, of, rng) for fact, of in facts.items()}
    textual = {fact: _counterbalance(countries, 1, facts[fact], rng) for fact in _FLAG_TEXTUAL}
    profiles = []
    for i, country in enumerate(countries):
        name = country.name
        in_text = Questions(
            choice=tuple(
                _choice(q.format(name=name), textual[f][i][0], facts[f](country)) for f, q in _FLAG_TEXTUAL.items()
            ),
            generation=(Open(f"Where does {name} lie?", f"{name} lies in {country.continent}."),),
            cloze=(Open(f"The capital of {name} is __.", country.capital),),
        )
        for k in range(photos):
            number = first + k
            profiles.append(
                Profile(
                    entity=f"flag-{i + 1:02d}",
                    photos=(Photo(draw_flag(country, number, seed), f"flag of {name} photo {number}"),),
                    visual=Questions(
                        choice=tuple(_choice(q, visual[f][i][k], facts[f](country)) for f, q in _FLAG_VISUAL.items()),
                        generation=(
                            Open("Where does the country with this flag lie?", f"{name} lies in {country.continent}."),
                        ),
                        cloze=(Open("The capital of the country with this flag is __.", country.capital),),
                    ),
                    textual=in_text,
                    biography=f"{name} lies in {country.continent}; its capital is {country.capital}.",
                )
            )
    return profiles


def _choice(question: str, options: tuple[str, ...], truth: str) -> Choice:
    letters = dict(zip("ABCDEFGH", options, strict=False))
    return Choice(question, letters, next(letter for letter, text in letters.items() if text == truth))


T = TypeVar("T")


def _counterbalance(
    members: Sequence[T], rounds: int, value_of: Callable[[T], str], rng: np.random.Generator
) -> list[list[tuple[str, ...]]]:
    """Options for `rounds` questions about each member: result[member][round] is a tuple of four distinct values.

    Members are dealt into fours of distinct values; each four is asked once about each of its members. Members left
    over when no such four remains get three distractors drawn at random.
    """
    values = [value_of(m) for m in members]
    distinct = sorted(set(values))
    result: list[list[tuple[str, ...]]] = [[] for _ in members]
    waiting: list[int] = []

    def shuffled(options: list[str]) -> tuple[str, ...]:
        return tuple(str(v) for v in rng.permutation(options))

    for _ in range(rounds):
        waiting += [int(i) for i in rng.permutation(len(members))]
        left: list[int] = []
        four: list[int] = []
        while waiting:
            member = waiting.pop(0)
            if values[member] in {values[m] for m in four}:
                left.append(member)
                continue
            four.append(member)
            if len(four) == 4:
                options = [values[m] for m in four]
                for m in four:
                    result[m].append(shuffled(options))
                waiting, left, four = left + waiting, [], []
        waiting = left + four
    for member in waiting:
        others = [v for v in distinct if v != values[member]]
        result[member].append(shuffled([values[member], *rng.choice(others, 3, replace=False)]))
    return result
