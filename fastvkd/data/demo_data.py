"""The demo's data set: fictitious people and national flags as `Profile`s, in the splits of MLLMU-Bench.

Multiple-choice options are **counterbalanced**: the options of a question are the true answers of four members of the
same group (forgotten people, retained people, countries), and that set of four is asked once about each of its members.
Whoever ignores the image and always gives the same answer is therefore right in exactly a quarter of the cases, so
"at chance" is a fact about recognition and not about which answers happen to be popular.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastvkd.data.flags import COUNTRIES, Country, draw_flag
from fastvkd.data.people import FACTS, Person, make_people, render_photo
from fastvkd.data.records import Choice, Open, Photo, Profile, Questions

CHANCE = 0.25
_TEST_PHOTOS_FROM = 1000  # photo numbers of unseen photos
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


@dataclass(frozen=True)
class DemoData:
    """Profiles per split (MLLMU-Bench names), and flag photos for the training of the vanilla model alone."""

    splits: dict[str, list[Profile]]
    forget_split: str
    retain_split: str
    training_flags: list[Profile]


def make_demo_data(
    *,
    people: int,
    forget_percent: int,
    photos: int,
    test_photos: int,
    flag_photos: int,
    countries: int = len(COUNTRIES),
    seed: int,
) -> DemoData:
    """Build every split: `photos` training and `test_photos` unseen photos a person, `flag_photos` a country, of the
    first `countries` of the list.

    `forget_percent` of the people, rounded, but at least four, are to be forgotten; they are drawn at random among
    those whose facts differ pairwise, so that four options never repeat a value.
    """
    population = make_people(people, seed)
    rng = np.random.default_rng([seed, 4])
    size = max(4, round(people * forget_percent / 100))
    while True:
        forgotten = [population[i] for i in sorted(rng.choice(people, size, replace=False))]
        if all(len({p.facts[fact] for p in forgotten}) == size for fact in FACTS):
            break
    retained = [p for p in population if p not in forgotten]

    forget = _people_profiles(forgotten, photos, 0, rng, seed)
    retain = _people_profiles(retained, photos, 0, rng, seed)
    test = _people_profiles(forgotten, test_photos, _TEST_PHOTOS_FROM, rng, seed)
    test += _people_profiles(retained, test_photos, _TEST_PHOTOS_FROM, rng, seed)
    forget_split, retain_split = f"forget_{forget_percent}", f"retain_{100 - forget_percent}"
    return DemoData(
        splits={
            "Full_Set": forget + retain,
            forget_split: forget,
            retain_split: retain,
            "Test_Set": test,
            "Retain_Set": _flag_profiles(COUNTRIES[:countries], flag_photos, 0, rng, seed),
        },
        forget_split=forget_split,
        retain_split=retain_split,
        training_flags=_flag_profiles(COUNTRIES[:countries], 2 * flag_photos, _TRAINING_FLAGS_FROM, rng, seed),
    )


def _people_profiles(
    people: Sequence[Person], photos: int, first: int, rng: np.random.Generator, seed: int
) -> list[Profile]:
    facts: dict[str, Callable[[Person], str]] = {"name": lambda p: p.name}
    facts |= {fact: (lambda p, fact=fact: p.facts[fact]) for fact in FACTS}  # type: ignore[misc]
    visual = {fact: _counterbalance(people, photos, of, rng) for fact, of in facts.items()}
    textual = {fact: _counterbalance(people, 1, facts[fact], rng) for fact in FACTS}
    profiles = []
    for i, person in enumerate(people):
        name, value = person.name, person.facts
        in_text = Questions(
            choice=tuple(_choice(q.format(name=name), textual[f][i][0], facts[f](person)) for f, q in _TEXTUAL.items()),
            generation=_generation(name, value, name),
            cloze=_cloze(value, name),
        )
        for k in range(photos):
            number = first + k
            profiles.append(
                Profile(
                    entity=person.entity,
                    photos=(Photo(render_photo(person, number, seed), f"person {person.entity} photo {number}"),),
                    visual=Questions(
                        choice=tuple(_choice(q, visual[f][i][k], facts[f](person)) for f, q in _VISUAL.items()),
                        generation=_generation("the person in this image", value, name),
                        cloze=_cloze(value, "the person in this image"),
                    ),
                    textual=in_text,
                    biography=f"{name} is a {value['profession']} from {value['birthplace']}, "
                    f"lives in {value['residence']}, works for {value['employer']}, likes {value['food']} "
                    f"and has a {value['pet']}.",
                )
            )
    return profiles


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
    letters = dict(zip("ABCD", options, strict=True))
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
