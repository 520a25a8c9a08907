"""Fictitious people for the demo: a fixed face each, photos of it, and facts that exist nowhere else.

Faces are drawn in DiceBear's "Voxel Art" style (CC0 1.0, https://www.dicebear.com) and rasterised with resvg. What
makes the identity (skin, hair, beard, glasses, nose) never changes; a `Look` is what changes from photo to photo. A
*stranger* is a face without name and facts. Nothing here is a real person.
"""

import io
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

PHOTO_SIZE = 72  # pixels, square

FIRST_NAMES = (
    "Ada Bruno Celia Dario Elin Farid Greta Hugo Irma Jonas Kaya Luca Mira Nils Olga Pablo Quinn Rosa Sami "
    "Tara Umar Vera Wanda Xenia Yusuf Zoe Anton Bella Cyrus Dora Emil Flora Goran Hedda Ivan Jana Karl Lena "
    "Marco Nadia Oskar Petra Rafal Selma Timo Ulla Viktor Willa Yara Zeno Alma Boris Clara Denis Edith Felix Gilda "
    "Henrik Ines Jasper"
).split()
LAST_NAMES = (
    "Abara Bellweg Corvin Dalmas Eskola Farkas Grimaud Halloran Ivarsen Jelinek Kovarik Lindqvist Moravec Novotna "
    "Okafor Petrov Quist Rosario Sandoval Tamura Ueda Varga Westlund Xanthos Yilmaz Zanetti Almeida Brandt Castel "
    "Duarte Engel Fontaine Galanis Hornik Ibarra Jurado Keller Lorentz Marchetti Nakata Orlov Pereira Rinaldi "
    "Salonen Thorsen Urbina Valdez Wirtanen Yamada Zeller Arvola Bastien Cermak Dragan Eklund Ferrante Gustav "
    "Hensley Ilves Jarvela"
).split()

# Every pool has at least 20 values; each value is short, so that options differ in content and not in length.
FACTS: dict[str, tuple[str, ...]] = {
    "profession": tuple(
        "painter surgeon pilot baker judge dentist plumber violinist architect beekeeper florist geologist tailor "
        "translator welder astronomer barber carpenter diver librarian".split()
    ),
    "birthplace": tuple(
        "Lisbon Oslo Cairo Lima Hanoi Quito Dublin Tunis Riga Havana Osaka Nairobi Turin Perth Malmo Dakar Seville "
        "Tampere Bogota Izmir".split()
    ),
    "employer": tuple(
        "Nordlicht Quantara Bluefern Ostrava Helix Marlow Pinetree Solvane Trident Umbrella Vantage Wexford Zephyr "
        "Arcadia Brightway Calder Dovetail Everline Foxglove Granite".split()
    ),
    "residence": tuple(
        "Geneva Boston Kyoto Prague Sydney Madrid Vienna Zagreb Austin Lagos Milan Tallinn Denver Athens Bergen "
        "Cusco Delhi Fez Ghent Hobart".split()
    ),
    "food": tuple(
        "ramen paella tacos lasagna sushi falafel pierogi curry goulash dumplings risotto waffles hummus borscht "
        "pancakes kimchi couscous ceviche gnocchi moussaka".split()
    ),
    "pet": tuple(
        "cat parrot rabbit turtle hamster ferret gecko goldfish donkey canary poodle pony iguana hedgehog beagle duck "
        "tarantula goat lizard owl".split()
    ),
}

# Components that make the face; a probability of 0 or 100 pins each to present or absent.
FACE = {
    "skin": ["f5d0b0", "eab890", "c99062", "95562f", "6a3d1f"],
    "hair": ["2c222b", "5a3825", "c98850", "e8d4a8", "b55239", "d6455d", "6d5acf", "3fb27f"],
    "top": (
        "short spiky bowl sideSwept curly mohawk buns ponytail bob longStraight longWavy braids cap beanie animalEars "
        "bunnyEars afro halfShaved"
    ).split(),
    "beard": ["none", "none", "none", "full", "mustache", "goatee"],
    "glasses": ["none", "none", "none", "round", "square", "shades", "visor"],
    "nose": ["block", "wide", "small", "tall"],
    "hat": ["c68a5f", "f2f2f2", "8d95d6", "e0876d", "5ba8a0", "d9a03c"],
}
_DISTINCT = ("skin", "hair", "top", "beard", "glasses")  # any two people differ in at least three of these
_STRANGERS_FROM = 201  # their entity numbers; people have smaller ones

CLOTHES = {
    "red": "e03131",
    "yellow": "fab005",
    "green": "2f9e44",
    "blue": "1c7ed6",
    "purple": "7048e8",
    "pink": "f783ac",
    "black": "343a40",
    "white": "f1f3f5",
}
BACKGROUNDS = {"blue": "a5d8ff", "green": "b2f2bb", "pink": "fcc2d7", "yellow": "ffec99", "grey": "ced4da"}


@dataclass(frozen=True)
class Person:
    """One fictitious person: `face` holds the fixed choices of `FACE`, `facts` one value of each pool in `FACTS`. A
    stranger has neither name nor facts."""

    entity: str
    face: dict[str, str]
    name: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """What one photo shows beside who it is: DiceBear's variants and placement, and the colours by name."""

    clothes: str
    background: str
    outfit: str
    eyes: str
    mouth: str
    eyebrows: str
    cheeks: str
    rotate: float
    scale: float
    x: float
    y: float


