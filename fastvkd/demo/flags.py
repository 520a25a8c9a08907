"""National flags that can be drawn by rule, with true facts: the demo's "real world" set.

Colours are approximate and emblems are left out; where two countries would then share a flag only one is listed.
Flags are not subject to copyright.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fastvkd.demo.people import PHOTO_SIZE, encode_png


@dataclass(frozen=True)
class Country:
    """A country, the rule that draws its flag (see `draw_flag`), and true facts."""

    name: str
    rule: str
    capital: str
    continent: str
    language: str


# Rules: "v c c c" vertical stripes, "h c c c" horizontal stripes (a colour may carry a relative height, as in "r*2"),
# "disc field disc", "cross field arm [inner]" (Nordic), "plus field arm" (centred, not reaching the edge),
# "hoist-v band h ..." a vertical band at the hoist beside horizontal stripes.
COUNTRIES: tuple[Country, ...] = (
    Country("France", "v blue white red", "Paris", "Europe", "French"),
    Country("Italy", "v green white red", "Rome", "Europe", "Italian"),
    Country("Belgium", "v black yellow red", "Brussels", "Europe", "Dutch"),
    Country("Romania", "v blue yellow red", "Bucharest", "Europe", "Romanian"),
    Country("Nigeria", "v green white green", "Abuja", "Africa", "English"),
    Country("Peru", "v red white red", "Lima", "America", "Spanish"),
    Country("Guinea", "v red yellow green", "Conakry", "Africa", "French"),
    Country("Ivory Coast", "v orange white green", "Yamoussoukro", "Africa", "French"),
    Country("Germany", "h black red yellow", "Berlin", "Europe", "German"),
    Country("Netherlands", "h red white blue", "Amsterdam", "Europe", "Dutch"),
    Country("Russia", "h white blue red", "Moscow", "Europe", "Russian"),
    Country("Hungary", "h red white green", "Budapest", "Europe", "Hungarian"),
    Country("Bulgaria", "h white green red", "Sofia", "Europe", "Bulgarian"),
    Country("Estonia", "h skyblue black white", "Tallinn", "Europe", "Estonian"),
    Country("Lithuania", "h yellow green red", "Vilnius", "Europe", "Lithuanian"),
    Country("Armenia", "h red blue orange", "Yerevan", "Asia", "Armenian"),
    Country("Gabon", "h green yellow blue", "Libreville", "Africa", "French"),
    Country("Sierra Leone", "h green white skyblue", "Freetown", "Africa", "English"),
    Country("Ukraine", "h blue yellow", "Kyiv", "Europe", "Ukrainian"),
    Country("Poland", "h white red", "Warsaw", "Europe", "Polish"),
    Country("Austria", "h red white red", "Vienna", "Europe", "German"),
    Country("Thailand", "h red white blue*2 white red", "Bangkok", "Asia", "Thai"),
    Country("Botswana", "h skyblue*3 white black*2 white skyblue*3", "Gaborone", "Africa", "English"),
    Country("Colombia", "h yellow*2 blue red", "Bogota", "America", "Spanish"),
    Country("Mauritius", "h red blue yellow green", "Port Louis", "Africa", "English"),
    Country("Japan", "disc white red", "Tokyo", "Asia", "Japanese"),
    Country("Bangladesh", "disc darkgreen red", "Dhaka", "Asia", "Bengali"),
    Country("Palau", "disc skyblue yellow", "Ngerulmud", "Oceania", "Palauan"),
    Country("Sweden", "cross blue yellow", "Stockholm", "Europe", "Swedish"),
    Country("Denmark", "cross red white", "Copenhagen", "Europe", "Danish"),
    Country("Finland", "cross white blue", "Helsinki", "Europe", "Finnish"),
    Country("Switzerland", "plus red white", "Bern", "Europe", "German"),
    Country("Madagascar", "hoist-v white h red green", "Antananarivo", "Africa", "Malagasy"),
    Country("Benin", "hoist-v green h yellow red", "Porto-Novo", "Africa", "French"),
)

_RGB = {
    "black": (20, 20, 20),
    "blue": (10, 60, 150),
    "darkgreen": (0, 100, 70),
    "green": (0, 135, 60),
    "orange": (245, 130, 20),
    "red": (205, 20, 40),
    "skyblue": (80, 165, 220),
    "white": (250, 250, 250),
    "yellow": (250, 205, 20),
}


def draw_flag(country: Country, photo: int, seed: int) -> bytes:
    """PNG bytes of photo number `photo` of the flag: position, scale, tilt, light, folds and background vary."""
    index = COUNTRIES.index(country)
    rng = np.random.default_rng([seed, 3, index, photo])
    width, height = 2 * PHOTO_SIZE, 2 * PHOTO_SIZE * 2 // 3
    flag = Image.new("RGB", (width, height))
    _draw(ImageDraw.Draw(flag), country.rule.split(), 0, 0, width, height)

    # Folds: a smooth brightness wave along the flag.
    x = np.linspace(0, 2 * np.pi * rng.uniform(0.7, 1.6), width) + rng.uniform(0, 6.28)
    light = rng.uniform(0.85, 1.05) * (1 + rng.uniform(0.03, 0.12) * np.sin(x))
    pixels = np.clip(np.asarray(flag, dtype=np.float32) * light[None, :, None], 0, 255).astype(np.uint8)
    size = int(PHOTO_SIZE * rng.uniform(0.78, 1.0))
    flag = Image.fromarray(pixels).resize((size, size * 2 // 3), Image.Resampling.LANCZOS)

    sky = tuple(int(v) for v in rng.choice([(150, 190, 230), (200, 205, 210), (170, 200, 170), (120, 130, 150)]))
    photo_image = Image.new("RGB", (PHOTO_SIZE, PHOTO_SIZE), sky)
    mask = Image.new("L", flag.size, 255).rotate(angle := float(rng.uniform(-8, 8)), expand=True)
    flag = flag.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    spare_x, spare_y = PHOTO_SIZE - flag.width, PHOTO_SIZE - flag.height
    at = (int(spare_x * rng.uniform(0.3, 0.7)), int(spare_y * rng.uniform(0.3, 0.7)))
    photo_image.paste(flag, at, mask)
    return encode_png(photo_image)


def _draw(draw: ImageDraw.ImageDraw, rule: list[str], x: int, y: int, w: int, h: int) -> None:
    def box(x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        draw.rectangle((x + x0 * w, y + y0 * h, x + x1 * w - 1, y + y1 * h - 1), fill=_RGB[colour])

    kind, *colours = rule
    match kind:
        case "v" | "h":
            parts = [(name, float(share or 1)) for name, _, share in (c.partition("*") for c in colours)]
            total, done = sum(share for _, share in parts), 0.0
            for name, share in parts:
                a, b = done / total, (done + share) / total
                if kind == "v":
                    box(a, 0, b, 1, name)
                else:
                    box(0, a, 1, b, name)
                done += share
        case "disc":
            field, disc = colours
            box(0, 0, 1, 1, field)
            r = 0.3 * h
            cx, cy = x + w / 2, y + h / 2
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_RGB[disc])
        case "cross":
            field, arm = colours
            box(0, 0, 1, 1, field)
            box(0.30, 0, 0.44, 1, arm)
            box(0, 0.4, 1, 0.6, arm)
        case "plus":
            field, arm = colours
            box(0, 0, 1, 1, field)
            box(0.43, 0.2, 0.57, 0.8, arm)
            box(0.3, 0.4, 0.7, 0.6, arm)
        case "hoist-v":
            band, *rest = colours
            box(0, 0, 0.35, 1, band)
            _draw(draw, rest, x + int(0.35 * w), y, w - int(0.35 * w), h)
        case _:
            raise ValueError(f"unknown flag rule {kind!r}")
