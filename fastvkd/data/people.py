"""Fictitious people for the demo: a fixed face each, many photos of it, and facts that exist nowhere else.

Faces are drawn in DiceBear's "Voxel Art" style (CC0 1.0, https://www.dicebear.com) and rasterised with resvg. What
makes the identity (skin, hair, beard, glasses, nose) never changes; expression, clothes, background, rotation, scale
and position change from photo to photo. Nothing here is a real person.
"""

import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

PHOTO_SIZE = 96  # pixels, square

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
_FACE = {
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


@dataclass(frozen=True)
class Person:
    """One fictitious person: `face` holds the fixed choices of `_FACE`, `facts` one value of each pool in `FACTS`."""

    entity: str
    name: str
    face: dict[str, str]
    facts: dict[str, str]


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
        face = {trait: str(rng.choice(values)) for trait, values in _FACE.items()}
        if all(sum(face[t] != other[t] for t in _DISTINCT) >= 3 for other in faces):
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


def _deal(pool: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    rounds = -(-count // len(pool))
    return [str(v) for _ in range(rounds) for v in rng.permutation(pool)][:count]


@cache
def _style():
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath("voxel-art.json").read_text("utf-8")))


def render_photo(person: Person, photo: int, seed: int) -> bytes:
    """PNG bytes, `PHOTO_SIZE` square, of photo number `photo`; the same arguments give the same bytes."""
    import resvg_py
    from dicebear import Avatar

    rng = np.random.default_rng([seed, 2, int(person.entity), photo])

    def pick(values: str) -> str:
        return str(rng.choice(values.split()))

    face = person.face
    options = {
        "seed": f"{person.entity}/{photo}",
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
        # What follows is the photo, not the person.
        "eyesVariant": pick("open soft happy sleepy side closed wide"),
        "mouthVariant": pick("smile bigSmile flat ooh tongue smirk laugh wideSmile frown grin"),
        "eyebrowsVariant": pick("flat raised angry soft"),
        "cheeksVariant": pick("blush pixel freckles"),
        "cheeksProbability": int(rng.choice([0, 100])),
        "outfitVariant": pick("plain stripes jacket checker overalls hoodie tie coat dress suit"),
        "shirtColor": [pick("e64980 f76707 fab005 40c057 12b886 228be6 4c6ef5 7950f2 495057")],
        "backgroundColor": [pick("b6e3f4 c0aede d1d4f9 ffd5dc ffdfbf c8e6c9 eeeeee f0e2b6 9fb8c8")],
        "rotate": float(rng.uniform(-10, 10)),
        "scale": float(rng.uniform(1.3, 1.55)),
        "translateX": float(rng.uniform(-6, 6)),
        "translateY": float(rng.uniform(6, 16)),
    }
    svg = Avatar(_style(), options).to_string()
    raw = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PHOTO_SIZE, height=PHOTO_SIZE, skip_system_fonts=True))
    # resvg writes RGBA; datasets carry plain RGB PNGs.
    with Image.open(io.BytesIO(raw)) as image:
        return encode_png(image.convert("RGB"))


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