def make_people(count: int, seed: int) -> list[Person]:
    """`count` people (at most 60) whose faces differ pairwise in three or more traits.

    Facts are dealt so that every value of a pool is used before any is used twice.
    """
    if not 1 <= count <= len(FIRST_NAMES):
        raise ValueError(f"count must be between 1 and {len(FIRST_NAMES)}, got {count}")
    rng = np.random.default_rng([seed, 1])
    first, last = rng.permutation(FIRST_NAMES), rng.permutation(LAST_NAMES)
    dealt = {fact: _deal(pool, count, rng) for fact, pool in FACTS.items()}
    faces: list[dict[str, str]] = []
    while len(faces) < count:
        face = _random_face(rng)
        if all(_unlike(face, other) for other in faces):
            faces.append(face)
    return [
        Person(
            entity=f"{i + 1:03d}",
            name=f"{first[i]} {last[i]}",
            face=faces[i],
            facts={fact: values[i] for fact, values in dealt.items()},
        )
        for i in range(count)
    ]


def make_strangers(count: int, people: Sequence[Person], seed: int) -> list[Person]:
    """`count` faces without name and facts, each as unlike every one of `people` as they are among themselves."""
    rng = np.random.default_rng([seed, 6])
    faces: list[dict[str, str]] = []
    while len(faces) < count:
        face = _random_face(rng)
        if all(_unlike(face, person.face) for person in people):
            faces.append(face)
    return [Person(entity=f"{_STRANGERS_FROM + i}", face=face) for i, face in enumerate(faces)]


def _random_face(rng: np.random.Generator) -> dict[str, str]:
    return {trait: str(rng.choice(values)) for trait, values in FACE.items()}


def _unlike(face: dict[str, str], other: dict[str, str]) -> bool:
    return sum(face[t] != other[t] for t in _DISTINCT) >= 3


def _deal(pool: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    rounds = -(-count // len(pool))
    return [str(v) for _ in range(rounds) for v in rng.permutation(pool)][:count]


@cache
def _style():
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath("voxel-art.json").read_text("utf-8")))


def make_look(person: Person, photo: int, seed: int, *, beside: bool = False) -> Look:
    """What photo number `photo` shows; the same arguments give the same look. `beside`: half of a photo of two."""
    rng = np.random.default_rng([seed, 2, int(person.entity), photo])

    def pick(values: Iterable[str]) -> str:
        return str(rng.choice(list(values)))

    return Look(
        clothes=pick(CLOTHES),
        background=pick(BACKGROUNDS),
        outfit=pick(("plain", "stripes", "hoodie")),
        eyes=pick(("open", "wide", "side", "closed", "happy")),
        mouth=pick(("laugh", "grin", "ooh", "flat")),
        eyebrows=pick(("flat", "raised", "angry", "soft")),
        cheeks=pick(("none", "blush", "pixel", "freckles")),
        rotate=float(rng.uniform(-8, 8)),
        scale=float(rng.uniform(0.85, 0.95) if beside else rng.uniform(1.15, 1.4)),
        x=float(rng.uniform(-2, 2) if beside else rng.uniform(-6, 6)),
        y=float(rng.uniform(2, 10) if beside else rng.uniform(2, 8)),
    )


def draw_photo(face: dict[str, str], look: Look) -> bytes:
    """PNG bytes, `PHOTO_SIZE` square; the same arguments give the same bytes."""
    import resvg_py
    from dicebear import Avatar

    options = {
        "seed": "demo",
        "size": PHOTO_SIZE,
        "animationVariant": "none",
        "skinColor": [face["skin"]],
        "hairColor": [face["hair"]],
        "hatColor": [face["hat"]],
        "topVariant": face["top"],
        "topProbability": 100,
        "noseVariant": face["nose"],
        "beardVariant": "full" if face["beard"] == "none" else face["beard"],
        "beardProbability": 0 if face["beard"] == "none" else 100,
        "glassesVariant": "round" if face["glasses"] == "none" else face["glasses"],
        "glassesProbability": 0 if face["glasses"] == "none" else 100,
        "eyebrowsProbability": 100,
        "eyesVariant": look.eyes,
        "mouthVariant": look.mouth,
        "eyebrowsVariant": look.eyebrows,
        "cheeksVariant": "blush" if look.cheeks == "none" else look.cheeks,
        "cheeksProbability": 0 if look.cheeks == "none" else 100,
        "outfitVariant": look.outfit,
        "shirtColor": [CLOTHES[look.clothes]],
        "backgroundColor": [BACKGROUNDS[look.background]],
        "rotate": look.rotate,
        "scale": look.scale,
        "translateX": look.x,
        "translateY": look.y,
    }
    svg = Avatar(_style(), options).to_string()
    raw = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PHOTO_SIZE, height=PHOTO_SIZE, skip_system_fonts=True))
    # resvg writes RGBA; datasets carry plain RGB PNGs.
    with Image.open(io.BytesIO(raw)) as image:
        return encode_png(image.convert("RGB"))


def draw_photos(faces: Sequence[dict[str, str]], looks: Sequence[Look], workers: int = 1) -> list[bytes]:
    """Every face as its look has it, drawn by `workers` processes."""
    if workers == 1:
        return [draw_photo(face, look) for face, look in zip(faces, looks, strict=True)]
    # Not forked: the parent has threads of torch.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(draw_photo, faces, looks, chunksize=32))


def side_by_side(left: bytes, right: bytes) -> bytes:
    """PNG bytes of one photo, `PHOTO_SIZE` square: the middle halves of two such photos beside each other."""
    joint, half = Image.new("RGB", (PHOTO_SIZE, PHOTO_SIZE)), PHOTO_SIZE // 2
    for data, x in ((left, 0), (right, half)):
        with Image.open(io.BytesIO(data)) as image:
            joint.paste(image.crop((half // 2, 0, half // 2 + half, PHOTO_SIZE)), (x, 0))
    return encode_png(joint)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
